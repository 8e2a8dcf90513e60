"""Single parts of the ingress: readiness, metrics, merged streams, and fields of bodies."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import pytest

from milliways.cluster.ingress import readiness as readiness_module
from milliways.cluster.ingress.ingress import ChoiceEvent, merged
from milliways.cluster.ingress.metrics import IngressMetrics
from milliways.cluster.ingress.openai.values import (
    parse_content,
    parse_logit_bias,
    parse_prompts,
    parse_stop,
)
from milliways.cluster.ingress.readiness import Readiness
from milliways.model.config import ModelConfig
from milliways.model.errors import InvalidRequestError
from milliways.router.requests.request import GenerationRequest
from milliways.wire.errors import OverloadedError, UnavailableError
from tests.ingresses import demo_model
from tests.sources import CountingSource, counted_events


def events_of(max_tokens: int, num_samples: int = 1) -> list[ChoiceEvent]:
    request = GenerationRequest(prompt_ids=(5,), max_tokens=max_tokens, num_samples=num_samples)
    return [
        ChoiceEvent(event.sample_index, event, i // num_samples)
        for i, event in enumerate(counted_events(request))
    ]


async def streamed(events: list[ChoiceEvent], closed: list[int]) -> AsyncGenerator[ChoiceEvent]:
    try:
        for event in events:
            await asyncio.sleep(0)
            yield event
    finally:
        closed.append(len(events))


async def failing(error: Exception) -> AsyncGenerator[ChoiceEvent]:
    await asyncio.sleep(0)
    raise error
    yield


def test_merged_streams_lose_nothing_and_keep_the_order_of_each() -> None:
    async def main() -> None:
        closed: list[int] = []
        streams = [streamed(events_of(n), closed) for n in (1, 100, 300)]
        together = [event async for event in merged(streams)]
        assert len(together) == 401
        assert sorted(closed) == [1, 100, 300]

    asyncio.run(main())


def test_first_error_ends_all_merged_streams() -> None:
    async def main() -> None:
        closed: list[int] = []
        endless = streamed(events_of(10_000), closed)
        with pytest.raises(OverloadedError):
            async for _ in merged([endless, failing(OverloadedError("full"))]):
                pass
        assert closed == [10_000]
        again = merged([streamed(events_of(10_000), closed)])
        await anext(again)
        await again.aclose()
        assert closed == [10_000] * 2

    asyncio.run(main())


def test_readiness_probes_once_for_all_callers_and_again_a_second_later() -> None:
    async def main() -> None:
        now_s = 0.0
        source = CountingSource()
        readiness = Readiness(source, clock=lambda: now_s)
        await asyncio.gather(*(readiness.check() for _ in range(5)))
        now_s = 0.9
        source.probe_error = UnavailableError("gone")
        await readiness.check()
        assert source.num_probes == 1
        now_s = 1.0
        with pytest.raises(UnavailableError, match="gone"):
            await readiness.check()
        assert source.num_probes == 2
        now_s = 2.1
        source.probe_error = RuntimeError("a bug")
        with pytest.raises(UnavailableError, match="the probe failed"):
            await readiness.check()
        now_s, source.probe_error = 3.2, None
        await readiness.check()
        readiness.drain("stopping")
        with pytest.raises(UnavailableError, match="stopping"):
            await readiness.check()

    asyncio.run(main())


def test_probe_that_hangs_means_not_ready() -> None:
    class Hanging(CountingSource):
        async def probe(self) -> None:
            await asyncio.Event().wait()

    async def main() -> None:
        readiness = Readiness(Hanging(), probe_timeout_s=0.05)
        with pytest.raises(UnavailableError, match=r"no token within 0\.05 s"):
            await readiness.check()

    asyncio.run(main())


def test_a_caller_is_answered_at_once_while_a_probe_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when an expert is nowhere: a token may come again, but nobody knows when."""
    monkeypatch.setattr(readiness_module, "ANSWER_WITHIN_S", 0.02)

    class Slow(CountingSource):
        def __init__(self) -> None:
            super().__init__()
            self.may_answer = asyncio.Event()
            self.may_answer.set()

        async def probe(self) -> None:
            await self.may_answer.wait()

    async def main() -> None:
        now_s, source = 0.0, Slow()
        readiness = Readiness(source, clock=lambda: now_s, probe_timeout_s=0.3)
        source.may_answer.clear()
        with pytest.raises(UnavailableError, match="so far"):
            await readiness.check()
        source.may_answer.set()
        await asyncio.sleep(0.01)
        await readiness.check()
        # A slow probe alone does not make it unready, one that fails does.
        source.may_answer.clear()
        now_s = 2.0
        await readiness.check()
        await asyncio.sleep(0.5)
        with pytest.raises(UnavailableError, match=r"no token within 0\.3 s"):
            await readiness.check()
        source.may_answer.set()

    asyncio.run(main())


def test_times_are_measured_for_each_request_and_sample() -> None:
    now_s = 10.0
    metrics = IngressMetrics(clock=lambda: now_s)
    watch = metrics.watch(num_prompt_tokens=3)
    for event in events_of(3, num_samples=2):
        now_s += 0.5
        watch.record(event.choice_index, event.event)

    def value(name: str) -> float | None:
        return metrics.registry.get_sample_value(f"milliways_{name}")

    assert value("time_to_first_token_seconds_sum") == 0.5
    assert value("time_per_output_token_seconds_count") == 2
    # Each sample has two tokens after its first, one second apart.
    assert value("time_per_output_token_seconds_sum") == 2.0
    assert metrics.registry.get_sample_value("milliways_tokens_total", {"kind": "prompt"}) == 3
    assert metrics.registry.get_sample_value("milliways_tokens_total", {"kind": "completion"}) == 6


@pytest.mark.parametrize(
    ("value", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [(1, 2)]),
        ([[1, 2], [3]], [(1, 2), (3,)]),
    ],
)
def test_prompt_comes_in_four_forms(value: Any, prompts: list[Any]) -> None:
    assert parse_prompts(value) == prompts


def test_stop_and_content_come_in_two_forms() -> None:
    assert [parse_stop(value) for value in (None, "a", ["a", "b"])] == [(), ("a",), ("a", "b")]
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert parse_content("c", "ab") == parse_content("c", parts) == "ab"


@pytest.mark.parametrize("key", ["", "-1", "1.0", " 1", "٣", "9" * 11])
def test_bias_is_keyed_by_token_ids_only(key: str) -> None:
    assert parse_logit_bias({"7": 1.5}) == {7: 1.5}
    with pytest.raises(InvalidRequestError, match="logit_bias"):
        parse_logit_bias({key: 1.0})


def test_model_is_written_out_once_for_all_its_fingerprints(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written: list[ModelConfig] = []
    write = ModelConfig.__repr__

    def counted(config: ModelConfig) -> str:
        written.append(config)
        return write(config)

    weights = ["one"]
    model = replace(demo_model(), weights=lambda: weights[0])
    monkeypatch.setattr(ModelConfig, "__repr__", counted)
    assert len({model.fingerprint for _ in range(100)}) == 1
    weights[0] = "other"
    assert model.fingerprint != replace(model, weights=lambda: "one").fingerprint
    assert len(written) <= 2
