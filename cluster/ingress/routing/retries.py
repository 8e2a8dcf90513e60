"""What becomes of a request whose stream ended before its last token. Pure: times are given."""

from milliways.wire.errors import OverloadedError, PoisonedRequestError

_FIRST_BACKOFF_S = 0.02
_LAST_BACKOFF_S = 1.0
# What a request kills, it kills as soon as it is computed. Who dies later died of something else:
# while nobody can make a token, any number of routers may come and go.
DIES_WITHIN_S = 1.0


class Retries:
    """The history of one request's attempts: whom to avoid, how long to wait, when to give up.

    A router that died as soon as it had the request counts against the request; one that never had
    it, or had it for long, does not: waiting is bounded by the deadline alone.
    """

    def __init__(self, max_attempts_without_progress: int, *, is_patient: bool = True) -> None:
        # Whether to wait for a second round, once all routers were asked in vain.
        self.is_patient = is_patient
        self._max_attempts_without_progress = max_attempts_without_progress
        self._num_without_progress = 0
        self._backoff_s = _FIRST_BACKOFF_S
        self._full: OverloadedError | None = None
        self.avoided: set[str] = set()
        self.reason = "no router is there"

    @property
    def full(self) -> OverloadedError | None:
        """What a router said that had no room, in this round."""
        return self._full

    def progressed(self) -> None:
        """A token came."""
        self._num_without_progress = 0
        self._backoff_s = _FIRST_BACKOFF_S

    def broke(
        self, worker_id: str, reason: str, *, was_accepted: bool, lasted_s: float = 0.0
    ) -> None:
        """A router's stream ended early, so long after it was asked.

        Raises:
            PoisonedRequestError: too many did, without a token between. Two may be chance.
        """
        self.avoided.add(worker_id)
        self.reason = f"router {worker_id}: {reason}"
        self._num_without_progress += was_accepted and lasted_s < DIES_WITHIN_S
        if self._num_without_progress >= self._max_attempts_without_progress:
            number = self._num_without_progress
            raise PoisonedRequestError(
                f"{number} routers in a row died or broke off with this request, and no token came"
                f" between; the last was {self.reason}"
            )

    def moved(self, worker_id: str) -> None:
        """A router drains: it did nothing wrong."""
        self.avoided.add(worker_id)
        self.reason = f"router {worker_id} drains"

    def was_full(self, worker_id: str, error: OverloadedError, *, is_last: bool = True) -> None:
        """It has no room; where another still has the request, that may be otherwise later."""
        self.avoided.add(worker_id)
        self.reason = f"router {worker_id}: {error}"
        if is_last:
            self._full = error

    def next_round(self) -> float:
        """All routers may be tried again, after so many seconds."""
        backoff_s = self._backoff_s
        self._backoff_s = min(2 * backoff_s, _LAST_BACKOFF_S)
        self.avoided.clear()
        self._full = None
        return backoff_s
