"""The engine over a real small model: requests beside each other get what they get alone."""

from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from milliways.model.decoder import Decoder
from milliways.model.errors import InvalidRequestError
from milliways.model.params import ModelParams
from milliways.model.runner import CacheSize
from milliways.model.sampling_params import SamplingParams
from milliways.router.engine import LocalEngine
from milliways.router.limits import SchedulerLimits
from milliways.router.requests.request import GenerationRequest
from milliways.router.requests.sequence import FinishReason, TokenEvent
from tests.runners import load, runner_of

EOS = 2
Model = tuple[Decoder, ModelParams]
Stream = list[tuple[int, float]]


@pytest.fixture(scope="module")
def model(golden_dir: Path) -> Model:
    return load(golden_dir / "tiny")


def make_engine(model: Model, num_blocks: int = 64, **limits: int) -> LocalEngine:
    size = CacheSize(num_blocks=num_blocks, max_slots=8)
    limits = {"max_running": 8} | limits
    return LocalEngine(runner_of(model, cache_size=size), None, SchedulerLimits(**limits))


def make_request(prompt: Items[int], max_tokens: int = 12, **fields: Any) -> GenerationRequest:
    sampling = SamplingParams(**fields.pop("sampling", {"temperature": 0.0}))
    return GenerationRequest(
        prompt_ids=tuple(prompt),
        max_tokens=max_tokens,
        sampling=sampling,
        **({"ignore_eos": True} | fields),
    )


REQUESTS = [
    make_request(range(10, 31)),
    make_request([7], sampling={"temperature": 1.0, "seed": 3}),
    make_request(range(10, 60), sampling={"temperature": 0.8, "top_p": 0.9, "seed": 1 << 40}),
    make_request(range(10, 43), sampling={"temperature": 1.2, "top_k": 20, "seed": 4}),
    make_request(
        [9, 9, 8, 9],
        sampling={
            "temperature": 0.9,
            "repetition_penalty": 1.3,
            "frequency_penalty": 0.5,
            "logit_bias": {40: 2.0},
        },
    ),
    make_request([100, 101], 30, sampling={"temperature": 1.0, "num_logprobs": 4}),
]


@pytest.fixture(scope="module")
def alone(model: Model) -> list[Stream]:
    """Tokens and log-probabilities of each request served by itself."""
    return [stream_of(list(make_engine(model).generate(request))) for request in REQUESTS]


def stream_of(events: list[TokenEvent]) -> Stream:
    return [(event.token_id, event.logprob) for event in events]


def serve_together(engine: LocalEngine, arrivals: dict[int, list[int]]) -> list[Stream]:
    """Adds requests at the given steps; returns each one's stream."""
    streams: list[Stream] = [[] for _ in REQUESTS]
    owners: dict[int, int] = {}
    step = 0
    while engine.has_work or step <= max(arrivals):
        for index in arrivals.get(step, []):
            (sequence,) = engine.add(REQUESTS[index])
            owners[id(sequence)] = index
        if engine.has_work:
            for sequence, event in engine.step():
                streams[owners[id(sequence)]].append((event.token_id, event.logprob))
        step += 1
    return streams


@pytest.mark.parametrize(
    ("arrivals", "settings"),
    [
        ({0: [0, 1, 2, 3, 4, 5]}, {}),
        ({0: [5], 2: [4, 2], 3: [3], 9: [0, 1]}, {"max_step_tokens": 16}),
        ({0: [2, 0], 1: [1, 3], 12: [5, 4]}, {"max_running": 2, "max_step_tokens": 7}),
        # Too few blocks for all: sequences are preempted and computed anew.
        ({0: [0, 1, 2, 3, 4, 5]}, {"num_blocks": 6}),
    ],
)
def test_requests_beside_each_other_get_the_bits_they_get_alone(
    model: Model, alone: list[Stream], arrivals: dict[int, list[int]], settings: dict[str, int]
) -> None:
    engine = make_engine(model, **settings)
    assert serve_together(engine, arrivals) == alone
    assert engine.pool.num_held == 0
    engine.pool.check_integrity()


