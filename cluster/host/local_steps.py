"""The thread in which a worker computes compiled steps for the router of its own process.

Such a step waits for other workers inside the program, and the router has to answer it meanwhile
(`router.step_exchange`). So it runs in a thread of its own, which owns the attention shard.
"""

from collections import deque
from collections.abc import Callable
from selectors import EVENT_READ

import numpy as np

from milliways.router.block_copies import KeysAndValues
from milliways.router.step_exchange import StepExchange
from milliways.runtime.clock import SystemClock
from milliways.runtime.reactor import Reactor
from milliways.runtime.tasks import Pending
from milliways.wire.calls import (
    AbandonBatch,
    Abandoned,
    BeginBatch,
    Call,
    Fence,
    Refusal,
    Result,
    StoreBlocks,
)
from milliways.wire.errors import RefusalReason
from milliways.wire.exchange import ExchangeNode
from milliways.workers.call_runner import SteppedAttention
from milliways.workers.core import WorkerCore
from milliways.workers.kv_arrays import KvArrays

# Copied blocks that the thread has not written yet; one call with copies more may be taken in.
MAX_WAITING_BYTES = 64 << 20
# A block's number, its tokens, keys and values.
CopiedBlock = tuple[int, np.ndarray, np.ndarray, np.ndarray]


class LocalSteps:
    """Owns that thread. Its other methods are for the router's thread.

    Calls are computed in the order in which they come, so a step sees what was written before it.
    """

    def __init__(
        self,
        node: ExchangeNode,
        core: WorkerCore,
        routing: Reactor,
        on_fault: Callable[[BaseException], None] | None = None,
    ) -> None:
        """`on_fault` is told of errors in the thread: without it the router would wait for ever."""
        self._node = node
        self._core = core
        self._steps = Reactor(SystemClock(), on_fault=on_fault, name=f"{core.worker_id}-steps")
        self._routing = routing
        self._waiting_blocks: deque[CopiedBlock] = deque()
        # Set by `attach`, before the first step.
        self._exchange: StepExchange | None = None
        self._is_compiled = False
        self._steps.start()

    def attach(self, exchange: StepExchange) -> None:
        """Looks at what is missing whenever the node says that something is."""
        self._exchange = exchange
        self._routing.register(self._node.event_fd, EVENT_READ, self._on_event)
        self._routing.tasks.start_service(exchange.serve())

    def take_shard(self, shard: SteppedAttention, is_compiled: bool) -> None:
        """Gives the attention shard to the thread; from any other thread.

        `is_compiled` says whether the shard computes whole steps, with the exchange in them.
        """
        self._is_compiled = is_compiled
        self._steps.call(lambda: self._core.in_steps.attach(shard))

    def submit(self, call: Call, fence: Fence, reply: Callable[[Result], None]) -> None:
        """Computes a call to the attention shard, and replies in the router's thread."""
        if isinstance(call, AbandonBatch) and self._is_compiled:
            # Its program may be running: it ends soon, because its exchanges return at once.
            self._node.give_up(call.batch_id)
            reply(Abandoned())
            return
        is_cautious = self._exchange is not None and self._exchange.is_cautious

        def compute() -> None:
            result = self._compute(call, fence, is_cautious)
            self._routing.post(lambda: reply(result))

        self._steps.post(compute)

    def blocks_of(self, kv: KvArrays) -> "BlocksInSteps":
        """The blocks of the shard, for the router's thread."""
        return BlocksInSteps(kv, self._steps, self._routing, self._waiting_blocks)

    def release(self, router_id: str) -> None:
        """Forgets the batches of a router that is gone."""
        self._steps.post(lambda: self._core.in_steps.release(router_id))

    def close(self) -> None:
        """Gives all steps up and ends the thread; from another thread than the router's."""
        self._node.give_up(_ALL_BATCHES)
        self._steps.close()

    def _compute(self, call: Call, fence: Fence, is_cautious: bool) -> Result:
        if not isinstance(call, BeginBatch) or not self._is_compiled:
            return self._core.in_steps.compute_now(call, fence)
        if self._node.given_up >= call.batch_id:
            return self._core.fence.refuse(RefusalReason.EXPIRED, "the batch was abandoned")
        self._node.begin(call.batch_id, is_cautious)
        try:
            return self._core.in_steps.compute_now(call, fence)
        finally:
            self._node.end()

    def _on_event(self, events: int) -> None:
        self._node.clear_event()
        assert self._exchange is not None
        self._exchange.look()


class BlocksInSteps:
    """`BlockArrays` of a shard that the thread of steps owns.

    Invariant: `waiting` has the copied blocks that the thread has not written yet, in order; for
    each of them a call is posted. Their bytes are bounded: a step may wait for experts for long.
    """

    def __init__(
        self, kv: KvArrays, steps: Reactor, routing: Reactor, waiting: "deque[CopiedBlock]"
    ) -> None:
        self._kv = kv
        self._steps = steps
        self._routing = routing
        self._waiting = waiting

    @property
    def first_layer(self) -> int:
        return self._kv.first_layer

    @property
    def block_bytes(self) -> int:
        return self._kv.block_bytes

    def blocks_fault(self, call: StoreBlocks) -> Refusal | None:
        if len(self._waiting) * self._kv.block_bytes >= MAX_WAITING_BYTES:
            text = f"{len(self._waiting)} copied blocks wait for a step to end"
            return Refusal(RefusalReason.OVERLOADED, text)
        return self._kv.blocks_fault(call)

    def read_blocks(self, block_ids: tuple[int, ...]) -> Pending[KeysAndValues]:
        """Before the next step, and after the one that is computed now."""
        pending: Pending[KeysAndValues] = Pending()

        def read() -> None:
            blocks = self._kv.read_blocks(block_ids)
            self._routing.post(lambda: pending.resolve(blocks))

        self._steps.post(read)
        return pending

    def write_block(
        self,
        block_id: int,
        token_ids_P: np.ndarray,
        keys_LPRK: np.ndarray,
        values_LPRK: np.ndarray,
    ) -> None:
        # Copied now: the sender may write there again before the thread comes to it.
        self._waiting.append((block_id, token_ids_P.copy(), keys_LPRK.copy(), values_LPRK.copy()))
        self._steps.post(lambda: self._kv.write_block(*self._waiting.popleft()))


_ALL_BATCHES = (1 << 63) - 1
