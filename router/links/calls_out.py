"""Calls that a link has sent and that have not come back."""

from collections.abc import Iterator
from itertools import count

from milliways.runtime.tasks import Pending
from milliways.wire.calls import Result
from milliways.wire.errors import PeerLostError


class CallsOut:
    """Numbers the calls of a link, and brings each answer to whoever asked."""

    def __init__(self, worker_id: str) -> None:
        self._worker_id = worker_id
        self._ids: Iterator[int] = count(1)
        self._pendings: dict[int, Pending[Result]] = {}
        self._loss: str | None = None

    def __len__(self) -> int:
        return len(self._pendings)

    @property
    def is_lost(self) -> bool:
        return self._loss is not None

    def add(self, pending: Pending[Result]) -> int:
        """The number of a new call."""
        call_id = next(self._ids)
        self._pendings[call_id] = pending
        return call_id

    def settle(self, call_id: int, result: Result) -> bool:
        """Gives a result to who asked; False if nobody did."""
        pending = self._pendings.pop(call_id, None)
        if pending is None:
            return False
        pending.resolve(result)
        return True

    def lose(self, message: str) -> None:
        """All that are out fail, and all that come."""
        if self._loss is not None:
            return
        self._loss = message
        pendings, self._pendings = self._pendings, {}
        for pending in pendings.values():
            self.fail(pending)

    def fail(self, pending: Pending[Result]) -> None:
        """Fails a call for the reason that the link is lost."""
        pending.fail(PeerLostError(self._worker_id, self._loss or "closed"))
