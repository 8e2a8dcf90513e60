"""Prompts are scored through deaths: every process at every message, the same log-probabilities."""

import dataclasses

import pytest

from model.sampling_params import SamplingParams
from router.request import GenerateRequest
from router.scheduler import SchedulerLimits
from tests.simulation.fake_model import expected_scores, fake_config
from tests.simulation.scenario import Arrival, Scenario
from tests.simulation.test_kill_matrix import (
    SHAPES,
    Blow,
    Shape,
    run_with_blows,
    scenario,
    undisturbed,
)

GREEDY = SamplingParams(temperature=0.0)
REQUESTS = (
    # Two chunks, for two samples.
    GenerateRequest(
        prompt_ids=(5, 3, 17, 60, 9),
        max_tokens=1,
        num_samples=2,
        sampling=SamplingParams(temperature=0.7, num_logprobs=1, seed=7),
        ignore_eos=True,
        prompt_logprobs=2,
    ),
    # The same beginning, and nothing drawn.
    GenerateRequest(prompt_ids=(5, 3, 17, 1), max_tokens=0, sampling=GREEDY, prompt_logprobs=0),
)


def scoring_scenario(shape: Shape) -> Scenario:
    made = scenario(shape)
    limits = SchedulerLimits(max_step_tokens=3)
    return dataclasses.replace(
        made,
        settings=dataclasses.replace(made.settings, scheduler=limits),
        arrivals=tuple(Arrival(at_s=0.0, request=request) for request in REQUESTS),
    )


@pytest.mark.parametrize("blow", Blow, ids=lambda blow: blow.value)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_death_at_any_message_costs_a_score(shape: Shape, blow: Blow) -> None:
    made = scoring_scenario(shape)
    names, last = undisturbed(made)
    for name in names:
        if blow is Blow.REPLACE_FROZEN and name.startswith("router of"):
            continue
        for n in range(1, last + 1):
            run_with_blows(made, {n: name}, blow)


def test_the_example_of_the_model_is_scored_by_hand() -> None:
    request = GenerateRequest(prompt_ids=(5, 3), max_tokens=0, prompt_logprobs=1)
    # Behind position 0 the row is (504, 98): 504 + 3 * 98 = 798 = 12 * 64 + 30.
    (score,) = expected_scores(request, fake_config(num_layers=1))
    assert (score.token_id, score.logprob) == (3, -504 / 8191 - 3)
    assert score.top_logprobs == ((30, -504 / 8191),)
