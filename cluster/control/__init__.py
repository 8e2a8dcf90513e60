"""The controller: which workers are in the cluster, and what each holds.

    controller = Controller(model_bytes, make_settings(3, 2, "auto", 8192), fleet, tasks)
    controller.start()                          # spawns workers, plans, makes them load
    await controller.scale(5)
    await controller.drain("worker-1", restarts=True)
    controller.view                             # what routers act on

Owns the view and the records of all workers. One file for each decision; `controller` lists them.
A `Fleet` does what is decided: on Ray, in processes of a test, or in a simulation.

Invariants:
- A worker's state changes along `WORKER_MOVES` alone. Its incarnation only grows.
- The epoch of views only grows. Workers refuse an older view only after all routers that answer
  have the new one.
- A view promises an expert only while its holder has loaded it.
- No clock, no thread, no Ray: `Tasks` and `Fleet` have those.
"""
