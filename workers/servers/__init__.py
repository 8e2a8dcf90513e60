"""A worker's side of the connections to routers.

    sessions = RouterSessions(core)
    server = WorkerServer(reactor, sessions, worker_id="worker-0", incarnation=1)
    address = reactor.ask(lambda: server.start("127.0.0.1:0"), timeout_s=10.0)
    ...
    reactor.ask(server.stop, timeout_s=10.0)

Owns the sockets, and the path of a call from a message into the core and of its result back. One
server class for each transport; `WorkerServer` runs them and answers Hello.

Invariants:
- Everything here runs in the thread that computes, so a call changes no thread.
- Each call gets one answer, unless its connection broke.
- A router that sends a malformed message loses that connection; no other router notices.
- The core is informed that a router is gone when its last connection broke, and not before.
"""
