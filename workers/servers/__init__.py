"""A worker's side of the connections to routers."""
