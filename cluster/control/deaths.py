"""When a worker counts as dead, and when it is started again.

A worker is dead when its process is gone, or when it could not start or load its shards. It becomes
LOST in the next view, whatever else its process may still do. It is started again at once, or after
a pause that grows while it keeps dying.
"""

from typing import TypeVar

from milliways.cluster.control.fleet import WorkerDiedError
from milliways.cluster.control.state import ClusterState
from milliways.cluster.control.worker_record import WorkerRecord
from milliways.runtime.tasks import Pending
from milliways.wire.view import WorkerState

RESTART_AFTER_S = 1.0
BACKOFF_S = 2.0
BACKOFF_S_MAX = 30.0
# A file may come back at any moment, and then the cluster must be whole soon.
RELOAD_S = 1.0
RELOAD_S_MAX = 4.0
# A start takes seconds of a processor: it is tried less often.
UNREADABLE_S = 6.0
# A worker that was READY for that long came up well: it starts from the shortest pause again.
STABLE_AFTER_S = 10.0
MAX_QUICK_DEATHS = 8
T = TypeVar("T")


async def until_death(state: ClusterState, record: WorkerRecord) -> None:
    """Waits for the end of a worker's process.

    Raises:
        WorkerDiedError: always.
    """
    await state.fleet.death(record.worker_id)
    raise WorkerDiedError(f"the process of {record.worker_id} is gone")


async def or_death(state: ClusterState, record: WorkerRecord, pending: Pending[T]) -> T:
    """The result of something that a worker does; waits at most until the worker dies.

    Raises:
        WorkerDiedError: its process is gone. Errors of what was waited for are raised as they are.
    """
    death = state.fleet.death(record.worker_id)
    await state.tasks.first_done((pending, death))
    if not pending.is_done:
        raise WorkerDiedError(f"the process of {record.worker_id} is gone")
    return pending.result()


def mark_dead(state: ClusterState, record: WorkerRecord) -> None:
    """Records a death. From the next view on, nobody asks this incarnation."""
    if record.is_drained:
        record.is_drained = False
    else:
        state.figures.num_deaths += 1
        record.num_quick_deaths = quick_deaths(record, state.tasks.clock.now_s())
    state.once_held |= record.held
    record.held = frozenset()
    record.move(WorkerState.LOST)


def quick_deaths(record: WorkerRecord, now_s: float) -> int:
    """The number of the worker's deaths in a row, including the present one."""
    was_stable = record.ready_at_s is not None and now_s - record.ready_at_s > STABLE_AFTER_S
    return 0 if was_stable else record.num_quick_deaths + 1


def loop_note(record: WorkerRecord) -> str:
    """What to add to the state of a worker that keeps dying; empty for other workers."""
    if record.num_quick_deaths < MAX_QUICK_DEATHS:
        return ""
    return f", it died {record.num_quick_deaths} times in a row"


def reload_delay_s(num_failed: int) -> float:
    """How long to wait before a worker tries again to load what it could not load."""
    return min(RELOAD_S_MAX, RELOAD_S * 2 ** (num_failed - 1))


def restart_delay_s(record: WorkerRecord, *, others_serve: bool) -> float:
    """How long to wait before the next incarnation starts."""
    if record.num_failed_loads:
        return UNREADABLE_S
    if record.num_quick_deaths > 2:
        # While nobody serves, there is no work that a restart could disturb. Only a tight loop of
        # starts must not occupy the processors.
        most_s = BACKOFF_S_MAX if others_serve else BACKOFF_S
        return min(most_s, BACKOFF_S * 2 ** (record.num_quick_deaths - 3))
    # If others can serve, the start waits until they have taken over, because it would slow them
    # down.
    return RESTART_AFTER_S if others_serve else 0.0