def test_prefix_in_the_cache_changes_nothing(model: Model, alone: list[Stream]) -> None:
    engine = make_engine(model)
    for _ in range(2):
        for request, expected in zip(REQUESTS, alone, strict=True):
            assert stream_of(list(engine.generate(request))) == expected


def test_samples_differ_and_the_first_is_the_one_drawn_alone(model: Model) -> None:
    sampling = {"temperature": 1.0, "seed": 11}
    single = list(make_engine(model).generate(make_request(range(20, 40), sampling=sampling)))
    request = make_request(range(20, 40), sampling=sampling, num_samples=3)
    samples: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for event in make_engine(model).generate(request):
        samples[event.sample_index].append(event.token_id)
    assert samples[0] == [event.token_id for event in single]
    assert len({tuple(sample) for sample in samples.values()}) == 3


def test_end_of_sequence_token_ends_the_text(model: Model) -> None:
    sampling = {"temperature": 0.0, "logit_bias": {EOS: 100.0}}
    events = list(
        make_engine(model).generate(make_request([5, 6], sampling=sampling, ignore_eos=False))
    )
    assert [(e.token_id, e.finish_reason) for e in events] == [(EOS, FinishReason.STOP)]


def test_sequence_ends_where_the_context_ends(model: Model) -> None:
    context = model[0].config.sequence_len
    events = list(make_engine(model).generate(make_request([5] * (context - 3), 50)))
    assert len(events) == 3 and events[-1].finish_reason is FinishReason.LENGTH
    # A prompt that fills the context still has a next token.
    assert len(list(make_engine(model).generate(make_request([5] * context, 50)))) == 1


def test_consumer_that_stops_listening_frees_the_blocks(model: Model) -> None:
    engine = make_engine(model)
    stream = engine.generate(make_request(range(10, 40), 40, num_samples=2))
    next(stream)
    assert engine.pool.num_held > 0
    stream.close()
    assert engine.pool.num_held == 0 and not engine.has_work


def test_streams_that_are_open_at_once_lose_no_event_to_each_other(model: Model) -> None:
    first, second = make_request([5, 6], 6, num_samples=2), make_request([7, 8, 9], 9)
    alone = [stream_of(list(make_engine(model).generate(request))) for request in (first, second)]
    engine = make_engine(model)
    paused = engine.generate(first)
    events = [next(paused)]
    # Its steps compute the paused stream as well, up to its end.
    assert stream_of(list(engine.generate(second))) == alone[1]
    events += paused
    assert stream_of(events) == alone[0]
    assert engine.pool.num_held == 0 and not engine.has_work


def test_requests_run_together_keep_their_events_apart(model: Model, alone: list[Stream]) -> None:
    together: list[list[TokenEvent]] = [[] for _ in REQUESTS]
    for index, event in make_engine(model).generate_all(REQUESTS):
        assert isinstance(event, TokenEvent)
        together[index].append(event)
    assert [stream_of(events) for events in together] == alone


def test_batch_with_a_request_that_does_not_fit_runs_none_of_it(model: Model) -> None:
    engine = make_engine(model, num_blocks=4)
    with pytest.raises(InvalidRequestError):
        list(engine.generate_all([make_request([5], 4), make_request([5], 1000)]))
    assert engine.pool.num_held == 0 and not engine.has_work


def test_model_that_computes_nan_fails_the_sequence_and_frees_its_blocks(model: Model) -> None:
    decoder, params = model
    ends = params.ends.replace(embedding_VD=params.ends.embedding_VD * jnp.nan)
    broken = ModelParams(ends=ends, attention_L=params.attention_L, experts_L=params.experts_L)
    engine = make_engine((decoder, broken))
    events = list(engine.generate(make_request([10, 11, 12])))
    assert [event.finish_reason for event in events] == [FinishReason.ERROR]
    assert engine.pool.num_held == 0 and not engine.has_work
