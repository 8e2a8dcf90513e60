"""When a worker that died is started again: at once, or after a pause that grows while it dies."""

from milliways.cluster.control.fleet import WorkerRecord

RESTART_AFTER_S = 1.0
BACKOFF_S = 2.0
BACKOFF_S_MAX = 30.0
# Who lives that long has come up well, and starts from the shortest pause again.
STABLE_AFTER_S = 10.0
MAX_QUICK_DEATHS = 8


def quick_deaths(record: WorkerRecord, now_s: float) -> int:
    """Its deaths in a row, with the one now."""
    was_stable = record.ready_at_s is not None and now_s - record.ready_at_s > STABLE_AFTER_S
    return 0 if was_stable else record.num_quick_deaths + 1


def loop_note(record: WorkerRecord) -> str:
    """What to add to the state of a worker that keeps dying; empty where it does not."""
    if record.num_quick_deaths < MAX_QUICK_DEATHS:
        return ""
    return f", it died {record.num_quick_deaths} times in a row"


def restart_delay_s(record: WorkerRecord, *, others_serve: bool) -> float:
    """How long to wait before its next life."""
    if record.num_quick_deaths > 2:
        # While nobody serves there is nothing to spare: only the processors from a tight loop.
        most_s = BACKOFF_S_MAX if others_serve else BACKOFF_S
        return min(most_s, BACKOFF_S * 2 ** (record.num_quick_deaths - 3))
    # Where others can serve, coming up can wait until they have taken over: it takes their
    # processors.
    return RESTART_AFTER_S if others_serve else 0.0
