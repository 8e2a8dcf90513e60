"""The core that HTTP and gRPC share: one model, one source of tokens, one limit on requests.

Steps of a request:

1. The HTTP or gRPC handler admits it (`Ingress.admit`) before it spends work on it.
2. The handler parses and tokenises it; long texts on a thread.
3. `Ingress.generate` runs the prompts in parallel and yields their tokens as they arrive.
4. If the client leaves, the handler closes the generator. That cancels the request everywhere.
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
from milliways.wire.errors import (
    LeavingError,
    ModelFaultError,
    OverloadedError,
    UnavailableError,
)

# Shorter text is tokenised in less time than a thread takes to start.
_INLINE_BYTES = 8192
# Tokens that may wait for a slow client; beyond this the prompts' streams wait.
_MAX_MERGED_EVENTS = 64
# Tokens yielded before other tasks of the event loop get a turn.
_EVENTS_PER_TURN = 8

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class ChoiceEvent:
    """Token number `index` of a choice. Choice `i` is sample `i % n` of prompt `i // n`."""

    choice_index: int
    event: TokenEvent
    index: int
    # False if the client received it before its connection broke.
    is_new: bool = True


@dataclass(frozen=True, slots=True)
class PromptEvent:
    """Log-probabilities of a prompt's tokens; they come in order, before its completions."""

    prompt_index: int
    scores: PromptScores


IngressEvent = ChoiceEvent | PromptEvent


