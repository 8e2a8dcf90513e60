"""Deploys the application of a running cluster again: `python -m tests.redeploy SETTINGS`.

SETTINGS is JSON: `ingress` has settings that differ, and `replicas`, if given, is their fixed
number. Replicas restart if and only if `ingress` differs from before.
"""

import json
import sys
from typing import Any

from milliways.cluster.ray.environment import be_quiet, enter, find_running
from milliways.cluster.settings.config import config_from_tree


def main(settings: dict[str, Any]) -> None:
    """Returns when the application runs as told."""
    be_quiet()
    running = find_running()
    assert running is not None, "no cluster runs"
    enter(running)
    # Not before: Ray reads its settings when it is imported.
    from ray import serve

    from milliways.cluster.ray.app import APP_NAME, make_app
    from milliways.cluster.ray.cluster import join

    join(running.address)
    app = make_app(
        config_from_tree(
            {"workers": {"count": 3, "expert_replicas": 2}, "ingress": settings["ingress"]}
        )
    )
    if "replicas" in settings:
        app._bound_deployment = app._bound_deployment.options(
            num_replicas=settings["replicas"], autoscaling_config=None
        )
    serve.run(app, name=APP_NAME, route_prefix="/")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
