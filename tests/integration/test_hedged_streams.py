"""Silent routers: a second router gets the request as well; each token comes exactly once."""

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest
from grpc import aio

from milliways.cluster.ingress.routing.router_source import RouterSource
from milliways.cluster.ingress.routing.silence import HedgeLimits
from milliways.model.sampling_params import SamplingParams
from milliways.router.requests.request import GenerationRequest
from milliways.v1 import router_pb2
from tests.fake_routers import (
    Directory,
    FakeRouter,
    Fault,
    InOrder,
    collect,
    expected_events,
    full,
    running,
    start,
)

REQUEST = GenerationRequest(
    prompt_ids=(100,), max_tokens=12, sampling=SamplingParams(temperature=0.0), ignore_eos=True
)
# The tests do not depend on these numbers, but a router that works must answer within them.
LIMITS = HedgeLimits(after_s_min=0.2, after_s_max=0.4)


class Hedges:
    """Number of hedges."""

    def __init__(self) -> None:
        self.count = 0

    def add(self) -> None:
        self.count += 1


class DeafRouter(FakeRouter):
    """A router that can stop answering: pings at once, streams after its fault."""

    is_deaf = False

    async def Ping(self, request: router_pb2.PingRequest, context: aio.ServicerContext) -> object:
        while self.is_deaf:
            await asyncio.sleep(0.01)
        return router_pb2.PingResponse()


def deaf_after(num_tokens: int) -> DeafRouter:
    router = DeafRouter(fault=Fault.STALLS, num_before_fault=num_tokens)
    router.is_deaf = True
    return router


def run(
    scenario: Callable[[RouterSource, Directory, Hedges], Awaitable[None]], *routers: FakeRouter
) -> None:
    async def main() -> None:
        hedges = Hedges()
        async with running(*routers) as directory:
            source = RouterSource(directory, random=InOrder(), hedging=LIMITS, on_hedge=hedges.add)
            try:
                await scenario(source, directory, hedges)
            finally:
                await source.close()

    asyncio.run(main())


@pytest.mark.parametrize("num_tokens", range(0, 12, 3))
def test_requests_of_a_silent_router_go_to_another(num_tokens: int) -> None:
    routers = [deaf_after(num_tokens), FakeRouter(events_each=2)]

    async def scenario(source: RouterSource, directory: Directory, hedges: Hedges) -> None:
        assert await collect(source, REQUEST) == expected_events(REQUEST)
        assert hedges.count == 1
        # Other routers are preferred until it answers.
        assert await collect(source, REQUEST) == expected_events(REQUEST)
        assert len(routers[0].asked) == 1
        # The loser's stream ends, and its blocks are freed.
        while routers[0].num_running:
            await asyncio.sleep(0.005)

    run(scenario, *routers)
    had = [len(sample.token_ids) for sample in routers[1].asked[0].delivered]
    assert had == ([num_tokens] if num_tokens else [])


def test_slow_router_that_answers_pings_keeps_its_request() -> None:
    gate = asyncio.Event()
    routers = [DeafRouter(gate=gate), FakeRouter()]

    async def scenario(source: RouterSource, directory: Directory, hedges: Hedges) -> None:
        task = asyncio.create_task(collect(source, REQUEST))
        await asyncio.sleep(5 * LIMITS.after_s_max)
        gate.set()
        assert await task == expected_events(REQUEST)
        assert hedges.count == 0

    run(scenario, *routers)
    assert routers[1].asked == []


def test_silent_router_that_sends_the_next_token_first_wins() -> None:
    silent = DeafRouter(gate=asyncio.Event())
    other = FakeRouter(gate=asyncio.Event())
    silent.is_deaf = True

    async def scenario(source: RouterSource, directory: Directory, hedges: Hedges) -> None:
        assert silent.gate is not None
        task = asyncio.create_task(collect(source, REQUEST))
        while not other.num_running:
            await asyncio.sleep(0.005)
        silent.is_deaf = False
        silent.gate.set()
        assert await task == expected_events(REQUEST)
        assert hedges.count == 1
        while other.num_running:
            await asyncio.sleep(0.005)
        # It gets more time now, and the next request: its name comes first.
        assert await collect(source, REQUEST) == expected_events(REQUEST)
        assert [len(silent.asked), len(other.asked)] == [2, 1]

    run(scenario, silent, other)


