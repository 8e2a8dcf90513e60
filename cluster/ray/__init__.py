"""Everything that imports Ray: actors, the Serve application, starting and joining a cluster."""
