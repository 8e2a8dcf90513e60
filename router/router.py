"""A router: owns sequences, and steps them through the model.

The life of a request here:

1. `submit` admits it, or refuses it at once: the queue is bounded.
2. For each step the scheduler picks the running sequences' next tokens and chunks of prefill.
3. These tokens go through the layers in micro-batches, several at a time, so that one is in
   attention while another waits for experts.
4. Drawn tokens become text and go to the request's listener, after the prompt's log-probabilities
   if it wants them. A sequence that ends frees its blocks.
5. If an attention shard is lost, every running sequence is computed again: same bits, same tokens.
6. If there is a standby, full KV blocks are copied to it meanwhile: a request that is continued
   there finds them.
7. If workers die one after another with the same tokens, their sequences are computed alone. A
   sequence that kills workers alone is failed.

It has no clock, thread or socket: `Tasks` runs it, in production and in simulation.
"""

import logging
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import Protocol

from milliways.model.block_pool import BlockPool
from milliways.model.config import ModelConfig
from milliways.model.sampling_params import SampledToken
from milliways.router.block_copies import ArraysNow, BlockCopies
from milliways.router.limits import RouterLimits
from milliways.router.links.link_table import LinkTable
from milliways.router.micro_batches import split_step
from milliways.router.pipeline import Pipeline, ShardLostError
from milliways.router.requests.admission import (
    DetokenizerFor,
    RoutedRequest,
    make_sequences,
    max_completion_tokens,
)
from milliways.router.requests.sequence import (
    FinishReason,
    PromptScores,
    Sequence,
    SequenceStatus,
    TokenEvent,
)
from milliways.router.rows import pack, take_events
from milliways.router.scheduler import ScheduledSequence, Scheduler
from milliways.router.suspects import RowsKilledWorkersError, Suspects
from milliways.runtime.tasks import Signal, Tasks, Timer
from milliways.wire.calls import Refusal, Result, StoreBlocks
from milliways.wire.errors import (
    ClusterError,
    DeadlineError,
    ModelFaultError,
    OverloadedError,
    PoisonedRequestError,
    RefusalReason,
    RefusedError,
    UnavailableError,
)
from milliways.wire.load import Load

logger = logging.getLogger(__name__)

MAX_FAULTS = 3
RETRY_AFTER_S = 1.0


class Listener(Protocol):
    """Receives a request's events, in the router's thread. Its methods must not block or raise."""

    def scored(self, scores: PromptScores) -> None:
        """Log-probabilities of prompt tokens, in order; all that are wanted precede any token."""
        ...

    def tokens(self, events: list[TokenEvent]) -> None:
        """Tokens of one step, of any of its samples."""
        ...

    def ended(self, error: ClusterError | None) -> None:
        """The last call: all samples ended, or the request failed."""
        ...

    def moved(self) -> None:
        """The last call: another router can continue the request."""
        ...


@dataclass(slots=True)
class _Active:
    """A request that has not ended. `sequences` has those of its samples that have not ended."""

    routed: RoutedRequest
    listener: Listener
    sequences: list[Sequence]
    timer: Timer | None = None
    num_tokens: int = 0


@dataclass(slots=True)
class RouterFigures:
    """Counts since the start, for status and metrics."""

    num_requests: int = 0
    num_tokens: int = 0
    # Positions that were scheduled to be computed, so without those from the prefix cache.
    num_positions: int = 0
    num_steps: int = 0
    num_replays: int = 0


