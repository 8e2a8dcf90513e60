"""Serves requests in one process: the step loop over a local model.

The life of a request here:

1. `add` checks it and makes one sequence for each sample.
2. Each `step` the scheduler picks tokens of many sequences.
3. The runner computes them and draws the next token where a sequence's last one was reached.
4. Each drawn token becomes a `TokenEvent`: text as far as it can be shown, and perhaps the end.
5. A finished sequence gives its blocks back; full ones stay for equal prefixes.
"""

from collections.abc import Iterator

from model.block_pool import BlockPool
from model.detokenizer import IncrementalDetokenizer
from model.runner import ModelRunner, ScheduledTokens
from model.sampling_params import SampleRow
from model.tokenizer import Tokenizer
from router.admission import RoutedRequest, make_sequences, max_completion_tokens
from router.request import GenerateRequest
from router.scheduler import ScheduledSequence, Scheduler, SchedulerLimits
from router.sequence import (
    Detokenizer,
    FinishReason,
    NoText,
    Sequence,
    SequenceStatus,
    TokenEvent,
)


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

    def add(self, request: GenerateRequest) -> list[Sequence]:
        """Queues a request: one sequence for each sample.

        Raises:
            InvalidRequestError: it does not fit the model or the KV cache.
        """
        routed = RoutedRequest(request_id="", request=request, timeout_s=0.0)
        sequences = make_sequences(routed, self._config, self._detokenizer)
        num_tokens = len(request.prompt_ids) + max_completion_tokens(request, self._config)
        for sequence in sequences:
            # The last token drawn is never computed, so it takes no place.
            self._scheduler.add(sequence, num_tokens - 1)
        return sequences

    def step(self) -> list[tuple[Sequence, TokenEvent]]:
        """Computes one step; returns the tokens drawn in it."""
        scheduled = self._scheduler.schedule()
        drawing = [entry.sequence for entry in scheduled if entry.wants_token]
        sampled = self._runner.compute_and_sample(
            [_tokens_of(entry) for entry in scheduled], [_row_of(seq) for seq in drawing]
        )
        for entry in scheduled:
            self._scheduler.computed(entry)
        return [
            (sequence, self._advance(sequence.append(token), sequence))
            for sequence, token in zip(drawing, sampled, strict=True)
        ]

    def generate(self, request: GenerateRequest) -> Iterator[TokenEvent]:
        """Runs one request to its end, streaming the tokens of all its samples.

        A consumer that stops listening cancels what is left.
        """
        unfinished = self.add(request)
        try:
            while unfinished:
                for sequence, event in self.step():
                    if event.finish_reason is not None and sequence in unfinished:
                        unfinished.remove(sequence)
                    if sequence.request is request:
                        yield event
        finally:
            for sequence in unfinished:
                self._scheduler.finish(sequence, SequenceStatus.FAILED)

    def _detokenizer(self, request: GenerateRequest) -> Detokenizer:
        if self._tokenizer is None:
            return NoText()
        return IncrementalDetokenizer(self._tokenizer, request.prompt_ids)

    def _advance(self, event: TokenEvent, sequence: Sequence) -> TokenEvent:
        if event.finish_reason is FinishReason.ERROR:
            self._scheduler.finish(sequence, SequenceStatus.FAILED)
        elif event.finish_reason is not None:
            self._scheduler.finish(sequence, SequenceStatus.FINISHED)
        return event


def _tokens_of(scheduled: ScheduledSequence) -> ScheduledTokens:
    sequence = scheduled.sequence
    return ScheduledTokens(
        token_ids=sequence.next_tokens(scheduled.num_tokens),
        start_position=sequence.num_computed,
        block_table=sequence.block_table,
        num_logits=1 if scheduled.wants_token else 0,
    )


def _row_of(sequence: Sequence) -> SampleRow:
    return SampleRow(
        params=sequence.request.sampling,
        token_ids=sequence.token_ids,
        num_prompt_tokens=sequence.num_prompt_tokens,
        sample_index=sequence.sample_index,
    )
