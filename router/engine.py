"""Serves requests in one process: the step loop over a local model.

The life of a request here:

1. `add` checks it and makes one sequence for each sample.
2. For each `step` the scheduler picks tokens of many sequences.
3. The runner computes them, scores prompts if that is wanted, and draws the next token of each
   sequence whose tokens are all computed.
4. Each drawn token becomes a `TokenEvent`: the text that can be shown, and perhaps the end.
5. A finished sequence frees its blocks; full blocks stay in the prefix cache.
"""

from collections.abc import Iterator
from itertools import islice

from milliways.model.block_pool import BlockPool
from milliways.model.detokenizer import IncrementalDetokenizer
from milliways.model.runner import ModelRunner, ScheduledTokens
from milliways.model.tokenizer import Tokenizer
from milliways.router.limits import SchedulerLimits
from milliways.router.requests.admission import RoutedRequest, make_sequences, max_completion_tokens
from milliways.router.requests.request import GenerationRequest
from milliways.router.requests.sequence import (
    Detokenizer,
    Event,
    FinishReason,
    NoText,
    Sequence,
    SequenceStatus,
)
from milliways.router.rows import sample_rows, take_events
from milliways.router.scheduler import ScheduledSequence, Scheduler


class LocalEngine:
    """Owns the sequences of one process and the step loop over its model."""

    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: Tokenizer | None,
        limits: SchedulerLimits | None = None,
    ) -> None:
        size = runner.cache_size
        self._config = runner.config
        self._runner = runner
        self._tokenizer = tokenizer
        self._scheduler = Scheduler(
            BlockPool(size.num_blocks, size.block_size),
            limits or SchedulerLimits(max_running=size.max_slots),
        )

    @property
    def pool(self) -> BlockPool:
        return self._scheduler.pool

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    def add(self, request: GenerationRequest) -> list[Sequence]:
        """Queues a request: one sequence for each sample; none if it wants no token and no score.

        Raises:
            InvalidRequestError: it does not fit the model or the KV cache.
        """
        routed = RoutedRequest(request_id="", request=request, timeout_s=0.0)
        sequences = make_sequences(routed, self._config, self._detokenizer)
        num_tokens = len(request.prompt_ids) + max_completion_tokens(request, self._config)
        for sequence in sequences:
            # The last token drawn is never computed, so it needs no position.
            self._scheduler.add(sequence, num_tokens - 1)
        return sequences

    def step(self) -> list[tuple[Sequence, Event]]:
        """Computes one step; returns the tokens drawn, and the scores of prompts."""
        scheduled = self._scheduler.schedule()
        rows = [row for entry in scheduled for row in sample_rows(entry)]
        sampled = iter(
            self._runner.compute_and_sample([_tokens_of(entry) for entry in scheduled], rows)
        )
        events: list[tuple[Sequence, Event]] = []
        for entry in scheduled:
            self._scheduler.computed(entry)
            own = list(islice(sampled, entry.num_logits))
            events += [(entry.sequence, event) for event in take_events(entry, own)]
            self._finish(entry.sequence)
        return events

    def generate(self, request: GenerationRequest) -> Iterator[Event]:
        """Runs one request to its end, streaming the tokens of all its samples.

        If the prompt is scored, its scores come first. A consumer that stops iterating cancels the
        request.
        """
        unfinished = self.add(request)
        try:
            while unfinished:
                for sequence, event in self.step():
                    if sequence.finish_reason is not None and sequence in unfinished:
                        unfinished.remove(sequence)
                    if sequence.request is request:
                        yield event
        finally:
            for sequence in unfinished:
                self._scheduler.finish(sequence, SequenceStatus.FAILED)

    def _detokenizer(self, request: GenerationRequest) -> Detokenizer:
        if self._tokenizer is None:
            return NoText()
        return IncrementalDetokenizer(self._tokenizer, request.prompt_ids)

    def _finish(self, sequence: Sequence) -> None:
        if sequence.finish_reason is FinishReason.ERROR:
            self._scheduler.finish(sequence, SequenceStatus.FAILED)
        elif sequence.finish_reason is not None:
            self._scheduler.finish(sequence, SequenceStatus.FINISHED)


def _tokens_of(scheduled: ScheduledSequence) -> ScheduledTokens:
    sequence = scheduled.sequence
    return ScheduledTokens(
        token_ids=sequence.next_tokens(scheduled.num_tokens),
        start_position=sequence.num_computed,
        block_table=sequence.block_table,
        num_logits=scheduled.num_logits,
    )
