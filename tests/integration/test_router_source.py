"""Streams that break at any point: the client receives the tokens of the undisturbed run."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing

import pytest

from milliways.cluster.ingress.routing.router_choice import RouterInfo
from milliways.cluster.ingress.routing.router_source import RouterSource
from milliways.model.errors import InvalidRequestError, PromptTooLongError
from milliways.model.sampling_params import SamplingParams
from milliways.router.requests.journal import DeliveredSample
from milliways.router.requests.request import GenerationRequest
from milliways.router.requests.sequence import TokenEvent
from milliways.wire.errors import (
    DeadlineError,
    ModelFaultError,
    OverloadedError,
    PoisonedRequestError,
    UnavailableError,
)
from milliways.wire.load import Load
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

NUM_TOKENS = 4


def request_for(num_samples: int = 1, prompt: tuple[int, ...] = (100,)) -> GenerationRequest:
    return GenerationRequest(
        prompt_ids=prompt,
        max_tokens=NUM_TOKENS,
        num_samples=num_samples,
        sampling=SamplingParams(temperature=0.7, num_logprobs=2, seed=5, logit_bias={3: 0.1}),
        stop=("a", "b"),
        ignore_eos=True,
    )


def by_sample(events: list[TokenEvent]) -> list[TokenEvent]:
    return sorted(events, key=lambda event: event.sample_index)


def run(
    scenario: Callable[[RouterSource, Directory], Awaitable[None]],
    *routers: FakeRouter,
    max_attempts_without_progress: int = 8,
) -> None:
    async def main() -> None:
        async with running(*routers) as directory:
            limit = max_attempts_without_progress
            source = RouterSource(directory, random=InOrder(), max_attempts_without_progress=limit)
            try:
                await scenario(source, directory)
            finally:
                await source.close()

    asyncio.run(main())


@pytest.mark.parametrize("num_tokens", range(NUM_TOKENS + 1))
def test_request_continues_after_the_tokens_delivered_before(num_tokens: int) -> None:
    request = request_for(num_samples=2)
    expected = by_sample(expected_events(request))
    had = [event.token_id for event in expected[:num_tokens]]
    sample = DeliveredSample(0, tuple(had), num_tokens == NUM_TOKENS)

    async def scenario(source: RouterSource, _: Directory) -> None:
        deadline_s = time.monotonic() + 20
        stream = source.generate(
            request, request_id="r", deadline_s=deadline_s, delivered=[sample] if had else []
        )
        async with aclosing(stream) as events:
            assert by_sample([event async for event in events]) == expected[num_tokens:]

    run(scenario, FakeRouter(fault=Fault.UNAVAILABLE, num_before_fault=2), FakeRouter())


BREAKS = [fault for fault in Fault if fault is not Fault.STALLS]


@pytest.mark.parametrize("fault", BREAKS, ids=lambda fault: fault.name)
@pytest.mark.parametrize("num_samples", [1, 2])
def test_broken_stream_continues_on_another_router(fault: Fault, num_samples: int) -> None:
    request = request_for(num_samples)

    async def scenario(source: RouterSource, directory: Directory) -> None:
        given = await collect(source, request)
        # Samples have no order among each other.
        assert by_sample(given) == by_sample(expected_events(request))

    for at in range(num_samples * NUM_TOKENS):
        # The first two routers fail, at different tokens.
        routers = [
            FakeRouter(fault=fault, num_before_fault=at),
            FakeRouter(fault=fault, num_before_fault=(at * 7 + 3) % 5, events_each=2),
            FakeRouter(events_each=3),
        ]
        run(scenario, *routers)
        assert len(routers[0].asked) == 1


@pytest.mark.parametrize("num_before_fault", [0, 2])
def test_broken_stream_continues_on_the_router_with_copies(num_before_fault: int) -> None:
    request = request_for(num_samples=1)
    fault = Fault.UNAVAILABLE
    # Both routers are equally busy, so the name decides.
    first = FakeRouter(fault=fault, num_before_fault=num_before_fault, standby_id="r2")
    routers = [first, FakeRouter(), FakeRouter()]

    async def scenario(source: RouterSource, directory: Directory) -> None:
        assert await collect(source, request) == expected_events(request)

    run(scenario, *routers)
    assert [len(router.asked) for router in routers] == [1, 0, 1]


def test_next_router_receives_all_delivered_tokens() -> None:
    request = request_for(num_samples=2)
    routers = [FakeRouter(fault=Fault.UNAVAILABLE, num_before_fault=7), FakeRouter()]

    async def scenario(source: RouterSource, directory: Directory) -> None:
        await collect(source, request, timeout_s=20.0)

    run(scenario, *routers)
    (first,), (second,) = routers[0].asked, routers[1].asked
    assert list(first.delivered) == []
    delivered = [(s.sample_index, list(s.token_ids), s.is_finished) for s in second.delivered]
    assert delivered == [(0, [101, 102, 103, 104], True), (1, [102, 104, 106], False)]
    assert list(second.prompt_token_ids) == [100]
    assert (second.sampling.seed, second.sampling.num_logprobs) == (5, 2)
    assert (list(second.stop), second.ignore_eos, second.request_id) == (["a", "b"], True, "r")
    assert 0 < second.timeout_ms <= 20_000


def test_only_router_is_retried_after_its_stream_broke() -> None:
    router = FakeRouter(fault=Fault.INTERNAL, num_before_fault=2, num_faults=1)

    async def scenario(source: RouterSource, directory: Directory) -> None:
        assert await collect(source, request_for()) == expected_events(request_for())

    run(scenario, router)
    assert len(router.asked) == 2


def test_stream_waits_for_a_router() -> None:
    dying, late = FakeRouter(fault=Fault.DIES, num_before_fault=2), FakeRouter()

    async def scenario(source: RouterSource, directory: Directory) -> None:
        task = asyncio.create_task(collect(source, request_for()))
        while not dying.asked or dying.num_running:
            await asyncio.sleep(0.01)
        directory.set([])
        await start(late, "late")
        directory.set([late.info])
        assert await task == expected_events(request_for())
        assert late.server is not None
        await late.server.stop(None)

    run(scenario, dying)


def test_without_routers_the_request_waits_until_its_deadline() -> None:
    async def scenario(source: RouterSource, directory: Directory) -> None:
        with pytest.raises(UnavailableError, match="no router is available"):
            await collect(source, request_for(), timeout_s=0.2)
        directory.set([RouterInfo("gone", "127.0.0.1:1")])
        with pytest.raises(UnavailableError, match="router gone"):
            await collect(source, request_for(), timeout_s=0.3)

    run(scenario)


def test_slow_router_meets_the_deadline() -> None:
    async def scenario(source: RouterSource, directory: Directory) -> None:
        with pytest.raises(DeadlineError):
            await collect(source, request_for(), timeout_s=0.3)

    run(scenario, FakeRouter(gate=asyncio.Event()))


def test_full_router_sends_a_request_to_another() -> None:
    routers = [FakeRouter(refusal=full()), FakeRouter()]

    async def scenario(source: RouterSource, directory: Directory) -> None:
        assert await collect(source, request_for()) == expected_events(request_for())

    run(scenario, *routers)
    assert len(routers[0].asked) == 1


def test_all_routers_full_is_an_error_at_once() -> None:
    async def scenario(source: RouterSource, directory: Directory) -> None:
        with pytest.raises(OverloadedError, match="no room") as caught:
            await collect(source, request_for())
        assert caught.value.retry_after_s == 1.5

    run(scenario, FakeRouter(refusal=full()), FakeRouter(refusal=full()))


def test_stream_that_has_begun_waits_for_room() -> None:
    routers = [FakeRouter(fault=Fault.UNAVAILABLE, num_before_fault=2), FakeRouter(refusal=full())]

    async def scenario(source: RouterSource, directory: Directory) -> None:
        directory.set([router.info for router in routers])
        task = asyncio.create_task(collect(source, request_for()))
        while not routers[1].asked:
            await asyncio.sleep(0.01)
        directory.set([routers[1].info])
        while len(routers[1].asked) < 3:
            await asyncio.sleep(0.01)
        routers[1].refusal = None
        assert await task == expected_events(request_for())

    run(scenario, *routers)


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequestError("logit_bias", 9999, "below 1280"),
        PromptTooLongError(600, 512),
        ModelFaultError("not finite"),
        PoisonedRequestError("two workers died"),
        DeadlineError("too late"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_error_of_the_request_is_raised_without_a_retry(error: Exception) -> None:
    routers = [FakeRouter(refusal=error), FakeRouter()]

    async def scenario(source: RouterSource, directory: Directory) -> None:
        kind = InvalidRequestError if isinstance(error, PromptTooLongError) else type(error)
        with pytest.raises(kind) as caught:
            await collect(source, request_for())
        assert str(caught.value) == str(error)
        if isinstance(error, InvalidRequestError):
            refused = caught.value
            assert isinstance(refused, InvalidRequestError)
            assert (refused.field, repr(refused.value)) == (error.field, repr(error.value))

    run(scenario, *routers)
    assert routers[1].asked == []


def test_request_that_no_router_survives_is_given_up() -> None:
    def deadly() -> FakeRouter:
        return FakeRouter(fault=Fault.UNAVAILABLE, num_faults=99)

    routers = [deadly(), deadly()]

    async def scenario(source: RouterSource, directory: Directory) -> None:
        with pytest.raises(PoisonedRequestError, match="3 routers in a row"):
            await collect(source, request_for())

    run(scenario, *routers, max_attempts_without_progress=3)
    assert sum(len(router.asked) for router in routers) == 3


def test_router_that_makes_progress_may_break_any_number_of_times() -> None:
    async def scenario(source: RouterSource, directory: Directory) -> None:
        assert await collect(source, request_for(4)) == expected_events(request_for(4))

    router = FakeRouter(fault=Fault.UNAVAILABLE, num_before_fault=1, num_faults=99)
    run(scenario, router, max_attempts_without_progress=2)
    assert len(router.asked) == 4 * NUM_TOKENS


@pytest.mark.parametrize("num_taken", [0, 1])
def test_closing_the_stream_frees_it_at_the_router(num_taken: int) -> None:
    router = FakeRouter(gate=asyncio.Event())

    async def scenario(source: RouterSource, directory: Directory) -> None:
        assert router.gate is not None
        if num_taken:
            router.gate.set()
        stream = source.generate(request_for(), request_id="r", deadline_s=time.monotonic() + 20)
        task = asyncio.ensure_future(anext(stream))
        while not router.asked:
            await asyncio.sleep(0.005)
        if num_taken:
            await task
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await stream.aclose()
        async with asyncio.timeout(5):
            while router.num_running:
                await asyncio.sleep(0.005)

    run(scenario, router)


def test_requests_spread_by_load_and_follow_their_prefix() -> None:
    gate = asyncio.Event()
    routers = [FakeRouter(gate=gate), FakeRouter(gate=gate)]
    prompts = [tuple(range(100)), tuple(range(100, 200))]

    async def scenario(source: RouterSource, directory: Directory) -> None:
        requests = [request_for(prompt=prompt) for prompt in prompts]
        first = []
        for i, request in enumerate(requests):
            first.append(asyncio.create_task(collect(source, request)))
            while sum(len(router.asked) for router in routers) <= i:
                await asyncio.sleep(0.005)
        gate.set()
        await asyncio.gather(*first)
        assert [len(router.asked) for router in routers] == [1, 1]
        for request in (requests[1], requests[1], requests[0]):
            await collect(source, request)
        assert [len(router.asked) for router in routers] == [2, 3]

    run(scenario, *routers)


def test_probe_makes_a_token_or_says_why_not() -> None:
    router = FakeRouter(refusal=UnavailableError("all workers are gone"))

    async def scenario(source: RouterSource, directory: Directory) -> None:
        with pytest.raises(UnavailableError, match="all workers are gone"):
            await source.probe()
        num_failed = len(router.asked)
        router.refusal = None
        await source.probe()
        assert len(router.asked) == num_failed + 1
        # A token came just now, so no probe is sent.
        await source.probe()
        assert len(router.asked) == num_failed + 1

    run(scenario, router)


def test_request_goes_where_other_ingresses_have_least() -> None:
    routers = FakeRouter(loads={"other": Load(64, 0)}), FakeRouter(loads={"other": Load(1, 0)})

    async def scenario(source: RouterSource, directory: Directory) -> None:
        await source.first_loads()
        assert await collect(source, request_for()) == expected_events(request_for())
        routers[0].loads = {}
        routers[0].load_reports.note()
        while source._choice.weight("r0", time.monotonic()) > 0:
            await asyncio.sleep(0.01)
        assert await collect(source, request_for()) == expected_events(request_for())

    run(scenario, *routers)
    assert [len(router.asked) for router in routers] == [1, 1]
    assert len({router.asked[0].ingress_id for router in routers}) == 1


def test_requests_of_an_ingress_are_not_in_what_it_hears() -> None:
    router = FakeRouter(gate=asyncio.Event())

    async def scenario(source: RouterSource, directory: Directory) -> None:
        await source.first_loads()
        asked = asyncio.ensure_future(collect(source, request_for(num_samples=3)))
        while not router.asked:
            await asyncio.sleep(0.01)
        router.loads = {router.asked[0].ingress_id: Load(3, 0), "other": Load(5, 0)}
        router.load_reports.note()
        while source._choice.weight("r0", time.monotonic()) < 5:
            await asyncio.sleep(0.01)
        prompt_weight = Load(0, 1).weight
        assert source._choice.weight("r0", time.monotonic()) == 5 + 3 + prompt_weight
        router.gate.set()
        await asked
        assert source._choice.weight("r0", time.monotonic()) == 5

    run(scenario, router)
