"""Decides whether, when and on which routers to retry a request. Pure: times are arguments."""

from milliways.wire.errors import OverloadedError, PoisonedRequestError

_FIRST_BACKOFF_S = 0.02
_LAST_BACKOFF_S = 1.0
# A request that kills routers kills them as soon as it is computed. A router that dies later died
# for another reason: in an outage many routers may die and start again.
DIES_WITHIN_S = 1.0


class Retries:
    """The history of one request's attempts: routers to avoid, the backoff, and when to give up.

    A router that dies soon after it accepted the request counts against the request. A router that
    never received it, or had it for longer than `DIES_WITHIN_S`, does not count: only the deadline
    limits those retries.

    *Invariant:* `avoided` holds the routers that broke, drained or were full in this round.
    """

    def __init__(self, max_attempts_without_progress: int, *, is_patient: bool = True) -> None:
        # Whether to try all routers again after every one of them has failed.
        self.is_patient = is_patient
        self._max_attempts_without_progress = max_attempts_without_progress
        self._num_without_progress = 0
        self._backoff_s = _FIRST_BACKOFF_S
        self._full: OverloadedError | None = None
        self.avoided: set[str] = set()
        self.reason = "no router is available"

    @property
    def full(self) -> OverloadedError | None:
        """The error of a router that was full, in this round."""
        return self._full

    def progressed(self) -> None:
        """Resets the count and the backoff: a token arrived."""
        self._num_without_progress = 0
        self._backoff_s = _FIRST_BACKOFF_S

    def broke(
        self, worker_id: str, reason: str, *, was_accepted: bool, lasted_s: float = 0.0
    ) -> None:
        """Records a stream that broke `lasted_s` after its start or its last token.

        Raises:
            PoisonedRequestError: too many streams broke in a row, each without a new token.
        """
        self.avoided.add(worker_id)
        self.reason = f"router {worker_id}: {reason}"
        self._num_without_progress += was_accepted and lasted_s < DIES_WITHIN_S
        if self._num_without_progress >= self._max_attempts_without_progress:
            number = self._num_without_progress
            raise PoisonedRequestError(
                f"{number} routers in a row died or broke the stream while they computed this"
                f" request, and no token came between; the last was {self.reason}"
            )

    def moved(self, worker_id: str) -> None:
        """Records a router that drains; that does not count against the request."""
        self.avoided.add(worker_id)
        self.reason = f"router {worker_id} is draining"

    def was_full(self, worker_id: str, error: OverloadedError, *, is_last: bool = True) -> None:
        """Records a router without room; `is_last` unless another router still runs the request."""
        self.avoided.add(worker_id)
        self.reason = f"router {worker_id}: {error}"
        if is_last:
            self._full = error

    def next_round(self) -> float:
        """Allows all routers again; returns how many seconds to wait first."""
        backoff_s = self._backoff_s
        self._backoff_s = min(2 * backoff_s, _LAST_BACKOFF_S)
        self.avoided.clear()
        self._full = None
        return backoff_s
