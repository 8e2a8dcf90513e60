"""A worker's decisions: which calls are valid, which wait, which are computed together.

Life of a call:

1. `submit` holds it against the fence, the state and the bound of the queue; what does not fit is
   refused at once, with the reason.
2. It waits. Experts of one layer that several routers ask for meanwhile become one batch; where
   another router is about to ask for them, it waits for that a little (see `company`).
3. `serve` computes it, unless its deadline has passed, and replies.

Copies of KV blocks do not wait here: they are for the router of this process, who has the blocks.

No clock, no thread, no socket: time comes from `Tasks`, calls from transports, arrays from shards.
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from milliways.runtime.tasks import Signal, Tasks
from milliways.wire.calls import (
    AbandonBatch,
    Abandoned,
    AdvanceBatch,
    BeginBatch,
    Call,
    ExpertOutputs,
    Fence,
    Refusal,
    Result,
    RunExperts,
    StoreBlocks,
    Turn,
)
from milliways.wire.errors import RefusalReason
from milliways.wire.view import WORKER_MOVES, WorkerState
from milliways.workers.co_arrival import CoArrival

logger = logging.getLogger(__name__)

Reply = Callable[[Result], None]
# Takes a call in and replies once, sooner or later.
KeepCopies = Callable[[StoreBlocks, Reply], None]


class ExpertRunner(Protocol):
    """Experts held here."""

    def fault_of(self, call: RunExperts) -> Refusal | None:
        """Why a call cannot be computed here, if it cannot."""
        ...

    def run(self, call: RunExperts) -> np.ndarray:
        """Outputs [N, D], a row for each id that is not -1, in row-major order."""
        ...


class AttentionRunner(Protocol):
    """An attention shard held here, with the KV blocks of one router's sequences at a time."""

    def begin(self, owner: tuple[str, int], call: BeginBatch) -> Turn | Refusal: ...

    def advance(self, owner: tuple[str, int], call: AdvanceBatch) -> Turn | Refusal: ...

    def abandon(self, owner: tuple[str, int], batch_id: int) -> None: ...

    def release(self, router_id: str) -> None:
        """Forgets the batches of a router that is gone; its blocks mean nothing any more."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreLimits:
    """Bounds of what is computed at once, and of what waits, for experts and attention each."""

    max_waiting_calls: int = 256
    max_waiting_rows: int = 16384
    max_merged_rows: int = 1024
    # How long a call may wait for another router's: a part of what computing took last, and so of
    # what is gained. 0: never.
    patience: float = 0.5
    patience_s_max: float = 0.02


@dataclass(slots=True, eq=False)
class _Waiting:
    call: Call
    fence: Fence
    reply: Reply
    deadline_s: float | None
    # Until when it waits for these routers; once more as long, if one of them is seen to come.
    patient_until_s: float = 0.0
    awaited: Sequence[str] = ()
    has_seen_one: bool = False

    @property
    def num_rows(self) -> int:
        return len(self.call.rows_TD) if isinstance(self.call, RunExperts) else 0


class WorkerCore:
    """Owns a worker's state, its fence and its queue."""

    def __init__(
        self,
        worker_id: str,
        incarnation: int,
        experts: ExpertRunner,
        attention: AttentionRunner | None,
        tasks: Tasks,
        limits: CoreLimits | None = None,
    ) -> None:
        self.worker_id = worker_id
        self.incarnation = incarnation
        self.state = WorkerState.LOADING
        self.placement_epoch = 0
        self.num_calls = 0
        self.num_rows = 0
        self.num_merged_calls = 0
        self._experts = experts
        self._attention = attention
        self._tasks = tasks
        self._limits = limits or CoreLimits()
        self._keep_copies: KeepCopies | None = None
        self._queue: deque[_Waiting] = deque()
        self._num_waiting_rows = 0
        self._arrived = Signal()
        self._co_arrival = CoArrival()
        self._took_s = 0.0
        # Of each router the newest life and step whose batches came to the attention shard.
        self._newest_steps: dict[str, tuple[int, int]] = {}

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    def move(self, to: WorkerState) -> None:
        """The one door between states."""
        assert to in WORKER_MOVES[self.state], f"{self.state} -> {to}"
        self.state = to

    def attach(self, attention: AttentionRunner | None) -> None:
        """Takes in the attention shard, which is there only after loading."""
        self._attention = attention

    def attach_copies(self, keep_copies: KeepCopies) -> None:
        """Has KV blocks that other routers send taken in; refused else."""
        self._keep_copies = keep_copies

    def raise_epoch(self, placement_epoch: int) -> None:
        """From now on refuses callers that act on an older placement."""
        self.placement_epoch = max(self.placement_epoch, placement_epoch)

    def submit(self, call: Call, fence: Fence, reply: Reply) -> None:
        """Queues a call, or refuses it at once."""
        refusal = self._fault_of(call, fence) or self._lack_of_room(call)
        if refusal is not None:
            reply(refusal)
            return
        if isinstance(call, StoreBlocks):
            assert self._keep_copies is not None
            self._keep_copies(call, reply)
            return
        now_s = self._tasks.clock.now_s()
        deadline_s = now_s + fence.timeout_s if fence.timeout_s > 0 else None
        waiting = _Waiting(call, fence, reply, deadline_s)
        if isinstance(call, RunExperts):
            self._be_patient(waiting, call.layer, now_s)
        self._queue.append(waiting)
        self._num_waiting_rows += waiting.num_rows
        self._arrived.notify()

    def has_co_arrivals(self, router_id: str) -> bool:
        """Whether calls of a router may meet those of another: then they are better queued."""
        return self._co_arrival.others(router_id)

    def compute_now(self, call: Call, fence: Fence) -> Result:
        """Computes a call of this very process at once, past the queue; or refuses it."""
        results: list[Result] = []
        refusal = self._fault_of(call, fence)
        if refusal is not None:
            return refusal
        self._compute([_Waiting(call, fence, results.append, None)])
        return results[0]

    def router_gone(self, router_id: str) -> None:
        """Forgets the batches of a router whose stream broke.

        Its calls stay in the queue: it may have come back by another stream, and what it asked for
        by the old one is refused or computed in vain.
        """
        self._co_arrival.left(router_id)
        if self._attention is not None:
            self._attention.release(router_id)

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

    def _be_patient(self, waiting: _Waiting, layer: int, now_s: float) -> None:
        """Has a call wait for those of other routers that are behind its own."""
        router_id = waiting.fence.router_id
        self._co_arrival.came(router_id, layer)
        waiting.awaited = self._co_arrival.awaited(router_id, layer)
        if waiting.awaited:
            waiting.patient_until_s = now_s + self._patience_s

    @property
    def _patience_s(self) -> float:
        return min(self._limits.patience * self._took_s, self._limits.patience_s_max)

    def _choose(self) -> tuple[_Waiting | None, float]:
        """The first call that need not wait; else how long until the first of them has waited."""
        now_s = self._tasks.clock.now_s()
        wait_s = float("inf")
        for waiting in self._queue:
            if waiting.patient_until_s <= now_s or self._has_met(waiting):
                return waiting, 0.0
            wait_s = min(wait_s, waiting.patient_until_s - now_s)
        return None, wait_s

    def _has_met(self, waiting: _Waiting) -> bool:
        """Whether all whom a call waits for are here, at its layer."""
        here = {
            other.fence.router_id for other in self._queue if _can_join(waiting.call, other.call)
        }
        return here.issuperset(waiting.awaited)

    def _compute_next(self, first: _Waiting) -> None:
        self._queue.remove(first)
        batch = [first, *self._joining(first)]
        self._num_waiting_rows -= sum(waiting.num_rows for waiting in batch)
        now_s = self._tasks.clock.now_s()
        here = {waiting.fence.router_id for waiting in batch}
        for router_id in set(first.awaited) - here:
            self._co_arrival.waited_without_result(router_id)
        alive: list[_Waiting] = []
        for waiting in batch:
            if waiting.deadline_s is not None and waiting.deadline_s < now_s:
                refusal = self._refuse(RefusalReason.EXPIRED, "nobody waits any more")
            else:
                # A new placement may have taken experts away while it waited.
                refusal = self._fence_fault(waiting.fence)
            if refusal is None:
                alive.append(waiting)
            else:
                waiting.reply(refusal)
        if alive:
            self._compute(alive)
        if isinstance(first.call, RunExperts):
            self._took_s = self._tasks.clock.now_s() - now_s
            self._stay_patient(here)

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

    def _compute(self, batch: Sequence[_Waiting]) -> None:
        self.num_calls += len(batch)
        self.num_merged_calls += len(batch) - 1
        self.num_rows += sum(waiting.num_rows for waiting in batch)
        try:
            results = self._results(batch)
        except Exception as error:
            logger.exception("%s failed to compute", self.worker_id)
            if len(batch) > 1:
                # One of them is at fault: it must not fail the others, of other routers.
                for waiting in batch:
                    self._compute([waiting])
                return
            results = [self._refuse(RefusalReason.FAULT, repr(error))]
        for waiting, result in zip(batch, results, strict=True):
            waiting.reply(result)

    def _results(self, batch: Sequence[_Waiting]) -> list[Result]:
        calls = [waiting.call for waiting in batch if isinstance(waiting.call, RunExperts)]
        if calls:
            return list(_run_merged(self._experts, calls))
        assert self._attention is not None
        call, fence = batch[0].call, batch[0].fence
        if not isinstance(call, AbandonBatch) and not self._is_of_newest_step(fence):
            return [self._refuse(RefusalReason.EXPIRED, "a later step has begun")]
        owner = (fence.router_id, fence.router_incarnation)
        match call:
            case BeginBatch():
                return [self._attention.begin(owner, call)]
            case AdvanceBatch():
                return [self._attention.advance(owner, call)]
            case AbandonBatch():
                self._attention.abandon(owner, call.batch_id)
                return [Abandoned()]
            case RunExperts() | StoreBlocks():
                raise AssertionError

    def _is_of_newest_step(self, fence: Fence) -> bool:
        """Whether a router has not begun a later step; earlier ones' batches are forgotten.

        A router that gave a step up may have handed the blocks to other sequences, while calls of
        that step are still on their way by a stream that it left: they must not write there.
        """
        assert self._attention is not None
        step = (fence.router_incarnation, fence.step)
        newest = self._newest_steps.get(fence.router_id, (0, 0))
        if step > newest:
            self._newest_steps[fence.router_id] = step
            self._attention.release(fence.router_id)
        return step >= newest

    def _fault_of(self, call: Call, fence: Fence) -> Refusal | None:
        """Why a call is refused before it waits, if it is."""
        refusal = self._fence_fault(fence)
        if refusal is not None:
            return refusal
        if isinstance(call, RunExperts):
            return self._experts.fault_of(call)
        if isinstance(call, StoreBlocks) and self._keep_copies is None:
            return self._refuse(RefusalReason.NOT_HELD, "no copies are kept here")
        if self._attention is None:
            return self._refuse(RefusalReason.NOT_HELD, "no attention shard here")
        return None

    def _fence_fault(self, fence: Fence) -> Refusal | None:
        if fence.incarnation != self.incarnation:
            message = f"incarnation {fence.incarnation} is meant, this is {self.incarnation}"
            return self._refuse(RefusalReason.STALE_INCARNATION, message)
        if fence.placement_epoch < self.placement_epoch:
            message = f"placement {fence.placement_epoch} is older than {self.placement_epoch}"
            return self._refuse(RefusalReason.STALE_EPOCH, message)
        if self.state not in (WorkerState.READY, WorkerState.DRAINING):
            return self._refuse(RefusalReason.NOT_HELD, f"the worker is {self.state.value}")
        return None

    def _lack_of_room(self, call: Call) -> Refusal | None:
        """Experts and attention each have a bound: what asks for one must not crowd out the other.

        A batch that cannot go on would keep a router, which has others wait, from all it does.
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
        return self._refuse(RefusalReason.OVERLOADED, message)

    def _refuse(self, reason: RefusalReason, message: str) -> Refusal:
        return Refusal(reason, message, self.placement_epoch)


def _can_join(first: Call, other: Call) -> bool:
    return (
        isinstance(first, RunExperts)
        and isinstance(other, RunExperts)
        and other.layer == first.layer
        and other.expert_ids_TA.shape[1] == first.expert_ids_TA.shape[1]
    )


def _run_merged(experts: ExpertRunner, calls: Sequence[RunExperts]) -> list[ExpertOutputs]:
    """One computation for all calls; rows do not see each other, so each gets its own bits."""
    if len(calls) == 1:
        return [ExpertOutputs(experts.run(calls[0]))]
    merged = RunExperts(
        layer=calls[0].layer,
        rows_TD=np.concatenate([call.rows_TD for call in calls]),
        expert_ids_TA=np.concatenate([call.expert_ids_TA for call in calls]),
    )
    ends = np.cumsum([call.num_assignments for call in calls])
    parts = np.split(experts.run(merged), ends[:-1])
    return [ExpertOutputs(part) for part in parts]
