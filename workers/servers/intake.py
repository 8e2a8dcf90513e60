"""What the servers of all transports share: from a message to the core, and back."""

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
    """Which routers are connected to this worker, and the core that takes their calls.

    A router that reconnects may have two connections for a while.

    Invariant: `_num_connections` has only routers with a connection, and each count is positive.
    """

    def __init__(self, sink: CallSink) -> None:
        self.sink = sink
        self._num_connections: Counter[str] = Counter()

    def connected(self, router_id: str) -> None:
        """A router opened a connection."""
        self._num_connections[router_id] += 1

    def disconnected(self, router_id: str) -> None:
        """A connection of a router broke; the core is informed when it was the last one."""
        self._num_connections[router_id] -= 1
        if self._num_connections[router_id] <= 0:
            del self._num_connections[router_id]
            self.sink.router_gone(router_id)


class Intake:
    """The calls of one connection: decoded, submitted or refused, and answered once each.

    Invariant: `num_open` counts the calls that were taken and not answered.
    """

    def __init__(self, sessions: RouterSessions, send: Callable[[int, Result], None]) -> None:
        self.num_open = 0
        self._sessions = sessions
        self._send = send
        self._router_id: str | None = None
        self._is_closed = False

    def greet(self, router_id: str) -> None:
        """Says which router this connection belongs to, before its first call."""
        self._router_id = router_id
        self._sessions.connected(router_id)

    def take(self, fields: Fields, payload: PayloadReader) -> None:
        """Submits a call. Refuses one that is malformed, or names another router."""
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
        """The connection broke: later replies are dropped."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._router_id is not None:
            self._sessions.disconnected(self._router_id)

    def answer(self, call_id: int, result: Result) -> None:
        """Sends the one answer to a call."""
        self.num_open -= 1
        if not self._is_closed:
            self._send(call_id, result)


class _Reply:
    """Answers one call; a second answer is ignored."""

    __slots__ = ("_call_id", "_intake")

    def __init__(self, intake: Intake, call_id: int) -> None:
        self._intake: Intake | None = intake
        self._call_id = call_id

    def __call__(self, result: Result) -> None:
        intake, self._intake = self._intake, None
        if intake is not None:
            intake.answer(self._call_id, result)
