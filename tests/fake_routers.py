"""Fake routers without a model: servers of RouterService that count, and fail on demand."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from random import Random

import grpc
from grpc import aio

from milliways.cluster.ingress.routing.router_choice import RouterInfo
from milliways.cluster.ingress.routing.router_source import RouterSource
from milliways.router.requests.messages import event_to_wire, scores_to_wire
from milliways.router.requests.request import GenerationRequest
from milliways.router.requests.sequence import TokenEvent
from milliways.router.server import LoadReports
from milliways.v1 import router_pb2, router_pb2_grpc
from milliways.wire.channels import SERVER_OPTIONS, add_port
from milliways.wire.errors import OverloadedError
from milliways.wire.load import Load
from milliways.wire.sampling import decode_params
from milliways.wire.status_codes import ACCEPTED_KEY, status_of
from milliways.wire.tls import TlsSettings
from tests.sources import counted_events, counted_score_events


class Fault(Enum):
    """How a stream fails."""

    UNAVAILABLE = "unavailable"
    CANCELLED = "cancelled"
    INTERNAL = "internal"
    UNKNOWN = "unknown"
    ENDS_EARLY = "ends early"
    MOVES = "moves"
    REPEATS = "repeats the token before"
    SKIPS = "leaves a token out"
    DIES = "the server stops"
    STALLS = "nothing more comes"


STATUSES = {
    Fault.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    Fault.CANCELLED: grpc.StatusCode.CANCELLED,
    Fault.INTERNAL: grpc.StatusCode.INTERNAL,
}


class InOrder(Random):
    """Breaks ties in favour of the first router, so that a test can say which one is asked."""

    def random(self) -> float:
        return 0.0


@dataclass
class Directory:
    """A list of routers that tests can change."""

    infos: list[RouterInfo] = field(default_factory=list)
    _event: asyncio.Event = field(default_factory=asyncio.Event)

    def routers(self) -> Sequence[RouterInfo]:
        return list(self.infos)

    async def changed(self) -> None:
        await self._event.wait()

    def set(self, infos: Sequence[RouterInfo]) -> None:
        self.infos = list(infos)
        self._event.set()
        self._event = asyncio.Event()


@dataclass
class FakeRouter(router_pb2_grpc.RouterServiceServicer):
    """Counts for each request; the first `num_faults` streams fail."""

    fault: Fault | None = None
    # Events of a stream before it fails.
    num_before_fault: int = 0
    num_faults: int = 1
    # After this many scores a faulty stream ends with UNAVAILABLE, whatever its fault.
    num_scores_before_fault: int = 1 << 30
    refusal: Exception | None = None
    # If given, streams wait for this before their first event.
    gate: asyncio.Event | None = None
    # If given, each response with events acquires this first.
    tokens_allowed: asyncio.Semaphore | None = None
    events_each: int = 1
    # Sent with the first response.
    standby_id: str = ""
    info: RouterInfo = field(default_factory=lambda: RouterInfo("", ""))
    server: aio.Server | None = None
    stopping: asyncio.Task[None] | None = None
    asked: list[router_pb2.RouteRequest] = field(default_factory=list)
    num_running: int = 0
    # What it has of each ingress, beside the requests of a test.
    loads: dict[str, Load] = field(default_factory=dict)
    load_reports: LoadReports = field(init=False)

    def __post_init__(self) -> None:
        self.load_reports = LoadReports(lambda: self.loads)

    async def Route(self, request: router_pb2.RouteRequest, context: aio.ServicerContext) -> None:
        self.asked.append(request)
        if self.refusal is not None:
            status = status_of(self.refusal)
            code = grpc.StatusCode[status.code]
            await context.abort(code, status.message, status.trailing_metadata)
        await context.send_initial_metadata(((ACCEPTED_KEY, "1"),))
        self.num_running += 1
        try:
            if self.gate is not None:
                await self.gate.wait()
            await self._stream(request, context)
        finally:
            self.num_running -= 1

    async def WatchLoad(
        self, request: router_pb2.WatchLoadRequest, context: aio.ServicerContext
    ) -> None:
        async for load in self.load_reports.of_others(request.ingress_id):
            report = router_pb2.WatchLoadResponse(
                num_sequences=load.num_sequences, num_prompt_tokens=load.num_prompt_tokens
            )
            await context.write(report)

    async def _stream(self, request: router_pb2.RouteRequest, context: aio.ServicerContext) -> None:
        if self.standby_id:
            await context.write(router_pb2.RouteResponse(standby_id=self.standby_id))
        is_faulty = self.fault is not None and self.num_faults > 0
        num_scored = request.num_delivered_prompt_logprobs
        for scores in counted_score_events(request_of(request), num_scored, self.events_each):
            if is_faulty and num_scored >= self.num_scores_before_fault:
                self.num_faults -= 1
                await context.abort(grpc.StatusCode.UNAVAILABLE, "RST_STREAM")
            num_scored += len(scores.tokens)
            wired = scores_to_wire(scores)
            await context.write(router_pb2.RouteResponse(prompt_logprobs=wired))
        events = remaining_events(request)
        stop = self.num_before_fault if is_faulty else len(events)
        for start in range(0, min(stop, len(events)), self.events_each):
            some = events[start : min(start + self.events_each, stop)]
            if self.tokens_allowed is not None:
                await self.tokens_allowed.acquire()
            await context.write(router_pb2.RouteResponse(events=some))
        if is_faulty and stop < len(events):
            self.num_faults -= 1
            await self._go_wrong(events, stop, context)

    async def _go_wrong(
        self, events: list[router_pb2.TokenEvent], at: int, context: aio.ServicerContext
    ) -> None:
        if self.fault in STATUSES:
            await context.abort(STATUSES[self.fault], "RST_STREAM")
        elif self.fault is Fault.UNKNOWN:
            raise RuntimeError("a bug")
        elif self.fault is Fault.MOVES:
            await context.write(router_pb2.RouteResponse(has_moved=True))
        elif self.fault is Fault.REPEATS:
            again = [events[max(0, at - 1)], *events[at:]]
            await context.write(router_pb2.RouteResponse(events=again))
        elif self.fault is Fault.SKIPS:
            await context.write(router_pb2.RouteResponse(events=events[at + 1 :]))
        elif self.fault is Fault.DIES:
            assert self.server is not None
            # Not in this call, because stopping cancels it.
            self.stopping = asyncio.create_task(self.server.stop(None))
            await asyncio.Event().wait()
        elif self.fault is Fault.STALLS:
            await asyncio.Event().wait()


def remaining_events(request: router_pb2.RouteRequest) -> list[router_pb2.TokenEvent]:
    """The events of an undisturbed run that are not delivered yet."""
    done = {sample.sample_index: sample for sample in request.delivered}
    counts: dict[int, int] = {}
    remaining: list[router_pb2.TokenEvent] = []
    for event in counted_events(request_of(request)):
        index = counts.get(event.sample_index, 0)
        counts[event.sample_index] = index + 1
        delivered = done[event.sample_index].token_ids if event.sample_index in done else ()
        if index < len(delivered):
            assert delivered[index] == event.token_id
        else:
            remaining.append(event_to_wire(event, index))
    return remaining


def request_of(message: router_pb2.RouteRequest) -> GenerationRequest:
    return GenerationRequest(
        prompt_ids=tuple(message.prompt_token_ids),
        max_tokens=message.max_tokens,
        sampling=decode_params(message.sampling),
        num_samples=message.num_samples,
        stop=tuple(message.stop),
        ignore_eos=message.ignore_eos,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
    )


def expected_events(request: GenerationRequest) -> list[TokenEvent]:
    return [replace(event) for event in counted_events(request)]


async def collect(
    source: RouterSource,
    request: GenerationRequest,
    request_id: str = "r",
    timeout_s: float = 60.0,
) -> list[TokenEvent]:
    """All events of a request."""
    deadline_s = time.monotonic() + timeout_s
    stream = source.generate(request, request_id=request_id, deadline_s=deadline_s)
    async with aclosing(stream) as events:
        return [event async for event in events]


@asynccontextmanager
async def running(*routers: FakeRouter) -> AsyncIterator[Directory]:
    """Serves fake routers named r0, r1, ...; asserts that no stream is left at the end."""
    for i, router in enumerate(routers):
        await start(router, f"r{i}")
    try:
        yield Directory([router.info for router in routers])
    finally:
        await asyncio.gather(*(r.server.stop(None) for r in routers if r.server is not None))
        assert [router.num_running for router in routers] == [0] * len(routers)


async def start(router: FakeRouter, worker_id: str, tls: TlsSettings | None = None) -> None:
    """Serves a router on a new port, also if it was stopped before."""
    server = aio.server(options=[*SERVER_OPTIONS, ("grpc.so_reuseport", 0)])
    router_pb2_grpc.add_RouterServiceServicer_to_server(router, server)
    port = add_port(server, "127.0.0.1:0", tls or TlsSettings())
    await server.start()
    router.server = server
    router.info = RouterInfo(worker_id, f"127.0.0.1:{port}")


def full(message: str = "no room") -> OverloadedError:
    return OverloadedError(message, retry_after_s=1.5)


async def serve_stalling(num_before_stall: int) -> None:
    """The main program of a process with a router that stalls; prints its address."""
    router = FakeRouter(fault=Fault.STALLS, num_before_fault=num_before_stall)
    await start(router, "own process")
    print(router.info.address, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve_stalling(2))
