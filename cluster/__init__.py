"""Puts routers and workers together: one process, a cluster on Ray, and the command line.

    from milliways.cluster.settings.config import ClusterConfig
    from milliways.cluster.ray.app import make_app
    from ray import serve

    serve.run(make_app(ClusterConfig()))        # the demo model on three workers

Owns the settings (`settings`), the controller (`control`), what clients connect to (`ingress`),
what runs in one process (`host`), what needs Ray (`ray`), and the `milliways` command (`cli`).

Invariants:
- No token waits for the controller. If it dies, routers and workers serve on.
- Only `ray` and `cli` import Ray; only `ingress` speaks to clients.
"""
