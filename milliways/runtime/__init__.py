"""Time, tasks and threads: how decisions run, in production and in simulation.

    reactor = Reactor(SystemClock())
    reactor.start()                                   # a thread of its own
    task = reactor.ask(lambda: reactor.tasks.start(work()), timeout_s=10.0)
    reactor.close()

In a test, `Tasks(FakeClock())` runs the same coroutine under a clock that stands still.

Owns clocks, coroutines without an event loop (`tasks`), and the thread that runs them (`reactor`,
with gRPC's asyncio in it, `hosted_loop`); `AsyncTasks` runs tasks inside an asyncio program.

Invariants:
- Tasks, timers and callbacks of a reactor run in its thread, one at a time. Other threads use
  `post`, `ask` and `call` only.
- A `Pending` is resolved or failed once; later attempts have no effect.
- Time is read from a `Clock` only.
"""
