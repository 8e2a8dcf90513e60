"""Serve waits for gRPC calls, which it does not know, when it ends a replica and when it scales."""

import asyncio
import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from milliways.cluster.ray.autoscaling import GRPC_CALLS, replicas_for_requests
from milliways.cluster.settings.config import ClusterConfig, IngressSettings

with warnings.catch_warnings():
    # Serve's models use what pydantic will remove.
    warnings.simplefilter("ignore", DeprecationWarning)
    from ray.serve._private.replica import Replica
    from ray.serve.config import AutoscalingConfig

    from milliways.cluster.ray.app import AUTOSCALING_POLICY, make_app
    from milliways.cluster.ray.leaving_replica import follow_replica

WRAPPED = ("perform_graceful_shutdown", "get_num_ongoing_requests")


def bare_replica(num_http: int) -> Any:
    """An object of Serve's class with nothing but a number of HTTP requests."""
    replica: Any = Replica.__new__(Replica)
    replica._quiescing = False
    replica._reserved_slots = set()
    replica._metrics_manager = SimpleNamespace(get_num_ongoing_requests=lambda: num_http)
    return replica


@pytest.fixture
def _restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve's own methods come back after the test."""
    for name in WRAPPED:
        monkeypatch.setattr(Replica, name, getattr(Replica, name))


@pytest.mark.usefixtures("_restored")
def test_serve_counts_calls_beside_http_requests() -> None:
    follow_replica(on_leaving=lambda: None, num_calls=lambda: 3)
    assert bare_replica(num_http=2).get_num_ongoing_requests() == 5


@pytest.mark.usefixtures("_restored")
def test_replica_hears_at_once_that_it_leaves_and_takes_no_http_request() -> None:
    heard: list[str] = []

    async def shut_down(self: Any) -> None:
        heard.append("Serve waits for requests")

    Replica.perform_graceful_shutdown = shut_down  # type: ignore[method-assign]
    follow_replica(on_leaving=lambda: heard.append("leaves"), num_calls=lambda: 0)
    replica = bare_replica(num_http=1)
    asyncio.run(replica.perform_graceful_shutdown())
    assert heard == ["leaves", "Serve waits for requests"]
    assert replica._is_replica_quiescing(SimpleNamespace(is_direct_ingress=False))


def context(**fields: Any) -> Any:
    defaults = {
        "current_num_replicas": 2,
        "target_num_replicas": 2,
        "total_num_requests": 8.0,
        "aggregated_metrics": {},
        "config": AutoscalingConfig(target_ongoing_requests=4),
    }
    return SimpleNamespace(**(defaults | fields))


def test_autoscaler_counts_http_requests_and_calls() -> None:
    assert replicas_for_requests(context()) == (2.0, {})
    metrics = {GRPC_CALLS: {"a": 10.0, "b": 2.0}, "other": {"a": 100.0}}
    assert replicas_for_requests(context(aggregated_metrics=metrics)) == (5.0, {})


def test_application_gives_requests_their_time_and_starts_new_replicas_first() -> None:
    app: Any = make_app(ClusterConfig(ingress=IngressSettings(grace_s=30.0)))
    config = app._bound_deployment._deployment_config
    assert config.graceful_shutdown_timeout_s > 30.0
    assert config.max_surge_percent == 100
    policy = config.autoscaling_config.policy
    assert policy.policy_function.replace(":", ".") == AUTOSCALING_POLICY.replace(":", ".")
