"""Token rows: a worker's core, its shards, and the server side of the transports. No requests."""