@pytest.mark.parametrize("is_silent_first", [True, False])
def test_break_of_one_of_two_leaves_the_other(is_silent_first: bool) -> None:
    silent = DeafRouter(gate=asyncio.Event())
    silent.is_deaf = True
    other = FakeRouter(gate=asyncio.Event())
    third = FakeRouter()
    if not is_silent_first:
        other.fault = Fault.INTERNAL
        silent.gate, silent.fault, silent.num_before_fault = None, Fault.STALLS, 2

    async def scenario(source: RouterSource, directory: Directory, hedges: Hedges) -> None:
        directory.set([silent.info, other.info])
        task = asyncio.create_task(collect(source, REQUEST))
        while not other.num_running:
            await asyncio.sleep(0.005)
        directory.set([silent.info, other.info, third.info])
        assert other.gate is not None
        if is_silent_first:
            assert silent.server is not None
            await silent.server.stop(None)
        other.gate.set()
        assert await task == expected_events(REQUEST)
        assert len(third.asked) == (not is_silent_first)

    run(scenario, silent, other, third)


def test_full_second_router_costs_nothing() -> None:
    silent = DeafRouter(gate=asyncio.Event())
    silent.is_deaf = True
    other = FakeRouter(refusal=full())

    async def scenario(source: RouterSource, directory: Directory, hedges: Hedges) -> None:
        assert silent.gate is not None
        task = asyncio.create_task(collect(source, REQUEST))
        while not other.asked:
            await asyncio.sleep(0.005)
        await asyncio.sleep(LIMITS.after_s_max)
        silent.gate.set()
        assert await task == expected_events(REQUEST)

    run(scenario, silent, other)
    assert len(other.asked) == 1


def test_full_second_router_is_retried_when_the_silent_one_breaks() -> None:
    silent, other = deaf_after(0), FakeRouter(refusal=full())

    async def scenario(source: RouterSource, directory: Directory, hedges: Hedges) -> None:
        task = asyncio.create_task(collect(source, REQUEST))
        while not other.asked:
            await asyncio.sleep(0.005)
        # By now the full router has refused, and only the silent one has the request.
        await asyncio.sleep(LIMITS.after_s_max)
        other.refusal = None
        assert silent.server is not None
        await silent.server.stop(None)
        assert await task == expected_events(REQUEST)

    run(scenario, silent, other)


def test_second_router_that_appears_later_gets_the_request() -> None:
    silent, late = deaf_after(3), FakeRouter()

    async def scenario(source: RouterSource, directory: Directory, hedges: Hedges) -> None:
        task = asyncio.create_task(collect(source, REQUEST))
        while not silent.asked:
            await asyncio.sleep(0.005)
        await asyncio.sleep(2 * LIMITS.after_s_max)
        await start(late, "late")
        directory.set([silent.info, late.info])
        assert await task == expected_events(REQUEST)
        assert hedges.count == 1
        assert late.server is not None
        await late.server.stop(None)

    run(scenario, silent)


def test_client_that_leaves_frees_both_routers() -> None:
    silent = DeafRouter(gate=asyncio.Event())
    silent.is_deaf = True
    other = FakeRouter(gate=asyncio.Event())

    async def scenario(source: RouterSource, directory: Directory, hedges: Hedges) -> None:
        task = asyncio.create_task(collect(source, REQUEST))
        while not other.num_running:
            await asyncio.sleep(0.005)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        while silent.num_running or other.num_running:
            await asyncio.sleep(0.005)

    run(scenario, silent, other)


def test_concurrent_requests_close_an_unlisted_router_once() -> None:
    gone = [FakeRouter() for _ in range(5)]
    left = FakeRouter()

    async def scenario(source: RouterSource, directory: Directory, hedges: Hedges) -> None:
        directory.set([router.info for router in gone])
        await asyncio.gather(*(collect(source, REQUEST, f"r{i}") for i in range(5)))
        assert [len(router.asked) for router in gone] == [1] * 5
        directory.set([left.info])
        given = await asyncio.gather(*(collect(source, REQUEST, f"r{i}") for i in range(5)))
        assert given == [expected_events(REQUEST)] * 5

    run(scenario, left, *gone)


def test_source_that_closes_leaves_no_task() -> None:
    async def main() -> None:
        silent = deaf_after(3)
        async with running(silent) as directory:
            source = RouterSource(directory, random=InOrder(), hedging=LIMITS)
            stream = source.generate(REQUEST, request_id="r", deadline_s=time.monotonic() + 60)
            events = [await anext(stream) for _ in range(3)]
            await asyncio.sleep(2 * LIMITS.after_s_max)
            await stream.aclose()
            # The silent router is still pinged, so that it can be used again.
            await source.close()
            assert events == expected_events(REQUEST)[:3]
        await asyncio.sleep(0)
        mine = [t for t in asyncio.all_tasks() if "Router" in repr(t.get_coro())]
        assert mine == []

    asyncio.run(main())
