"""What the transports of a worker share: from a message that came in to the core, and back."""

import logging
from collections import Counter
from collections.abc import Callable

from milliways.wire import codec
from milliways.wire.calls import Refusal, Result
from milliways.wire.errors import RefusalReason
from milliways.wire.fields import Fields
from milliways.wire.links import CallSink
from milliways.wire.tensors import MalformedMessageError, PayloadReader

logger = logging.getLogger(__name__)


class RouterSessions:
    """Which routers have a way to this worker; one that comes again may overlap with itself."""

    def __init__(self, sink: CallSink) -> None:
        self.sink = sink
        # Answers that are to be lost on their way, for whoever tries what comes of it.
        self.num_to_drop = 0
        self._num_ways: Counter[str] = Counter()

    def arrived(self, router_id: str) -> None:
        """A way from a router was opened."""
        self._num_ways[router_id] += 1

    def try_drop(self) -> bool:
        """Whether the next answer is one that is to be lost."""
        if not self.num_to_drop:
            return False
        self.num_to_drop -= 1
        return True

    def drop_next(self, count: int) -> None:
        """Loses the next answers."""
        self.num_to_drop = count

    def keep_all(self) -> int:
        """Loses no more answers; how many it should have lost yet."""
        num_left, self.num_to_drop = self.num_to_drop, 0
        return num_left

    def left(self, router_id: str) -> None:
        """A way from a router broke; the core hears of it with the last one."""
        self._num_ways[router_id] -= 1
        if self._num_ways[router_id] <= 0:
            del self._num_ways[router_id]
            self.sink.router_gone(router_id)


class Intake:
    """The calls of one connection: decoded, submitted or refused, answered once each."""

    def __init__(self, sessions: RouterSessions, send: Callable[[int, Result], None]) -> None:
        self.num_open = 0
        self._sessions = sessions
        self._send = send
        self._router_id: str | None = None
        self._is_closed = False

    def greet(self, router_id: str) -> None:
        """Says whose connection it is, before its first call."""
        self._router_id = router_id
        self._sessions.arrived(router_id)

    def take(self, fields: Fields, payload: PayloadReader) -> None:
        """Submits a call; what cannot be read, or comes in another's name, is refused."""
        reply = _Reply(self, fields.call_id)
        self.num_open += 1
        try:
            fence, call = codec.decode_request(fields, payload)
        except MalformedMessageError as error:
            reply(Refusal(RefusalReason.MALFORMED, str(error)))
            return
        if self._router_id is None:
            self.greet(fence.router_id)
        if fence.router_id != self._router_id:
            text = f"a call of {fence.router_id} on a connection of {self._router_id}"
            reply(Refusal(RefusalReason.MALFORMED, text))
            return
        try:
            self._sessions.sink.submit(call, fence, reply)
        except Exception as error:
            logger.exception("the core failed to take a call of %s", fence.router_id)
            reply(Refusal(RefusalReason.FAULT, repr(error)))

    def close(self) -> None:
        """The connection broke: replies still to come go nowhere."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._router_id is not None:
            self._sessions.left(self._router_id)

    def answer(self, call_id: int, result: Result) -> None:
        """Sends the one answer to a call."""
        self.num_open -= 1
        if not self._is_closed and not self._sessions.try_drop():
            self._send(call_id, result)


class _Reply:
    """The way back of one call; only the first answer goes it."""

    __slots__ = ("_call_id", "_intake")

    def __init__(self, intake: Intake, call_id: int) -> None:
        self._intake: Intake | None = intake
        self._call_id = call_id

    def __call__(self, result: Result) -> None:
        intake, self._intake = self._intake, None
        if intake is not None:
            intake.answer(self._call_id, result)
