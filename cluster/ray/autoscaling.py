"""How many ingress replicas Serve's autoscaler wants.

Serve's own policy divides the HTTP requests by `target_ongoing_requests`. This one adds the gRPC
calls, which replicas report. Serve then applies the limits and delays of its settings.

Serve pickles this module by value, so that its controller need not have Milliways: it imports
nothing of ours.
"""

from typing import Any

# The name under which a replica reports its gRPC calls.
GRPC_CALLS = "milliways_grpc_calls"


def replicas_for_requests(context: Any) -> tuple[float, dict[str, Any]]:
    """The wanted number of replicas, not yet rounded, and no state; `context` is Serve's."""
    if context.current_num_replicas == 0:
        return context.target_num_replicas, {}
    metrics: dict[str, dict[Any, float]] = context.aggregated_metrics or {}
    num_requests = context.total_num_requests + sum(metrics.get(GRPC_CALLS, {}).values())
    return num_requests / context.config.get_target_ongoing_requests(), {}
