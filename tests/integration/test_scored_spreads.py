"""Prompts get exactly the scores of a single process, for any spread of the model."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from milliways.cluster.control.planner import AttentionCut
from milliways.model.sampling_params import SampledToken, SamplingParams
from milliways.router.engine import LocalEngine
from milliways.router.limits import SchedulerLimits
from milliways.router.requests.admission import RoutedRequest
from milliways.router.requests.request import GenerationRequest
from milliways.router.requests.sequence import PromptScores
from tests.integration.test_cluster_bits import make_cluster
from tests.memory_cluster import ClusterSettings
from tests.runners import load, runner_of
from tests.spreads import CACHE, VOCAB_SIZE, Spread, by_sample

REQUESTS = [
    GenerationRequest(
        prompt_ids=tuple((5 * i + start) % VOCAB_SIZE for i in range(length)),
        max_tokens=max_tokens,
        num_samples=2,
        sampling=SamplingParams(temperature=0.0, num_logprobs=3),
        prompt_logprobs=3,
    )
    # More rows than logits fit at once; two prompts share a prefix.
    for start, length, max_tokens in ((3, 75, 4), (3, 60, 0), (8, 9, 2), (8, 1, 0))
]


def scores_of(events: Iterable[Any]) -> list[SampledToken]:
    """Joins the scores of all pieces."""
    scores: list[SampledToken] = []
    for event in events:
        if isinstance(event, PromptScores):
            assert event.position == len(scores) + 1
            scores += event.tokens
    return scores


@pytest.mark.parametrize(
    "spread",
    [
        Spread(1, 1, AttentionCut.REPLICATED),
        Spread(3, 2, AttentionCut.REPLICATED),
        Spread(3, 1, AttentionCut.LAYERS),
    ],
    ids=str,
)
@pytest.mark.parametrize("max_step_tokens", [7, 128])
def test_any_spread_scores_prompts_as_one_process(
    golden_dir: Path, spread: Spread, max_step_tokens: int
) -> None:
    model_dir = golden_dir / "tiny"
    engine = LocalEngine(runner_of(load(model_dir), cache_size=CACHE), tokenizer=None)
    scheduler = SchedulerLimits(max_step_tokens=max_step_tokens)
    settings = ClusterSettings(cache_size=CACHE, scheduler=scheduler)
    cluster = make_cluster(model_dir, spread, settings)
    router_id = min(cluster.routers)
    # Twice: the second time every block of the prompts is cached.
    for i, request in enumerate([*REQUESTS, *REQUESTS]):
        routed = RoutedRequest(request_id=str(i), request=request, timeout_s=1e6)
        recording = cluster.submit(router_id, str(i), routed)
        cluster.run_until(lambda recording=recording: recording.has_ended, 1e6)
        alone = list(engine.generate(request))
        assert scores_of(recording.scores) == scores_of(alone)
        tokens = [event for event in alone if not isinstance(event, PromptScores)]
        assert by_sample(recording.events) == by_sample(tokens)
    cluster.settle()
    cluster.close()