class Router:
    """Owns the requests of one chain of attention shards.

    Invariant: `_active` has every request whose listener still expects a call. Each sequence of the
    scheduler belongs to exactly one of them.
    """

    def __init__(
        self,
        config: ModelConfig,
        pool: BlockPool,
        limits: RouterLimits,
        links: LinkTable,
        pipeline: Pipeline,
        detokenizer_for: DetokenizerFor,
        tasks: Tasks,
        arrays_now: ArraysNow | None = None,
    ) -> None:
        """`arrays_now` returns the keys and values behind the pool, if they are to be copied."""
        self.figures = RouterFigures()
        self.links = links
        self.scheduler = Scheduler(pool, limits.scheduler)
        self.copies: BlockCopies | None = None
        if arrays_now is not None:
            self.copies = BlockCopies(
                self.scheduler, links, tasks, arrays_now, limits.copy_timeout_s
            )
        self._config = config
        self._limits = limits
        self._pipeline = pipeline
        self._detokenizer_for = detokenizer_for
        self._tasks = tasks
        self._active: dict[str, _Active] = {}
        self._changed = Signal()
        # Fires when sequences stop running for another reason than a step.
        self._dropped = Signal()
        self._num_batches = 0
        self._num_faults = 0
        self._suspects = Suspects(Random(f"{links.router_id}, life {links.incarnation}"))
        self._is_draining = False

    @property
    def num_active(self) -> int:
        """Requests that have not ended."""
        return len(self._active)

    def loads(self) -> dict[str, Load]:
        """How busy the router is with the requests of each ingress."""
        loads: dict[str, Load] = {}
        for active in self._active.values():
            if active.sequences:
                # Samples share their prompt: what is missing is computed once.
                missing = min(sequence.num_to_compute - 1 for sequence in active.sequences)
                load = Load(len(active.sequences), max(0, missing))
                name = active.routed.ingress_id
                loads[name] = loads.get(name, Load()) + load
        return loads

    @property
    def standby_id(self) -> str:
        """The router that has copies of this one's KV blocks; empty if none has."""
        return self.copies.standby_id if self.copies is not None else ""

    def store_blocks(self, call: StoreBlocks) -> Result:
        """Keeps KV blocks of another router, for sequences that are continued here."""
        if self.copies is None:
            return Refusal(RefusalReason.NOT_HELD, "this router keeps no copies")
        return self.copies.store(call)

    def take_limits(self, limits: RouterLimits) -> None:
        """Uses other limits from the next step and request on.

        The sizes of a step and of the batch must stay: arrays and programs have them.
        """
        self._limits, self.scheduler.limits = limits, limits.scheduler
        if self.copies is not None:
            self.copies.timeout_s = limits.copy_timeout_s

    def submit(self, routed: RoutedRequest, listener: Listener) -> None:
        """Admits a request.

        Raises:
            InvalidRequestError: it does not fit the model or the KV cache.
            OverloadedError: the queue is full.
            UnavailableError: the router drains.
        """
        if self._is_draining:
            raise UnavailableError("the router drains", RETRY_AFTER_S)
        if routed.request_id in self._active:
            # The same request on a new stream: the client of the old stream is gone.
            self.cancel(routed.request_id)
        sequences = make_sequences(routed, self._config, self._detokenizer_for)
        if not self.scheduler.can_queue(len(sequences)):
            waiting = f"{self.scheduler.num_waiting} sequences wait"
            raise OverloadedError(f"the queue is full: {waiting}", RETRY_AFTER_S)
        # The last token drawn is never computed, so it needs no position.
        num_prompt_tokens = len(routed.request.prompt_ids)
        max_tokens = num_prompt_tokens + max_completion_tokens(routed.request, self._config) - 1
        self.scheduler.check_capacity(max_tokens)
        for sequence in sequences:
            self.scheduler.add(sequence, max_tokens)
        active = _Active(routed, listener, sequences)
        self._active[routed.request_id] = active
        self.figures.num_requests += 1
        if not sequences:
            self._end(active, None)
            return
        active.timer = self._tasks.call_later(routed.timeout_s, lambda: self._expire(active))
        self._changed.notify()

    def cancel(self, request_id: str) -> None:
        """Drops a request; its blocks are free before the next step is chosen."""
        active = self._active.get(request_id)
        if active is not None:
            self._drop(active)

    def cancel_listener(self, request_id: str, listener: Listener) -> None:
        """As `cancel`, unless the request continues with another listener."""
        active = self._active.get(request_id)
        if active is not None and active.listener is listener:
            self._drop(active)

    def drain(self) -> None:
        """Accepts no more requests, and hands over those that it has."""
        self._is_draining = True
        self._hand_over()

    def resume(self) -> None:
        """Accepts requests again."""
        self._is_draining = False

    def chain_changed(self) -> None:
        """Takes the chain of a new view. Keys and values are lost if it has changed."""
        members = self.links.view.members
        names = self.links.view.chains.get(self.links.router_id, ())
        chain = tuple(members[name] for name in names if name in members)
        before = [(m.worker_id, m.incarnation, m.first_layer) for m in self._pipeline.chain]
        after = [(m.worker_id, m.incarnation, m.first_layer) for m in chain]
        self._pipeline.chain = chain
        if before and after != before:
            self._replay()
        if before and not chain:
            # Another router runs the sequences now; here they would never end.
            self._hand_over()
        if self.copies is not None:
            self.copies.view_changed()
        self._changed.notify()

    async def serve(self) -> None:
        """Computes steps whenever there is work, until it is cancelled."""
        while True:
            while self.scheduler.has_work and self._has_whole_chain():
                try:
                    await self.step()
                except ShardLostError as error:
                    await self._recover(error)
                except RefusedError as error:
                    self._fail_running(error)
                except RowsKilledWorkersError as error:
                    logger.error("abandoned a step: %s", error)
                # Requests and cancellations that arrived meanwhile come before the next step.
                await self._tasks.sleep(0)
            await self._tasks.first_done((self._changed.wait(), self.links.changed.wait()))

    async def step(self) -> None:
        """One step: schedule, compute, deliver."""
        caution_s = await self._pause_before_suspect()
        suspect = self._suspects.next()
        scheduled = self.scheduler.schedule_alone(suspect) if suspect is not None else []
        if not scheduled:
            caution_s = None
            scheduled = self.scheduler.schedule()
        if not scheduled:
            return
        self.figures.num_steps += 1
        self.figures.num_positions += sum(entry.num_tokens for entry in scheduled)
        limits = self._limits
        max_batches = 1 if self._pipeline.computes_at_once else limits.max_micro_batches
        batches = split_step(scheduled, max_batches, limits.min_micro_batch_tokens)
        computing = self._tasks.start(
            self._tasks.gather(self._compute(b, caution_s) for b in batches)
        )
        try:
            while not computing.is_done:
                if not any(e.sequence.status is SequenceStatus.RUNNING for e in scheduled):
                    # No sequence needs this step, and it may wait for experts that no worker holds.
                    return
                await self._tasks.first_done((computing, self._dropped.wait()))
        finally:
            computing.cancel()
        drawn = computing.result()
        self._num_faults = 0
        self._suspects.clear(entry.sequence for entry in scheduled if entry.reaches_end)
        for batch, tokens in zip(batches, drawn, strict=True):
            self._deliver(batch, tokens)
        if self.copies is not None:
            self.copies.look()

    async def _pause_before_suspect(self) -> float | None:
        """Waits before a suspect is computed; returns how long, or None if there is no suspect."""
        suspect = self._suspects.next()
        if suspect is None:
            return None
        pause_s = self._suspects.pause_s(suspect)
        await self._tasks.sleep(pause_s)
        return pause_s

    async def _compute(
        self, batch: list[ScheduledSequence], caution_s: float | None
    ) -> tuple[SampledToken, ...]:
        self._num_batches += 1
        step, batch_id = self.figures.num_steps, self._num_batches
        try:
            return await self._pipeline.run(step, batch_id, pack(batch), caution_s)
        except RowsKilledWorkersError as error:
            running = [e.sequence for e in batch if e.sequence.status is SequenceStatus.RUNNING]
            if caution_s is None:
                self._suspects.accuse(running)
            elif running and self._suspects.is_guilty(running[0]):
                message = f"workers die each time that it is computed: {error}"
                self._end(self._active_of(running[0]), PoisonedRequestError(message))
            raise

    def _deliver(self, batch: list[ScheduledSequence], drawn: tuple[SampledToken, ...]) -> None:
        tokens = iter(drawn)
        events: dict[str, tuple[_Active, list[TokenEvent]]] = {}
        for entry in batch:
            sequence = entry.sequence
            own = list(islice(tokens, entry.num_logits))
            # It may have been cancelled while it was computed.
            if sequence.status is not SequenceStatus.RUNNING:
                continue
            self.scheduler.computed(entry)
            if not own:
                continue
            active = self._active_of(sequence)
            its_events = events.setdefault(active.routed.request_id, (active, []))[1]
            for event in take_events(entry, own):
                if isinstance(event, PromptScores):
                    active.listener.scored(event)
                else:
                    its_events.append(event)
            self._finish_sequence(active, sequence)
        num_tokens = 0
        for active, its_events in events.values():
            num_tokens += len(its_events)
            self._send_tokens(active, its_events)
        self.figures.num_tokens += num_tokens

    def _finish_sequence(self, active: _Active, sequence: Sequence) -> None:
        reason = sequence.finish_reason
        if reason is None:
            return
        is_fault = reason is FinishReason.ERROR
        status = SequenceStatus.FAILED if is_fault else SequenceStatus.FINISHED
        self.scheduler.finish(sequence, status)
        # Broken scores end a sequence before its step clears it.
        self._suspects.clear((sequence,))
        active.sequences.remove(sequence)

    def _send_tokens(self, active: _Active, events: list[TokenEvent]) -> None:
        valid = [event for event in events if event.finish_reason is not FinishReason.ERROR]
        if valid:
            active.listener.tokens(valid)
        if len(valid) < len(events):
            self._end(active, ModelFaultError("the model computed logits that are not finite"))
        elif not active.sequences:
            self._end(active, None)

    def _active_of(self, sequence: Sequence) -> _Active:
        return next(a for a in self._active.values() if sequence in a.sequences)

    def _hand_over(self) -> None:
        for active in list(self._active.values()):
            self._drop(active)
            active.listener.moved()

    def _has_whole_chain(self) -> bool:
        is_open = self.links.is_open
        return self._pipeline.is_whole and all(is_open(m.worker_id) for m in self._pipeline.chain)

    async def _recover(self, error: ShardLostError) -> None:
        """Restarts the running sequences, or fails them after MAX_FAULTS refusals in a row."""
        logger.warning("an attention shard was lost: %s", error)
        cause = error.cause
        if isinstance(cause, RefusedError) and cause.reason in (
            RefusalReason.FAULT,
            RefusalReason.MALFORMED,
        ):
            self._num_faults += 1
            if self._num_faults >= MAX_FAULTS:
                self._num_faults = 0
                self._fail_running(cause)
                return
        self._replay()
        if isinstance(cause, RefusedError):
            # A newer view is on its way and removes the reason of the refusal.
            await self._tasks.wait_for(self.links.changed.wait(), 0.05)

    def _replay(self) -> None:
        self.figures.num_replays += 1
        self.scheduler.start_over()
        self._dropped.notify()

    def _fail_running(self, error: RefusedError) -> None:
        logger.error("steps failed several times: %s", error)
        for active in list(self._active.values()):
            if any(s.status is SequenceStatus.RUNNING for s in active.sequences):
                self._end(active, ClusterError(f"workers failed to compute it: {error}"))

    def _expire(self, active: _Active) -> None:
        late = f"not done within {active.routed.timeout_s:g} s"
        obstacle = self._pipeline.obstacle()
        if obstacle:
            self._end(active, UnavailableError(f"{late}: {obstacle}", RETRY_AFTER_S))
        else:
            self._end(active, DeadlineError(late))

    def _end(self, active: _Active, error: ClusterError | None) -> None:
        self._drop(active)
        active.listener.ended(error)

    def _drop(self, active: _Active) -> None:
        """Frees what the request holds; without effect the second time."""
        if self._active.get(active.routed.request_id) is not active:
            return
        del self._active[active.routed.request_id]
        if active.timer is not None:
            active.timer.cancel()
        self._suspects.clear(active.sequences)
        for sequence in active.sequences:
            self.scheduler.finish(sequence, SequenceStatus.FAILED)
        active.sequences = []
        self._dropped.notify()
