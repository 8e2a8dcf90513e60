"""The limits of a worker's router: those of its settings, and those that a view declares later."""

from collections.abc import Mapping
from typing import Any

from milliways.cluster.control.changes import OF_ROUTERS
from milliways.cluster.settings.config import ClusterConfig, RouterSettings
from milliways.cluster.settings.names import changed
from milliways.router.limits import DispatchLimits, RouterLimits, SchedulerLimits


def router_limits(settings: RouterSettings) -> RouterLimits:
    """Limits of the queue, of steps and of their micro-batches."""
    return RouterLimits(
        scheduler=SchedulerLimits(
            max_running=settings.max_running,
            max_step_tokens=settings.max_step_tokens,
            max_waiting=settings.max_waiting,
        ),
        max_micro_batches=settings.max_micro_batches,
        min_micro_batch_tokens=settings.min_micro_batch_tokens,
        copy_timeout_s=settings.step_timeout_s,
    )


def dispatch_limits(settings: RouterSettings) -> DispatchLimits:
    """How long a worker may take to compute experts."""
    return DispatchLimits(
        hedge_after_s=settings.hedge_after_s,
        hedge_after_s_min=settings.hedge_after_s_min,
        timeout_s=settings.step_timeout_s,
    )


def with_live_settings(config: ClusterConfig, declared: Mapping[str, Any]) -> ClusterConfig:
    """Settings of a worker with those values that a running router takes."""
    return changed(config, {name: declared[name] for name in OF_ROUTERS if name in declared})
