"""Serves requests in one process: the step loop over a local model.

The life of a request here:

1. `add` checks it and makes one sequence for each sample.
2. For each `step` the scheduler picks tokens of many sequences.
3. The runner computes them, scores prompts if that is wanted, and draws the next token of each
   sequence whose tokens are all computed.
4. Each drawn token becomes a `TokenEvent`: the text that can be shown, and perhaps the end.
5. A finished sequence frees its blocks; full blocks stay in the prefix cache.
"""

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
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


@dataclass(slots=True)
class _Reader:
    """An open `generate_all`: events that it has not yielded, and sequences that have not ended.

    Each event and each unfinished sequence is stored with the index of its request.
    """

    events: deque[tuple[int, Event]] = field(default_factory=deque[tuple[int, Event]])
    unfinished: dict[Sequence, int] = field(default_factory=dict[Sequence, int])


class LocalEngine:
    """Owns the sequences of one process and the step loop over its model.

    It is for one thread at a time.

    Invariant: a sequence is in `_readers` exactly while it is unfinished in its reader.
    """

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
        self._readers: dict[Sequence, _Reader] = {}

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
        """Runs one request to its end; yields the tokens of all its samples as they are drawn.

        If the prompt is scored, its scores come first. Closing the iterator cancels the request.
        """
        with closing(self.generate_all([request])) as events:
            for _, event in events:
                yield event

    def generate_all(self, requests: Iterable[GenerationRequest]) -> Generator[tuple[int, Event]]:
        """Runs requests beside each other; yields each event with the index of its request.

        Several of these iterators may be open at once: each step serves all of them, and an
        iterator that is not read keeps its events. Closing one cancels what is left of it.

        Raises:
            InvalidRequestError: a request does not fit. None of this iterator's requests runs then.
        """
        reader = _Reader()
        try:
            for index, request in enumerate(requests):
                for sequence in self.add(request):
                    reader.unfinished[sequence] = index
                    self._readers[sequence] = reader
            while reader.events or reader.unfinished:
                while reader.events:
                    yield reader.events.popleft()
                if reader.unfinished:
                    self._step_for_readers()
        finally:
            for sequence in reader.unfinished:
                del self._readers[sequence]
                self._scheduler.finish(sequence, SequenceStatus.FAILED)

    def _step_for_readers(self) -> None:
        drawn = self.step()
        for sequence, event in drawn:
            reader = self._readers.get(sequence)
            if reader is not None:
                reader.events.append((reader.unfinished[sequence], event))
        for sequence, _ in drawn:
            if sequence.finish_reason is not None and sequence in self._readers:
                del self._readers.pop(sequence).unfinished[sequence]

    def _detokenizer(self, request: GenerationRequest) -> Detokenizer:
        if self._tokenizer is None:
            return NoText()
        return IncrementalDetokenizer(
            self._tokenizer,
            request.prompt_ids,
            shows_special=request.rules.shows_special,
            spaces_special=request.rules.spaces_special,
        )

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
