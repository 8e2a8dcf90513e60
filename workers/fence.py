"""Which calls are valid: a worker's state, its incarnation, and the placement that it goes by.

The compute thread changes a fence. Every thread may read it: it reads one attribute at a time, and
each attribute is a value that is replaced as a whole.
"""

from collections.abc import Callable

from milliways.wire.calls import Fence, Refusal
from milliways.wire.errors import RefusalReason
from milliways.wire.view import WorkerState, moved


class WorkerFence:
    """What the fence of every call is checked against.

    Invariant: `placement_epoch` only grows; `state` changes along `WORKER_MOVES` alone.
    """

    def __init__(self, worker_id: str, incarnation: int) -> None:
        self.worker_id = worker_id
        self.incarnation = incarnation
        self.state = WorkerState.LOADING
        self.placement_epoch = 0
        # Called after each change, in the thread that made it.
        self.on_change: Callable[[], None] = _nothing

    @property
    def can_compute(self) -> bool:
        """Whether calls are accepted; a worker that drains still answers."""
        return self.state in (WorkerState.READY, WorkerState.DRAINING)

    def move(self, to: WorkerState) -> None:
        """Changes the state."""
        self.state = moved(self.state, to)
        self.on_change()

    def raise_epoch(self, placement_epoch: int) -> None:
        """From now on refuses callers that act on an older placement."""
        self.placement_epoch = max(self.placement_epoch, placement_epoch)
        self.on_change()

    def fault_of(self, fence: Fence) -> Refusal | None:
        """Why a call with this fence is refused, if it is."""
        if fence.incarnation != self.incarnation:
            message = f"incarnation {fence.incarnation} is meant, this is {self.incarnation}"
            return self.refuse(RefusalReason.STALE_INCARNATION, message)
        if fence.placement_epoch < self.placement_epoch:
            message = f"placement {fence.placement_epoch} is older than {self.placement_epoch}"
            return self.refuse(RefusalReason.STALE_EPOCH, message)
        if not self.can_compute:
            return self.refuse(RefusalReason.NOT_HELD, f"the worker is {self.state.value}")
        return None

    def refuse(self, reason: RefusalReason, message: str) -> Refusal:
        """A refusal that says which placement this worker goes by."""
        return Refusal(reason, message, self.placement_epoch)


def _nothing() -> None:
    pass
