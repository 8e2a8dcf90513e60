"""The way to a worker in the same process and thread: a call of its core."""

import logging

from milliways.runtime.tasks import Pending
from milliways.wire.calls import Call, Fence, Refusal, Result
from milliways.wire.errors import PeerLostError, RefusalReason
from milliways.wire.links import CallSink

logger = logging.getLogger(__name__)


class DirectLink:
    """Actuator calls to a core as they are, arrays and all."""

    def __init__(self, worker_id: str, sink: CallSink, router_id: str) -> None:
        self._worker_id = worker_id
        self._sink = sink
        self._router_id = router_id
        self._out: set[Pending[Result]] = set()
        self._is_closed = False

    @property
    def transport(self) -> str:
        return "direct"

    def ask(self, call: Call, fence: Fence) -> Pending[Result]:
        """Done when it returns, where the core answers at once."""
        pending = Pending[Result]()
        if self._is_closed:
            pending.fail(PeerLostError(self._worker_id, "closed"))
            return pending
        self._out.add(pending)
        pending.when_done(lambda: self._out.discard(pending))
        try:
            self._sink.submit(call, fence, pending.resolve)
        except Exception as error:
            # As over any other way: the caller learns of it, and asks elsewhere.
            logger.exception("the core failed to take a call of %s", fence.router_id)
            pending.resolve(Refusal(RefusalReason.FAULT, repr(error)))
        return pending

    def close(self) -> None:
        """Fails what the core still has, and tells it that nobody waits for it."""
        if self._is_closed:
            return
        self._is_closed = True
        for pending in tuple(self._out):
            pending.fail(PeerLostError(self._worker_id, "closed"))
        self._sink.router_gone(self._router_id)
