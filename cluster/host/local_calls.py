"""Calls between the router and the core of one process, without any message."""

import logging
from collections.abc import Callable
from functools import partial

from milliways.cluster.host.local_steps import LocalSteps
from milliways.router.router import Router
from milliways.runtime.reactor import Reactor
from milliways.wire.calls import Call, Fence, Refusal, Result, RunExperts, StoreBlocks
from milliways.wire.errors import RefusalReason
from milliways.workers.core import WorkerCore

logger = logging.getLogger(__name__)

# Calls with copies of KV blocks that the router has not looked at.
MAX_WAITING_COPIES = 8


class LocalCore:
    """The core of this process as its router calls it, in the router's thread.

    A call is computed at once, without the queue. Only calls to experts are queued, while routers
    of other processes call experts as well: in the queue, calls to one layer become one batch,
    which reads the weights once. With `steps`, calls to the attention shard go to that thread.
    """

    def __init__(
        self,
        core: WorkerCore,
        compute: Reactor,
        routing: Reactor,
        steps: LocalSteps | None = None,
    ) -> None:
        self._core = core
        self._steps = steps
        self._compute = compute
        self._routing = routing

    def submit(self, call: Call, fence: Fence, reply: Callable[[Result], None]) -> None:
        if isinstance(call, RunExperts) and self._core.has_co_arrivals(fence.router_id):
            self._compute.post(lambda: self._queue(call, fence, partial(self._post, reply)))
        elif self._steps is not None and not isinstance(call, RunExperts | StoreBlocks):
            self._steps.submit(call, fence, reply)
        else:
            reply(self._core.direct.compute_now(call, fence))

    def router_gone(self, router_id: str) -> None:
        if self._steps is not None:
            self._steps.release(router_id)
        else:
            self._core.direct.release(router_id)
        self._compute.post(lambda: self._core.router_gone(router_id))

    def _queue(self, call: Call, fence: Fence, reply: Callable[[Result], None]) -> None:
        try:
            self._core.submit(call, fence, reply)
        except Exception as error:
            logger.exception("the core failed to take a call of %s", fence.router_id)
            reply(Refusal(RefusalReason.FAULT, repr(error)))

    def _post(self, reply: Callable[[Result], None], result: Result) -> None:
        self._routing.post(lambda: reply(result))


class LocalBlocks:
    """The KV blocks of this process's router, as the core gives copies to them.

    `keep` is called in the compute thread, which owns the count of waiting calls; the blocks are
    written in the router's thread.
    """

    def __init__(self, router: Router, compute: Reactor, routing: Reactor) -> None:
        self._router = router
        self._compute = compute
        self._routing = routing
        self._num_waiting = 0

    def keep(self, call: StoreBlocks, reply: Callable[[Result], None]) -> None:
        """Makes the router store the blocks soon; refuses at once if too many calls wait."""
        if self._num_waiting >= MAX_WAITING_COPIES:
            text = f"{self._num_waiting} calls with copies wait"
            reply(Refusal(RefusalReason.OVERLOADED, text))
            return
        self._num_waiting += 1
        self._routing.post(lambda: self._store(call, reply))

    def _store(self, call: StoreBlocks, reply: Callable[[Result], None]) -> None:
        try:
            result = self._router.store_blocks(call)
        except Exception as error:
            logger.exception("the router failed to take copies in")
            result = Refusal(RefusalReason.FAULT, repr(error))
        self._compute.post(lambda: self._answer(reply, result))

    def _answer(self, reply: Callable[[Result], None], result: Result) -> None:
        self._num_waiting -= 1
        reply(result)
