"""Runs valid calls on the shards of a worker.

A worker computes in two threads: for the router of its own process in that router's thread, for
routers of other processes in the compute thread. Each thread has a `CallRunner` of its own. Both
read the same experts, which they cannot change. An attention shard is attached to the one runner
whose thread uses it (docs/ARCHITECTURE.md, Threads).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

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
from milliways.workers.fence import WorkerFence

logger = logging.getLogger(__name__)


class ExpertsMissingError(Exception):
    """Experts were unloaded after `fault_of` passed a call and before the call was computed."""


class ExpertRunner(Protocol):
    """Experts held here; may be used by several threads at a time."""

    def fault_of(self, call: RunExperts) -> Refusal | None:
        """Why a call cannot be computed here, if it cannot."""
        ...

    def run(self, call: RunExperts) -> np.ndarray:
        """Outputs [N, D], a row for each id that is not -1, in row-major order.

        Raises:
            ExpertsMissingError: some of them are not here any more.
        """
        ...


class AttentionRunner(Protocol):
    """An attention shard held here, with the KV blocks of one router's sequences at a time."""

    def begin(self, owner: tuple[str, int], call: BeginBatch) -> Turn | Refusal: ...

    def advance(self, owner: tuple[str, int], call: AdvanceBatch) -> Turn | Refusal: ...

    def abandon(self, owner: tuple[str, int], batch_id: int) -> None: ...

    def release(self, router_id: str) -> None:
        """Forgets the batches of a router that is gone; its blocks mean nothing any more."""
        ...


@dataclass(frozen=True, slots=True)
class FencedCall:
    """A call and what makes it valid."""

    call: Call
    fence: Fence

    @property
    def num_rows(self) -> int:
        """Rows for experts."""
        return len(self.call.rows_TD) if isinstance(self.call, RunExperts) else 0


class SteppedAttention:
    """An attention shard that computes each router's newest step only; for one thread.

    A router that gave a step up may have handed the blocks to other sequences, while calls of that
    step are still on their way over a stream that the router left. They must not write there.
    """

    def __init__(self, shard: AttentionRunner) -> None:
        self._shard = shard
        # The newest incarnation and step of each router. Invariant: an entry only grows.
        self._newest_steps: dict[str, tuple[int, int]] = {}

    def run(self, call: Call, fence: Fence) -> Result | None:
        """The result of a call; None if its router has begun a later step."""
        owner = (fence.router_id, fence.router_incarnation)
        if isinstance(call, AbandonBatch):
            self._shard.abandon(owner, call.batch_id)
            return Abandoned()
        if not self._enter_step(fence):
            return None
        if isinstance(call, BeginBatch):
            return self._shard.begin(owner, call)
        assert isinstance(call, AdvanceBatch)
        return self._shard.advance(owner, call)

    def release(self, router_id: str) -> None:
        """Forgets the batches of a router that is gone."""
        self._shard.release(router_id)

    def _enter_step(self, fence: Fence) -> bool:
        """Whether a call is of its router's newest step; a new one ends the batches before it."""
        step = (fence.router_incarnation, fence.step)
        newest = self._newest_steps.get(fence.router_id, (0, 0))
        if step > newest:
            self._newest_steps[fence.router_id] = step
            self._shard.release(fence.router_id)
        return step >= newest


class CallRunner:
    """Computes calls in one thread, and counts them. Other threads may read the counts."""

    def __init__(self, fence: WorkerFence, experts: ExpertRunner) -> None:
        self.num_calls = 0
        self.num_rows = 0
        self.num_merged_calls = 0
        self._fence = fence
        self._experts = experts
        self._attention: SteppedAttention | None = None

    def attach(self, attention: SteppedAttention | None) -> None:
        """Takes an attention shard, which is there only after loading."""
        self._attention = attention

    def fault_of(self, call: Call, fence: Fence) -> Refusal | None:
        """Why a call is refused before it is computed, if it is."""
        refusal = self._fence.fault_of(fence)
        if refusal is not None:
            return refusal
        if isinstance(call, RunExperts):
            return self._experts.fault_of(call)
        if self._attention is None:
            message = "no attention shard for this caller here"
            return self._fence.refuse(RefusalReason.NOT_HELD, message)
        return None

    def compute_now(self, call: Call, fence: Fence) -> Result:
        """Computes a call at once, or refuses it."""
        return self.fault_of(call, fence) or self.run([FencedCall(call, fence)])[0]

    def run(self, batch: Sequence[FencedCall]) -> list[Result]:
        """Results of one call, or of several to experts of one layer, which become one sweep."""
        self.num_calls += len(batch)
        self.num_merged_calls += len(batch) - 1
        self.num_rows += sum(fenced.num_rows for fenced in batch)
        try:
            return self._results(batch)
        except Exception as error:
            if isinstance(error, ExpertsMissingError):
                refusal = self._fence.refuse(RefusalReason.NOT_HELD, str(error))
            else:
                logger.exception("%s failed to compute", self._fence.worker_id)
                refusal = self._fence.refuse(RefusalReason.FAULT, repr(error))
            if len(batch) == 1:
                return [refusal]
            # One of them is at fault: it must not fail the others, of other routers.
            return [self.run([fenced])[0] for fenced in batch]

    def release(self, router_id: str) -> None:
        """Forgets the batches of a router that is gone."""
        if self._attention is not None:
            self._attention.release(router_id)

    def _results(self, batch: Sequence[FencedCall]) -> list[Result]:
        calls = [fenced.call for fenced in batch if isinstance(fenced.call, RunExperts)]
        if calls:
            return list(_run_merged(self._experts, calls))
        assert self._attention is not None
        call, fence = batch[0].call, batch[0].fence
        assert not isinstance(call, StoreBlocks)
        result = self._attention.run(call, fence)
        if result is None:
            result = self._fence.refuse(RefusalReason.EXPIRED, "a later step has begun")
        return [result]


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
