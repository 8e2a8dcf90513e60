"""A worker's queue: which calls wait, for how long, and which are computed together.

Life of a call of another process:

1. `submit` checks it against the fence (`fence`) and the bounds of the queue. A call that does not
   pass is refused at once, with the reason.
2. It waits. Calls of several routers to experts of one layer become one batch. If another router is
   about to ask for the same layer, the call waits a short time for that router (`co_arrival`).
3. `serve` computes it (`call_runner`), unless its deadline has passed, and replies.

Copies of KV blocks do not wait here: they go to the router of this process, which has the blocks.
Nor do calls of that router: they go to `direct`.

No clock, no thread, no socket: time comes from `Tasks`, calls from transports, arrays from shards.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from milliways.runtime.tasks import Signal, Tasks
from milliways.wire.calls import Call, Fence, Refusal, Result, RunExperts, StoreBlocks
from milliways.wire.errors import RefusalReason
from milliways.wire.view import WorkerState
from milliways.workers.call_runner import (
    AttentionRunner,
    CallRunner,
    ExpertRunner,
    FencedCall,
    SteppedAttention,
)
from milliways.workers.co_arrival import CoArrival
from milliways.workers.fence import WorkerFence

Reply = Callable[[Result], None]
# Takes a call in and replies once, sooner or later.
KeepCopies = Callable[[StoreBlocks, Reply], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreLimits:
    """Bounds of what is computed at once, and of what waits, for experts and attention each."""

    max_waiting_calls: int = 256
    max_waiting_rows: int = 16384
    max_merged_rows: int = 1024
    # How long a call may wait for another router's, as a fraction of the last computation's time,
    # which is also what merging saves. 0 disables waiting.
    patience: float = 0.5
    patience_s_max: float = 0.02


@dataclass(slots=True, eq=False)
class _Waiting:
    fenced: FencedCall
    reply: Reply
    deadline_s: float | None
    # It waits for these routers until then; once as long again, if one of them is seen to come.
    patient_until_s: float = 0.0
    awaited: Sequence[str] = ()
    has_seen_one: bool = False

    @property
    def call(self) -> Call:
        return self.fenced.call

    @property
    def router_id(self) -> str:
        return self.fenced.fence.router_id

    @property
    def num_rows(self) -> int:
        return self.fenced.num_rows


class WorkerCore:
    """Owns a worker's fence and the queue of other processes' calls.

    Used from the compute thread, except for `direct`, which belongs to the thread of the router in
    this process, for `in_steps`, which belongs to the thread of compiled steps, and for
    `has_co_arrivals` and the counts, which any thread may read.

    Invariant: `_num_waiting_rows` is the sum of the rows in `_queue`; every call in `_queue` is
    replied to once.
    """

    def __init__(
        self,
        worker_id: str,
        incarnation: int,
        experts: ExpertRunner,
        attention: AttentionRunner | None,
        tasks: Tasks,
        limits: CoreLimits | None = None,
    ) -> None:
        """`attention` is for `attach`."""
        self.fence = WorkerFence(worker_id, incarnation)
        self.direct = CallRunner(self.fence, experts)
        self.in_steps = CallRunner(self.fence, experts)
        self.queued = CallRunner(self.fence, experts)
        self._tasks = tasks
        self._limits = limits or CoreLimits()
        self._keep_copies: KeepCopies | None = None
        self._queue: deque[_Waiting] = deque()
        self._num_waiting_rows = 0
        self._arrived = Signal()
        self._co_arrival = CoArrival()
        # How long the last computation of experts took.
        self._took_s = 0.0
        self.attach(attention)

    @property
    def worker_id(self) -> str:
        return self.fence.worker_id

    @property
    def incarnation(self) -> int:
        return self.fence.incarnation

    @property
    def state(self) -> WorkerState:
        return self.fence.state

    @property
    def max_merged_rows(self) -> int:
        """The most rows that are computed together."""
        return self._limits.max_merged_rows

    @property
    def num_calls(self) -> int:
        return self.direct.num_calls + self.in_steps.num_calls + self.queued.num_calls

    @property
    def num_merged_calls(self) -> int:
        return self.direct.num_merged_calls + self.queued.num_merged_calls

    @property
    def num_rows(self) -> int:
        return self.direct.num_rows + self.queued.num_rows

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    def attach(self, attention: AttentionRunner | None) -> None:
        """Gives an attention shard to all callers, if one thread runs everything.

        Otherwise the shard is attached to the one runner whose thread uses it, in that thread.
        """
        stepped = SteppedAttention(attention) if attention is not None else None
        self.direct.attach(stepped)
        self.queued.attach(stepped)

    def attach_copies(self, keep_copies: KeepCopies) -> None:
        """Sets what keeps the KV blocks that other routers send. Without it they are refused."""
        self._keep_copies = keep_copies

    def submit(self, call: Call, fence: Fence, reply: Reply) -> None:
        """Queues a call, or refuses it at once."""
        if isinstance(call, StoreBlocks):
            self._store(call, fence, reply)
            return
        refusal = self.queued.fault_of(call, fence) or self._room_fault(call)
        if refusal is not None:
            reply(refusal)
            return
        now_s = self._tasks.clock.now_s()
        deadline_s = now_s + fence.timeout_s if fence.timeout_s > 0 else None
        waiting = _Waiting(FencedCall(call, fence), reply, deadline_s)
        if isinstance(call, RunExperts):
            self._be_patient(waiting, call.layer, now_s)
        self._queue.append(waiting)
        self._num_waiting_rows += waiting.num_rows
        self._arrived.notify()

    def has_co_arrivals(self, router_id: str) -> bool:
        """Whether calls of a router may meet those of another: then they are better queued."""
        return self._co_arrival.others(router_id)

    def router_gone(self, router_id: str) -> None:
        """Forgets the batches of a router whose last stream broke.

        Its calls stay in the queue: the router may have come back over another stream. What it
        asked over the old one is refused, or computed for nothing.
        """
        self._co_arrival.left(router_id)
        self.queued.release(router_id)

    async def serve(self) -> None:
        """Computes what waits, for ever."""
        while True:
            while self._queue:
                first, wait_s = self._choose()
                if first is None:
                    await self._tasks.wait_for(self._arrived.wait(), wait_s)
                    continue
                self._compute_next(first)
                # What arrived meanwhile comes in before the next choice, and may join it.
                await self._tasks.sleep(0)
            await self._arrived.wait()

    def _store(self, call: StoreBlocks, fence: Fence, reply: Reply) -> None:
        refusal = self.fence.fault_of(fence)
        if refusal is not None:
            reply(refusal)
        elif self._keep_copies is None:
            reply(self.fence.refuse(RefusalReason.NOT_HELD, "no copies are kept here"))
        else:
            self._keep_copies(call, reply)

    def _be_patient(self, waiting: _Waiting, layer: int, now_s: float) -> None:
        """Makes a call wait for the calls of other routers that will soon reach its layer."""
        self._co_arrival.came(waiting.router_id, layer)
        waiting.awaited = self._co_arrival.awaited(waiting.router_id, layer)
        if waiting.awaited:
            waiting.patient_until_s = now_s + self._patience_s

    @property
    def _patience_s(self) -> float:
        return min(self._limits.patience * self._took_s, self._limits.patience_s_max)

    def _choose(self) -> tuple[_Waiting | None, float]:
        """The first call that need not wait, or None and how long until there is one."""
        now_s = self._tasks.clock.now_s()
        wait_s = float("inf")
        for waiting in self._queue:
            if waiting.patient_until_s <= now_s or self._has_met(waiting):
                return waiting, 0.0
            wait_s = min(wait_s, waiting.patient_until_s - now_s)
        return None, wait_s

    def _has_met(self, waiting: _Waiting) -> bool:
        """Whether all routers that a call waits for are here, at its layer."""
        here = {other.router_id for other in self._queue if _can_join(waiting.call, other.call)}
        return here.issuperset(waiting.awaited)

    def _compute_next(self, first: _Waiting) -> None:
        self._queue.remove(first)
        batch = [first, *self._joining(first)]
        self._num_waiting_rows -= sum(waiting.num_rows for waiting in batch)
        now_s = self._tasks.clock.now_s()
        here = {waiting.router_id for waiting in batch}
        for router_id in set(first.awaited) - here:
            self._co_arrival.waited_without_result(router_id)
        alive: list[_Waiting] = []
        for waiting in batch:
            refusal = self._late_fault(waiting, now_s)
            if refusal is None:
                alive.append(waiting)
            else:
                waiting.reply(refusal)
        if alive:
            results = self.queued.run([waiting.fenced for waiting in alive])
            for waiting, result in zip(alive, results, strict=True):
                waiting.reply(result)
        if isinstance(first.call, RunExperts):
            self._took_s = self._tasks.clock.now_s() - now_s
            self._stay_patient(here)

    def _late_fault(self, waiting: _Waiting, now_s: float) -> Refusal | None:
        """Why a call is not computed that was valid when it came, if it is not."""
        if waiting.deadline_s is not None and waiting.deadline_s < now_s:
            return self.fence.refuse(RefusalReason.EXPIRED, "its deadline has passed")
        # A new placement may have taken experts away while it waited.
        return self.fence.fault_of(waiting.fenced.fence)

    def _stay_patient(self, here: set[str]) -> None:
        """What was computed just now may have been the last call before the one waited for."""
        for waiting in self._queue:
            if not waiting.has_seen_one and here.intersection(waiting.awaited):
                waiting.has_seen_one = True
                waiting.patient_until_s = self._tasks.clock.now_s() + self._patience_s

    def _joining(self, first: _Waiting) -> list[_Waiting]:
        """Calls to the experts of the same layer, taken out of the queue."""
        if not isinstance(first.call, RunExperts):
            return []
        joining: list[_Waiting] = []
        kept: deque[_Waiting] = deque()
        num_rows = first.num_rows
        for waiting in self._queue:
            fits = num_rows + waiting.num_rows <= self._limits.max_merged_rows
            if _can_join(first.call, waiting.call) and fits:
                joining.append(waiting)
                num_rows += waiting.num_rows
            else:
                kept.append(waiting)
        self._queue = kept
        return joining

    def _room_fault(self, call: Call) -> Refusal | None:
        """Why there is no room for a call, if there is none.

        Experts and attention have a bound each: calls to one must not crowd out the other. A batch
        that cannot go on would stop a router, for whose experts other workers may be waiting.
        """
        is_experts = isinstance(call, RunExperts)
        num_calls = sum(isinstance(w.call, RunExperts) is is_experts for w in self._queue)
        num_rows = len(call.rows_TD) if isinstance(call, RunExperts) else 0
        has_room = (
            num_calls < self._limits.max_waiting_calls
            and self._num_waiting_rows + num_rows <= self._limits.max_waiting_rows
        )
        if has_room:
            return None
        message = f"{num_calls} calls with {self._num_waiting_rows} rows wait"
        return self.fence.refuse(RefusalReason.OVERLOADED, message)


def _can_join(first: Call, other: Call) -> bool:
    return (
        isinstance(first, RunExperts)
        and isinstance(other, RunExperts)
        and other.layer == first.layer
        and other.expert_ids_TA.shape[1] == first.expert_ids_TA.shape[1]
    )
