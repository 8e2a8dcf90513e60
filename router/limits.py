"""The limits of a router. Their defaults are set here, and nowhere else.

`cluster.settings.config.RouterSettings` takes its defaults from these classes. Nothing is imported,
so that settings can be read without the router.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """Limits of a step and of the queue; `max_waiting` is None if the caller limits the queue."""

    max_running: int = 32
    max_step_tokens: int = 128
    max_waiting: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchLimits:
    """How long a worker may take to compute experts.

    A second worker is asked after a multiple of the first one's latency, but not before
    `hedge_after_s_min` and not after `hedge_after_s`. After `timeout_s` the first one is given up.
    """

    hedge_after_s: float = 1.0
    hedge_after_s_min: float = 0.05
    timeout_s: float = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterLimits:
    """Limits of the queue, of steps and of their micro-batches."""

    scheduler: SchedulerLimits = field(default_factory=SchedulerLimits)
    max_micro_batches: int = 2
    # A smaller micro-batch is not worth another pass over the weights.
    min_micro_batch_tokens: int = 16
    # A standby that has not answered after twice this time is given up.
    copy_timeout_s: float = 10.0
