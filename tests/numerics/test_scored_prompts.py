"""Scores of prompts are the log-softmax of the full logits, with the same bits in any chunks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from milliways.model.runner import MAX_LOGITS_ROWS, CacheSize, StepMode
from milliways.model.sampling_params import SampledToken, SamplingParams
from milliways.router.engine import LocalEngine
from milliways.router.limits import SchedulerLimits
from milliways.router.requests.request import GenerationRequest
from milliways.router.requests.sequence import PromptScores
from tests.runners import Model, load, logits_of, runner_of

# More rows than are held at once, and not a multiple of a chunk.
PROMPT = tuple((7 * i + 3) % 250 for i in range(MAX_LOGITS_ROWS * 2 + 9))
NUM_TOP = 5


@pytest.fixture(scope="module")
def model(golden_dir: Path) -> Model:
    return load(golden_dir / "tiny")


def engine_of(model: Model, mode: StepMode = StepMode.HALVES, **limits: int) -> LocalEngine:
    size = CacheSize(num_blocks=32, max_slots=8)
    runner = runner_of(model, mode, size)
    return LocalEngine(runner, None, SchedulerLimits(max_running=8, **limits))


def request_for(prompt: tuple[int, ...] = PROMPT, **fields: Any) -> GenerationRequest:
    given = {"max_tokens": 2, "prompt_logprobs": NUM_TOP} | fields
    sampling = SamplingParams(temperature=0.0, num_logprobs=NUM_TOP)
    return GenerationRequest(prompt_ids=prompt, sampling=sampling, ignore_eos=True, **given)


def scored(engine: LocalEngine, request: GenerationRequest) -> list[SampledToken]:
    scores: list[SampledToken] = []
    has_token = False
    for event in engine.generate(request):
        if isinstance(event, PromptScores):
            assert not has_token and event.position == len(scores) + 1
            scores += event.tokens
        else:
            has_token = True
    assert has_token == (request.max_tokens > 0)
    return scores


@pytest.fixture(scope="module")
def whole(model: Model) -> list[SampledToken]:
    """The scores of the prompt in one chunk."""
    return scored(engine_of(model), request_for())


def test_scores_are_the_log_softmax_of_the_full_logits(
    model: Model, whole: list[SampledToken]
) -> None:
    logits_TV = logits_of(runner_of(model), PROMPT).astype(np.float64)
    top_T1 = logits_TV.max(axis=1, keepdims=True)
    totals_T1 = np.log(np.exp(logits_TV - top_T1).sum(axis=1, keepdims=True))
    log_probs_TV = logits_TV - top_T1 - totals_T1
    assert [score.token_id for score in whole] == [*PROMPT[1:]]
    for position, score in enumerate(whole):
        row_V = log_probs_TV[position]
        assert score.logprob == pytest.approx(row_V[PROMPT[position + 1]], abs=1e-5)
        best = np.argsort(-row_V, kind="stable")[:NUM_TOP]
        assert [token_id for token_id, _ in score.top_logprobs] == best.tolist()
        told = [logprob for _, logprob in score.top_logprobs]
        np.testing.assert_allclose(told, row_V[best], atol=1e-5)


@pytest.mark.parametrize(
    ("mode", "limits"),
    [
        (StepMode.HALVES, {"max_step_tokens": 16}),
        (StepMode.HALVES, {"max_step_tokens": 50}),
        (StepMode.FUSED, {}),
        (StepMode.FUSED, {"max_step_tokens": 16}),
    ],
)
def test_chunks_and_parts_of_the_logits_do_not_change_bits(
    model: Model, whole: list[SampledToken], mode: StepMode, limits: dict[str, int]
) -> None:
    engine = engine_of(model, mode, **limits)
    assert scored(engine, request_for()) == whole
    # Now every block is in the cache.
    assert scored(engine, request_for(num_samples=2)) == whole
    assert scored(engine, request_for(max_tokens=0)) == whole
    assert engine.pool.num_held == 0


def test_score_of_a_prompt_token_has_the_bits_of_its_draw(model: Model) -> None:
    prompt = PROMPT[:20]
    events = list(engine_of(model).generate(request_for(prompt, max_tokens=12)))
    drawn = [event for event in events if not isinstance(event, PromptScores)]
    continued = (*prompt, *(event.token_id for event in drawn))
    scores = scored(engine_of(model), request_for(continued, max_tokens=0))[-12:]
    assert [(s.token_id, s.logprob, s.top_logprobs) for s in scores] == [
        (e.token_id, e.logprob, e.top_logprobs) for e in drawn
    ]


def test_few_alternatives_are_the_first_of_many(model: Model, whole: list[SampledToken]) -> None:
    for num_top in (0, 1):
        scores = scored(engine_of(model), request_for(prompt_logprobs=num_top))
        assert [score.logprob for score in scores] == [score.logprob for score in whole]
        tops = [score.top_logprobs[:num_top] for score in whole]
        assert [score.top_logprobs for score in scores] == tops
