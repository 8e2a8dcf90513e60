"""A link to a worker in the same process and thread: it calls the worker's core directly."""

import logging

from milliways.runtime.tasks import Pending
from milliways.wire.calls import Call, Fence, Refusal, Result
from milliways.wire.errors import PeerLostError, RefusalReason
from milliways.wire.links import CallSink

logger = logging.getLogger(__name__)


class DirectLink:
    """Passes calls to a core as they are; arrays are not copied.

    Invariant: `_in_flight` has exactly the calls that the core has not answered; none once closed.
    """

    transport = "direct"
    is_local = True
    exchange_link = 0

    def __init__(self, worker_id: str, sink: CallSink, router_id: str) -> None:
        self._worker_id = worker_id
        self._sink = sink
        self._router_id = router_id
        self._in_flight: set[Pending[Result]] = set()
        self._is_closed = False

    def ask(self, call: Call, fence: Fence) -> Pending[Result]:
        """The returned result is done already if the core answers at once."""
        pending = Pending[Result]()
        if self._is_closed:
            pending.fail(PeerLostError(self._worker_id, "closed"))
            return pending
        self._in_flight.add(pending)
        pending.when_done(lambda: self._in_flight.discard(pending))
        try:
            self._sink.submit(call, fence, pending.resolve)
        except Exception as error:
            # As over any other transport: the caller gets a refusal, and asks another worker.
            logger.exception("the core failed to take a call of %s", fence.router_id)
            pending.resolve(Refusal(RefusalReason.FAULT, repr(error)))
        return pending

    def close(self) -> None:
        """Fails the calls in flight, and informs the core that nobody waits for them."""
        if self._is_closed:
            return
        self._is_closed = True
        for pending in tuple(self._in_flight):
            pending.fail(PeerLostError(self._worker_id, "closed"))
        self._sink.router_gone(self._router_id)
