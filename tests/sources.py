"""Token sources for tests of the ingress: one computable by hand, one with a real model."""

import asyncio
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable
from collections.abc import Sequence as SequenceOf
from contextlib import aclosing
from dataclasses import dataclass, field

from milliways.model.errors import InvalidRequestError
from milliways.model.sampling_params import SampledToken
from milliways.router.engine import LocalEngine
from milliways.router.requests.journal import DeliveredSample
from milliways.router.requests.request import GenerationRequest
from milliways.router.requests.sequence import (
    Event,
    FinishReason,
    PromptScores,
    Sequence,
    SequenceStatus,
    TokenEvent,
)
from milliways.wire.errors import DeadlineError, UnavailableError

EOS = 2


def counted_events(request: GenerationRequest, vocab_size: int = 1280) -> list[TokenEvent]:
    """Computable by hand: the next token is the last one plus 1 plus the sample index.

    Token t has the text "t," and log-probability -t. Samples take turns.
    """
    events: list[TokenEvent] = []
    for index in range(request.max_tokens):
        for sample in range(request.num_samples):
            token = (request.prompt_ids[-1] + (1 + sample) * (1 + index)) % vocab_size
            is_last = index == request.max_tokens - 1
            events.append(
                TokenEvent(
                    sample_index=sample,
                    token_id=token,
                    text=f"{token},",
                    logprob=-float(token),
                    top_logprobs=((token, -float(token)),) * min(1, request.sampling.num_logprobs),
                    finish_reason=FinishReason.LENGTH if is_last else None,
                )
            )
    return events


def counted_scores(request: GenerationRequest) -> list[SampledToken]:
    """Computable by hand: prompt token t has log-probability -t / 2; t + 1 is more likely."""
    return [
        SampledToken(
            token_id=token,
            logprob=-token / 2,
            top_logprobs=((token + 1, -token / 4),) * min(1, request.prompt_logprobs or 0),
            is_valid=True,
        )
        for token in request.prompt_ids[1 : request.num_to_score + 1]
    ]


def counted_score_events(
    request: GenerationRequest, num_scored: int = 0, events_each: int = 2
) -> list[PromptScores]:
    """Events with those scores that the client has not received."""
    scores = counted_scores(request)
    return [
        PromptScores(position=first + 1, tokens=tuple(scores[first : first + events_each]))
        for first in range(num_scored, len(scores), events_each)
    ]


def without_delivered(
    events: list[TokenEvent], delivered: SequenceOf[DeliveredSample]
) -> list[TokenEvent]:
    """Events that the client has not received; asserts that those received are equal."""
    received = {sample.sample_index: list(sample.token_ids) for sample in delivered}
    remaining: list[TokenEvent] = []
    for event in events:
        token_ids = received.get(event.sample_index)
        if not token_ids:
            remaining.append(event)
        else:
            assert token_ids.pop(0) == event.token_id
    return remaining


@dataclass
class CountingSource:
    """Counts or fails; records its requests and the streams that were closed early."""

    error: Exception | None = None
    # The error comes after this many events.
    num_before_error: int = 0
    # Each event acquires this first; None: events do not wait.
    gate: asyncio.Semaphore | None = None
    probe_error: Exception | None = None
    make_events: Callable[[GenerationRequest], list[TokenEvent]] = counted_events
    requests: list[GenerationRequest] = field(default_factory=list)
    request_ids: list[str] = field(default_factory=list)
    deadlines_s: list[float] = field(default_factory=list)
    nums_scored: list[int] = field(default_factory=list)
    num_running: int = 0
    num_closed_early: int = 0
    num_probes: int = 0

    async def generate(
        self,
        request: GenerationRequest,
        *,
        request_id: str,
        deadline_s: float,
        delivered: SequenceOf[DeliveredSample] = (),
        num_scored: int = 0,
    ) -> AsyncGenerator[Event]:
        self.nums_scored.append(num_scored)
        self.request_ids.append(request_id)
        self.requests.append(request)
        self.deadlines_s.append(deadline_s)
        self.num_running += 1
        is_done = False
        try:
            events: list[Event] = [*counted_score_events(request, num_scored)]
            events += without_delivered(self.make_events(request), delivered)
            for i, event in enumerate(events):
                if self.error is not None and i == self.num_before_error:
                    raise self.error
                await self._wait(deadline_s)
                yield event
            is_done = True
        except Exception:
            is_done = True
            raise
        finally:
            self.num_running -= 1
            self.num_closed_early += not is_done

    async def _wait(self, deadline_s: float) -> None:
        if self.gate is None:
            return
        try:
            async with asyncio.timeout(deadline_s - time.monotonic()):
                await self.gate.acquire()
        except TimeoutError:
            raise DeadlineError("the deadline passed") from None

    async def probe(self) -> None:
        self.num_probes += 1
        if self.probe_error is not None:
            raise self.probe_error


class LocalSource:
    """A real engine in a thread. Requests join and leave between its steps."""

    def __init__(self, engine: LocalEngine) -> None:
        self._engine = engine
        self._inbox: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._streams: dict[Sequence, Callable[[Event], None]] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def num_running(self) -> int:
        return len(self._streams)

    def close(self) -> None:
        self._inbox.put(None)
        self._thread.join()

    async def probe(self) -> None:
        if not self._thread.is_alive():
            raise UnavailableError("the engine has stopped")

    async def generate(
        self,
        request: GenerationRequest,
        *,
        request_id: str,
        deadline_s: float,
        delivered: SequenceOf[DeliveredSample] = (),
        num_scored: int = 0,
    ) -> AsyncGenerator[Event]:
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event | Exception] = asyncio.Queue()
        sequences: list[Sequence] = []

        def hand_over(event: Event | Exception) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        def join() -> None:
            try:
                sequences.extend(self._engine.add(request))
            except InvalidRequestError as error:
                hand_over(error)
            self._streams.update(dict.fromkeys(sequences, hand_over))
            if sequences:
                sequences[0].num_scored = num_scored
            for sample in delivered:
                sequence = sequences[sample.sample_index]
                sequence.replay(sample.token_ids)
                if sample.is_finished:
                    self._engine._scheduler.finish(sequence, SequenceStatus.FAILED)
                    del self._streams[sequence]

        def leave() -> None:
            for sequence in sequences:
                if self._streams.pop(sequence, None) is not None:
                    self._engine._scheduler.finish(sequence, SequenceStatus.FAILED)

        self._inbox.put(join)
        try:
            num_unfinished = request.num_samples - sum(sample.is_finished for sample in delivered)
            num_unscored = request.num_to_score - num_scored
            while num_unscored or (request.max_tokens and num_unfinished):
                event = await events.get()
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, PromptScores):
                    num_unscored -= len(event.tokens)
                else:
                    num_unfinished -= event.finish_reason is not None
                yield event
        finally:
            self._inbox.put(leave)

    def _run(self) -> None:
        while True:
            while not (self._inbox.empty() and self._engine.has_work):
                change = self._inbox.get()
                if change is None:
                    return
                change()
            events = self._engine.step()
            for sequence, event in events:
                self._streams[sequence](event)
            for sequence in {sequence for sequence, _ in events}:
                if sequence.finish_reason is not None:
                    del self._streams[sequence]


async def collect(source: CountingSource | LocalSource, request: GenerationRequest) -> list[Event]:
    """Collects all events of a request."""
    deadline_s = time.monotonic() + 60
    stream = source.generate(request, request_id="test", deadline_s=deadline_s)
    async with aclosing(stream) as events:
        return [event async for event in events]
