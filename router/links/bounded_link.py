"""The base of all links between processes: numbered calls, a limit in flight, and a queue."""

from collections import deque
from collections.abc import Iterator
from itertools import count

from milliways.runtime.tasks import Pending
from milliways.wire.calls import Call, Fence, Result
from milliways.wire.errors import PeerLostError
from milliways.wire.limits import LinkLimits


class BoundedLink:
    """Sends calls in the order of asking, at most `max_calls_in_flight` at a time.

    A subclass sends one call (`_send`) and frees what it holds (`_release`). It calls `_settle` for
    each result, in any order, and `_lose` when the connection broke.

    Invariant: calls wait only while the limit is reached. A call is in flight or waiting exactly
    until its pending is done. Nothing is in flight or waiting once `_loss` is set.
    """

    is_local = False
    exchange_link = 0

    def __init__(self, worker_id: str, limits: LinkLimits) -> None:
        self._worker_id = worker_id
        self._max_calls_in_flight = limits.max_calls_in_flight
        self._call_ids: Iterator[int] = count(1)
        self._in_flight: dict[int, Pending[Result]] = {}
        self._waiting: deque[tuple[Call, Fence, Pending[Result]]] = deque()
        # Why the connection broke; None while it is good.
        self._loss: str | None = None

    def ask(self, call: Call, fence: Fence) -> Pending[Result]:
        """Sends a call, or queues it if the limit in flight is reached."""
        pending = Pending[Result]()
        if self._loss is not None:
            pending.fail(PeerLostError(self._worker_id, self._loss))
        elif len(self._in_flight) >= self._max_calls_in_flight:
            self._waiting.append((call, fence, pending))
        else:
            self._begin(call, fence, pending)
        return pending

    def close(self) -> None:
        """Breaks the connection. Arrays of earlier results stay valid."""
        self._lose("closed")

    def _send(self, call_id: int, call: Call, fence: Fence) -> None:
        """Writes a call to the connection."""
        raise NotImplementedError

    def _release(self, reason: str) -> None:
        """Closes the connection and frees what belongs to it; called once."""
        raise NotImplementedError

    def _begin(self, call: Call, fence: Fence, pending: Pending[Result]) -> None:
        call_id = next(self._call_ids)
        self._in_flight[call_id] = pending
        self._send(call_id, call, fence)

    def _settle(self, call_id: int, result: Result) -> None:
        """Takes the result of a call in flight; ignores a result that no call has asked for."""
        pending = self._in_flight.pop(call_id, None)
        if pending is not None:
            pending.resolve(result)
        while self._waiting and len(self._in_flight) < self._max_calls_in_flight:
            self._begin(*self._waiting.popleft())

    def _lose(self, reason: str) -> None:
        """Fails all present and future calls. A second call of this does nothing."""
        if self._loss is not None:
            return
        self._loss = reason
        unanswered = [*self._in_flight.values(), *(pending for _, _, pending in self._waiting)]
        self._in_flight.clear()
        self._waiting.clear()
        self._release(reason)
        for pending in unanswered:
            pending.fail(PeerLostError(self._worker_id, reason))
