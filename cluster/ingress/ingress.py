"""What the HTTP and the gRPC surface share: one model, one source, one bound on what runs.

The life of a request here:

1. A surface admits it (`Ingress.admit`), before it spends anything on it.
2. It reads and tokenises it, a long text on a thread.
3. `Ingress.generate` runs its prompts beside each other and hands out their tokens as they come.
4. Whoever stops listening closes the generator, and with it everything behind.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import TypeVar

from milliways.cluster.ingress.metrics import IngressMetrics
from milliways.cluster.ingress.readiness import Readiness
from milliways.cluster.ingress.resume import Received, ResumePoint
from milliways.cluster.ingress.served_model import ServedModel
from milliways.cluster.ingress.token_source import TokenSource
from milliways.cluster.settings.config import IngressSettings
from milliways.router.requests.journal import DeliveredSample
from milliways.router.requests.request import GenerationRequest
from milliways.router.requests.sequence import FinishReason, PromptScores, TokenEvent
from milliways.wire.errors import ModelFaultError, OverloadedError

# Below it, text is tokenised in less time than a thread takes to start.
_INLINE_BYTES = 8192
# Tokens of several prompts that wait for a slow client before the prompts wait themselves.
_MAX_MERGED_EVENTS = 64

# Tokens handed out before the event loop gets a turn.
_EVENTS_PER_TURN = 8

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class ChoiceEvent:
    """A token of a choice, its `index`-th: choices are sample `i % n` of prompt `i // n`."""

    choice_index: int
    event: TokenEvent
    index: int
    # False where the client has had it before its connection broke.
    is_news: bool = True


@dataclass(frozen=True, slots=True)
class PromptEvent:
    """Log-probabilities of a prompt, in order, and before any token of it."""

    prompt_index: int
    scores: PromptScores


IngressEvent = ChoiceEvent | PromptEvent


class Ingress:
    """Runs requests against one source of tokens, within bounds."""

    def __init__(
        self,
        model: ServedModel,
        source: TokenSource,
        settings: IngressSettings | None = None,
        *,
        request_timeout_s: float = 600.0,
        metrics: IngressMetrics | None = None,
        readiness: Readiness | None = None,
    ) -> None:
        self.model = model
        self.settings = settings or IngressSettings()
        self.metrics = metrics or IngressMetrics()
        self.readiness = readiness or Readiness(source)
        self.request_timeout_s = request_timeout_s
        self._source = source
        self._num_ongoing = 0

    @property
    def num_ongoing(self) -> int:
        return self._num_ongoing

    @contextmanager
    def admit(self) -> Generator[None]:
        """Counts a request as running.

        Raises:
            OverloadedError: as many run as may.
        """
        limit = self.settings.max_ongoing_requests
        if self._num_ongoing >= limit:
            raise OverloadedError(f"{limit} requests are running here, as many as may")
        self._num_ongoing += 1
        self.metrics.ongoing.set(self._num_ongoing)
        try:
            yield
        finally:
            self._num_ongoing -= 1
            self.metrics.ongoing.set(self._num_ongoing)

    async def generate(
        self,
        requests: Sequence[GenerationRequest],
        request_id: str,
        timeout_s: float | None = None,
        resume: ResumePoint | None = None,
    ) -> AsyncGenerator[IngressEvent]:
        """Streams the tokens of all prompts, scores before them. Closing it cancels them.

        With `resume`, tokens that the client told are left out, and those that it counted come
        again, marked as no news.

        Raises:
            InvalidRequestError: as the source does, or the client counts more than there are.
            ClusterError: as the source does.
            ModelFaultError: the logits of a sample were not finite.
        """
        limit_s = self.request_timeout_s
        deadline_s = time.monotonic() + min(limit_s, limit_s if timeout_s is None else timeout_s)
        watch = self.metrics.watch(sum(len(request.prompt_ids) for request in requests))
        num_given = 0
        if resume is not None:
            # Another name among those that run: the broken stream's end must not touch this one.
            request_id = f"{request_id}-{secrets.token_hex(4)}"
        async with aclosing(self._events(requests, request_id, deadline_s, resume)) as events:
            async for event in events:
                num_given += 1
                if num_given % _EVENTS_PER_TURN == 0:
                    # Tokens that are there already are no reason to wait: others would starve,
                    # and that the client has gone would not be seen.
                    await asyncio.sleep(0)
                if isinstance(event, PromptEvent):
                    watch.note_prompt()
                    yield event
                    continue
                if event.event.finish_reason is FinishReason.ERROR:
                    raise ModelFaultError("the model computed logits that are not finite")
                if event.is_news:
                    watch.note(event.choice_index, event.event)
                yield event

    def _events(
        self,
        requests: Sequence[GenerationRequest],
        request_id: str,
        deadline_s: float,
        resume: ResumePoint | None,
    ) -> AsyncGenerator[IngressEvent]:
        if len(requests) == 1:
            return self._one(requests[0], 0, request_id, deadline_s, resume)
        return merged(
            [
                self._one(request, i * request.num_samples, f"{request_id}-{i}", deadline_s, resume)
                for i, request in enumerate(requests)
            ]
        )

    async def _one(
        self,
        request: GenerationRequest,
        first_choice: int,
        request_id: str,
        deadline_s: float,
        resume: ResumePoint | None,
    ) -> AsyncGenerator[IngressEvent]:
        had = (Received(),) * request.num_samples
        num_scored = 0
        if resume is not None:
            had = resume.received[first_choice : first_choice + request.num_samples]
            num_scored = resume.num_scored_of(request, had)
        counts = [len(received.token_ids) for received in had]
        stream = self._source.generate(
            request,
            request_id=request_id,
            deadline_s=deadline_s,
            delivered=_told(had),
            num_scored=num_scored,
        )
        async with aclosing(stream) as events:
            async for event in events:
                if isinstance(event, PromptScores):
                    yield PromptEvent(first_choice // request.num_samples, event)
                    continue
                i = event.sample_index
                is_news = counts[i] >= had[i].num_tokens
                yield ChoiceEvent(first_choice + i, event, counts[i], is_news)
                counts[i] += 1
        for received, count in zip(had, counts, strict=True):
            if resume is not None and count < received.num_tokens:
                resume.refuse_count(received.num_tokens, count)


def _told(had: Sequence[Received]) -> list[DeliveredSample]:
    """The samples whose tokens a client still has."""
    return [
        DeliveredSample(i, received.token_ids, received.is_finished)
        for i, received in enumerate(had)
        if received.token_ids
    ]


async def merged(
    streams: Sequence[AsyncGenerator[IngressEvent]],
) -> AsyncGenerator[IngressEvent]:
    """Events of all streams as they come; the first error ends them all."""
    queue: asyncio.Queue[IngressEvent | Exception | None] = asyncio.Queue(_MAX_MERGED_EVENTS)

    async def pump(stream: AsyncGenerator[IngressEvent]) -> None:
        try:
            async with aclosing(stream) as events:
                async for event in events:
                    await queue.put(event)
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    # No TaskGroup: one must not be left open across a yield.
    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    num_running = len(tasks)
    try:
        while num_running:
            event = await queue.get()
            if isinstance(event, Exception):
                raise event
            if event is None:
                num_running -= 1
            else:
                yield event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def off_loop(function: Callable[[], Result], num_bytes: int) -> Result:
    """Runs what takes time with the size of its input: on a thread where that is large."""
    if num_bytes <= _INLINE_BYTES:
        return function()
    return await asyncio.to_thread(function)