class Ingress:
    """Runs requests with one source of tokens, within limits.

    *Invariant:* `num_ongoing` is the number of `admit` blocks that are open, and never exceeds
    `settings.max_ongoing_requests`.
    """

    def __init__(
        self,
        model: ServedModel,
        source: TokenSource,
        settings: IngressSettings | None = None,
        *,
        request_timeout_s: float = 600.0,
        metrics: IngressMetrics | None = None,
        readiness: Readiness | None = None,
        obstacle: Callable[[], str] = lambda: "",
    ) -> None:
        """`obstacle` says why no request can be served here, and is empty if one can."""
        self.model = model
        self.settings = settings or IngressSettings()
        self.metrics = metrics or IngressMetrics()
        self.readiness = readiness or Readiness(source, obstacle=obstacle)
        self._obstacle = obstacle
        self.request_timeout_s = request_timeout_s
        self._source = source
        self._num_ongoing = 0
        self._leaves_because = ""
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    @property
    def num_ongoing(self) -> int:
        return self._num_ongoing

    def leave(self, reason: str) -> None:
        """Takes nothing new from now on; what runs goes on."""
        self._leaves_because = reason
        self.readiness.drain(reason)

    @contextmanager
    def admit(self) -> Generator[None]:
        """Counts a request as running inside the `with` block.

        Raises:
            LeavingError: `leave` was called.
            OverloadedError: `max_ongoing_requests` requests are running.
            UnavailableError: no request can be served here; says why.
        """
        if self._leaves_because:
            raise LeavingError(self._leaves_because)
        if reason := self._obstacle():
            raise UnavailableError(reason)
        limit = self.settings.max_ongoing_requests
        if self._num_ongoing >= limit:
            raise OverloadedError(f"the limit of {limit} running requests is reached")
        self._num_ongoing += 1
        self._is_idle.clear()
        self.metrics.ongoing.set(self._num_ongoing)
        try:
            yield
        finally:
            self._num_ongoing -= 1
            self.metrics.ongoing.set(self._num_ongoing)
            if not self._num_ongoing:
                self._is_idle.set()

    async def try_become_idle(self, timeout_s: float) -> bool:
        """Waits until no request runs; False if some still run after this time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._is_idle.wait()
        except TimeoutError:
            return False
        return True

    async def generate(
        self,
        requests: Sequence[GenerationRequest],
        request_id: str,
        timeout_s: float | None = None,
        resume: ResumePoint | None = None,
    ) -> AsyncGenerator[IngressEvent]:
        """Streams the tokens of all prompts, each prompt's scores first. Closing cancels all.

        With `resume`, tokens that the client sent back are left out. Tokens that it only counted
        are computed again and come with `is_new` False.

        Raises:
            InvalidRequestError: as `TokenSource.generate`, or the client counts too many tokens.
            ClusterError: as `TokenSource.generate`.
            ModelFaultError: the logits of a sample were not finite.
        """
        limit_s = self.request_timeout_s
        deadline_s = time.monotonic() + min(limit_s, limit_s if timeout_s is None else timeout_s)
        watch = self.metrics.watch(sum(len(request.prompt_ids) for request in requests))
        num_events = 0
        # A new id for routers: when a broken stream ends, it must not cancel the one that resumes
        # it, and a client may give two requests one name.
        request_id = f"{request_id}-{secrets.token_hex(4)}"
        async with aclosing(self._events(requests, request_id, deadline_s, resume)) as events:
            async for event in events:
                num_events += 1
                if num_events % _EVENTS_PER_TURN == 0:
                    # Tokens that have arrived already are read without waiting. Other tasks would
                    # starve, and a client's disconnect would not be noticed.
                    await asyncio.sleep(0)
                if isinstance(event, PromptEvent):
                    watch.record_prompt()
                    yield event
                    continue
                if event.event.finish_reason is FinishReason.ERROR:
                    raise ModelFaultError("the model computed logits that are not finite")
                if event.is_new:
                    watch.record(event.choice_index, event.event)
                yield event

    def _events(
        self,
        requests: Sequence[GenerationRequest],
        request_id: str,
        deadline_s: float,
        resume: ResumePoint | None,
    ) -> AsyncGenerator[IngressEvent]:
        if len(requests) == 1:
            return self._run_prompt(requests[0], 0, request_id, deadline_s, resume)
        return merged(
            [
                self._run_prompt(
                    request, i * request.num_samples, f"{request_id}-{i}", deadline_s, resume
                )
                for i, request in enumerate(requests)
            ]
        )

    async def _run_prompt(
        self,
        request: GenerationRequest,
        first_choice: int,
        request_id: str,
        deadline_s: float,
        resume: ResumePoint | None,
    ) -> AsyncGenerator[IngressEvent]:
        received = (Received(),) * request.num_samples
        num_scored = 0
        if resume is not None:
            received = resume.received[first_choice : first_choice + request.num_samples]
            num_scored = resume.num_scored_of(request, received)
        counts = [len(sample.token_ids) for sample in received]
        stream = self._source.generate(
            request,
            request_id=request_id,
            deadline_s=deadline_s,
            delivered=_delivered_samples(received),
            num_scored=num_scored,
        )
        async with aclosing(stream) as events:
            async for event in events:
                if isinstance(event, PromptScores):
                    yield PromptEvent(first_choice // request.num_samples, event)
                    continue
                i = event.sample_index
                is_new = counts[i] >= received[i].num_tokens
                yield ChoiceEvent(first_choice + i, event, counts[i], is_new)
                counts[i] += 1
        for sample, count in zip(received, counts, strict=True):
            if resume is not None and count < sample.num_tokens:
                resume.refuse_count(sample.num_tokens, count)


def _delivered_samples(received: Sequence[Received]) -> list[DeliveredSample]:
    """The samples whose tokens the client sent back."""
    return [
        DeliveredSample(i, sample.token_ids, sample.is_finished)
        for i, sample in enumerate(received)
        if sample.token_ids
    ]


async def merged(
    streams: Sequence[AsyncGenerator[IngressEvent]],
) -> AsyncGenerator[IngressEvent]:
    """Merges streams: yields events as they arrive. The first error ends all streams."""
    queue: asyncio.Queue[IngressEvent | Exception | None] = asyncio.Queue(_MAX_MERGED_EVENTS)

    async def pump(stream: AsyncGenerator[IngressEvent]) -> None:
        try:
            async with aclosing(stream) as events:
                async for event in events:
                    await queue.put(event)
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    # Not a TaskGroup: a generator must not yield inside one.
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
    """Runs a function whose time grows with its input; on a thread if the input is large."""
    if num_bytes <= _INLINE_BYTES:
        return function()
    return await asyncio.to_thread(function)
