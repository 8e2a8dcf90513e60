"""What a router makes of a request's message, and what it tells ingresses of its load."""

import asyncio
from contextlib import aclosing

import pytest

from milliways.model.errors import InvalidRequestError
from milliways.router.server import LoadReports, routed_request
from milliways.v1 import router_pb2, sampling_pb2
from milliways.wire.load import Load


def message(**sampling: int) -> router_pb2.RouteRequest:
    return router_pb2.RouteRequest(
        prompt_token_ids=[5],
        max_tokens=4,
        num_samples=2,
        sampling=sampling_pb2.SamplingParams(**sampling),
        delivered=[
            router_pb2.DeliveredTokens(sample_index=1, token_ids=[7, 8], is_finished=True),
        ],
    )


def test_delivered_tokens_and_ends_are_taken_over() -> None:
    routed = routed_request(message(seed=0), 60.0)
    assert (routed.delivered, routed.finished) == ({1: (7, 8)}, {1})
    assert (routed.request.sampling.seed, routed.timeout_s) == (0, 60.0)


def test_seed_has_to_be_told() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        routed_request(message(), 60.0)
    assert caught.value.field == "sampling.seed"


def test_ingress_hears_the_load_of_all_others_when_it_has_changed() -> None:
    loads = {"a": Load(1, 10), "b": Load(2, 20), "": Load(4, 40)}
    reports = LoadReports(lambda: dict(loads), every_s=0.001, repeat_s=60)

    async def main() -> None:
        async with aclosing(reports.of_others("a")) as stream:
            assert await anext(stream) == Load(6, 60)
            changed = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0.01)
            loads["a"] = Load(100, 100)
            reports.note()
            await asyncio.sleep(0.01)
            assert not changed.done()
            loads["b"] = Load(0, 0)
            reports.note()
            assert await changed == Load(4, 40)

    asyncio.run(main())


def test_report_is_repeated_without_a_change() -> None:
    reports = LoadReports(lambda: {"b": Load(2, 20)}, every_s=0.001, repeat_s=0.002)

    async def main() -> list[Load]:
        async with aclosing(reports.of_others("a")) as stream:
            return [await anext(stream) for _ in range(3)]

    assert asyncio.run(main()) == [Load(2, 20)] * 3
