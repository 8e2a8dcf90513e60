"""A router's connections to workers.

    connector = Connector(reactor, router_id="worker-0", host_id=local_host_id())
    table = LinkTable("worker-0", incarnation, connector.connect, reactor.tasks)
    table.update(view)
    pending = table.ask("worker-1", call, step=7, timeout_s=10.0)

Owns the links (one class for each transport), the order in which transports are tried, and what a
router has learned of each worker: whether it can be asked, how many rows it has to answer, how long
it takes.

Invariants:
- A link leads to one incarnation of a worker. A worker that was started again gets a new link.
- Each call is answered once: by a result, by a refusal, or by PeerLostError.
- Everything here runs in the thread of the router's reactor.
"""
