"""Decides what a step computes: continuous batching with chunked prefill, within limits.

A step takes, in this order and within `max_step_tokens`: one token of every sequence that decodes;
a chunk of each sequence in prefill; a chunk of each waiting sequence for which there is a slot and
blocks. If there are no blocks left, the sequence that was admitted last is preempted: it frees its
blocks and is computed again later.

A pure object: no clock, no arrays, no threads.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from milliways.model.block_pool import BlockPool
from milliways.model.errors import InvalidRequestError
from milliways.router.limits import SchedulerLimits
from milliways.router.requests.sequence import Sequence, SequenceStatus


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """A sequence and how many of its tokens this step computes.

    `reaches_end` says whether the step computes all its missing tokens, so that the next token can
    be drawn. `scored` are the positions whose rows score the prompt token after them. Both are set
    when the step is chosen, because the sequence may end while the step is computed.
    """

    sequence: Sequence
    num_tokens: int
    reaches_end: bool = field(init=False)
    scored: range = field(init=False)

    def __post_init__(self) -> None:
        sequence = self.sequence
        end = sequence.num_computed + self.num_tokens
        scored = range(sequence.num_scored, min(end, sequence.request.num_to_score))
        object.__setattr__(self, "reaches_end", self.num_tokens == sequence.num_to_compute)
        object.__setattr__(self, "scored", scored)

    @property
    def wants_token(self) -> bool:
        """Whether the next token is drawn."""
        return self.reaches_end and self.sequence.wants_tokens

    @property
    def num_logits(self) -> int:
        """Rows of logits that it needs; they are its last rows."""
        return len(self.scored) + self.wants_token


class Scheduler:
    """Owns the order of sequences, and which KV blocks each holds.

    Invariant: a sequence is in `_running` exactly while its status is RUNNING, in the order of
    admission, and in `_waiting` while it is WAITING or PREEMPTED. Only running sequences hold
    blocks, and their block tables have room for all positions that were computed. At most
    `max_running` run.
    """

    def __init__(self, pool: BlockPool, limits: SchedulerLimits) -> None:
        self.pool = pool
        self.limits = limits
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def running(self) -> Iterable[Sequence]:
        """Sequences that take part in steps, in the order of their admission."""
        return self._running

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def can_queue(self, num_sequences: int) -> bool:
        """Whether this many more may be added; free slots count, because they are filled next.

        If nothing waits or runs, any number may: a request with more samples than the limit would
        otherwise be refused for ever.
        """
        if self.limits.max_waiting is None or not self.has_work:
            return True
        num_free_slots = self.limits.max_running - len(self._running)
        return len(self._waiting) + num_sequences <= self.limits.max_waiting + num_free_slots

    def add(self, sequence: Sequence, max_tokens: int) -> None:
        """Queues a sequence that will hold at most `max_tokens` tokens.

        Raises:
            InvalidRequestError: the KV cache is too small for it, even if it runs alone.
        """
        self.check_capacity(max_tokens)
        self._waiting.append(sequence)

    def check_capacity(self, max_tokens: int) -> None:
        """Raises InvalidRequestError if the KV cache is too small for this many tokens."""
        capacity_tokens = self.pool.num_blocks * self.pool.block_size
        if max_tokens > capacity_tokens:
            limit = f"at most {capacity_tokens} (the KV cache)"
            raise InvalidRequestError("prompt and completion tokens", max_tokens, limit)

    def schedule(self) -> list[ScheduledSequence]:
        """The next step's work; empty only if there is none."""
        scheduled: list[ScheduledSequence] = []
        budget = self.limits.max_step_tokens
        for sequence in sorted(self._running, key=_is_prefilling):
            # An earlier pass of this loop may have preempted it.
            if sequence.status is SequenceStatus.RUNNING and budget > 0:
                num_tokens = min(sequence.num_to_compute, budget)
                if self._make_room(sequence, num_tokens):
                    scheduled.append(ScheduledSequence(sequence, num_tokens))
                    budget -= num_tokens
        scheduled = [s for s in scheduled if s.sequence.status is SequenceStatus.RUNNING]
        return scheduled + self._admit(budget)

    def schedule_alone(self, sequence: Sequence) -> list[ScheduledSequence]:
        """The next step's work, of this sequence only; empty if there are no blocks for it."""
        if sequence.status is not SequenceStatus.RUNNING:
            self._waiting.remove(sequence)
            self._waiting.appendleft(sequence)
            return self._admit(self.limits.max_step_tokens, max_admitted=1)
        num_tokens = min(sequence.num_to_compute, self.limits.max_step_tokens)
        if not self._make_room(sequence, num_tokens):
            return []
        return [ScheduledSequence(sequence, num_tokens)]

    def computed(self, scheduled: ScheduledSequence) -> None:
        """A step wrote these tokens' keys and values; full blocks can be reused from now on."""
        sequence, block_size = scheduled.sequence, self.pool.block_size
        num_full_before = sequence.num_computed // block_size
        sequence.num_computed += scheduled.num_tokens
        if sequence.num_computed // block_size > num_full_before:
            self.pool.publish(sequence.token_ids[: sequence.num_computed], sequence.block_table)

    def finish(self, sequence: Sequence, status: SequenceStatus) -> None:
        """Ends a sequence that runs or waits, and frees its blocks."""
        if sequence in self._running:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        sequence.move(status)
        self._free_blocks(sequence)

    def start_over(self) -> None:
        """All keys and values are lost: every running sequence is computed again, in its order."""
        for sequence in reversed(self._running[:]):
            self._preempt(sequence)
        self.pool.forget()

    def _admit(self, budget: int, max_admitted: int | None = None) -> list[ScheduledSequence]:
        admitted: list[ScheduledSequence] = []
        while self._waiting and budget > 0 and len(self._running) < self.limits.max_running:
            if len(admitted) == max_admitted:
                break
            sequence = self._waiting[0]
            if self._awaits_sibling(sequence):
                break
            self._reuse_prefix(sequence)
            num_tokens = min(sequence.num_to_compute, budget)
            if not self._try_grow(sequence, num_tokens):
                self._free_blocks(sequence)
                break
            self._waiting.popleft()
            self._running.append(sequence)
            sequence.move(SequenceStatus.RUNNING)
            admitted.append(ScheduledSequence(sequence, num_tokens))
            budget -= num_tokens
        return admitted

    def _awaits_sibling(self, sequence: Sequence) -> bool:
        """Whether an earlier sample of its request still computes blocks that both can share.

        The same holds until the earlier sample has scored the prompt, because no token may be sent
        before the scores.
        """
        block_size = self.pool.block_size
        num_shareable = (sequence.num_prompt_tokens - 1) // block_size * block_size
        return any(
            other.request is sequence.request
            and (other.num_computed < num_shareable or not other.is_scored)
            for other in self._running
        )

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Grows the block table; preempts the latest sequences for it. False if it is preempted."""
        while not self._try_grow(sequence, num_tokens):
            victim = self._running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _try_grow(self, sequence: Sequence, num_tokens: int) -> bool:
        num_positions = sequence.num_computed + num_tokens
        num_missing = -(-num_positions // self.pool.block_size) - len(sequence.block_table)
        if not self.pool.can_allocate(num_missing):
            return False
        sequence.block_table += self.pool.allocate(max(0, num_missing))
        return True

    def _reuse_prefix(self, sequence: Sequence) -> None:
        sequence.block_table = self.pool.match_prefix(sequence.reusable_ids)
        sequence.num_computed = len(sequence.block_table) * self.pool.block_size
        sequence.found_cached(sequence.num_computed)

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        sequence.move(SequenceStatus.PREEMPTED)
        self._free_blocks(sequence)
        self._waiting.appendleft(sequence)

    def _free_blocks(self, sequence: Sequence) -> None:
        self.pool.free(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed = 0


def _is_prefilling(sequence: Sequence) -> bool:
    return sequence.num_to_compute > 1
