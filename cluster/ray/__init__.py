"""A cluster on Ray: its actors, the Serve application, and starting or joining Ray.

    from milliways.cluster.ray.cluster import LocalRay
    from milliways.cluster.ray.descendants import end_descendants
    from milliways.cluster.ray.run_folder import RunFolder
    from milliways.cluster.ray.serving import ServedApplication
    from milliways.cluster.settings.config import ClusterConfig

    local = LocalRay(RunFolder().path)
    application = ServedApplication(ClusterConfig())
    application.start()                         # three workers, HTTP and gRPC
    end_descendants(timeout_s=5.0)

`start_worker` and `start_controller` start actors; `worker_actor` and `controller_actor` are what
runs in these; `fleet` is how the controller commands workers.

Owns every import of Ray, except that of commands. Decides nothing: `control` does.

Invariants:
- A worker's actor is named after its id and its incarnation, and is never restarted by Ray.
- An incarnation that counts as dead is ended before the next one starts.
- The controller and the workers are detached: they outlive the process that started them.
"""
