"""Requests: what is refused, and what the refusal says."""

from typing import Any

import pytest

from milliways.model.config import GROK_1
from milliways.model.errors import InvalidRequestError, PromptTooLongError
from milliways.model.sampling_params import SamplingParams
from milliways.router.requests.request import GenerationRequest


def make(**changes: Any) -> GenerationRequest:
    fields: dict[str, Any] = {"prompt_ids": (5, 6), "max_tokens": 4}
    return GenerationRequest(**(fields | changes))


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("prompt", {"prompt_ids": ()}),
        ("max_tokens", {"max_tokens": 0}),
        ("max_tokens", {"max_tokens": -3}),
        ("max_tokens", {"max_tokens": 2.5}),
        ("max_tokens", {"max_tokens": True}),
        ("max_tokens", {"max_tokens": -1, "prompt_logprobs": 0}),
        ("prompt_logprobs", {"prompt_logprobs": -1}),
        ("prompt_logprobs", {"prompt_logprobs": 21}),
        ("prompt_logprobs", {"prompt_logprobs": True}),
        ("num_samples", {"num_samples": 0}),
        ("num_samples", {"num_samples": 65}),
        ("stop", {"stop": ("",)}),
        ("stop", {"stop": ("x" * 1025,)}),
        ("stop", {"stop": ("x",) * 17}),
    ],
)
def test_impossible_field_is_refused_by_name(field: str, changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        make(**changes)
    assert caught.value.field == field


def test_prompt_longer_than_the_context_is_refused_with_both_numbers() -> None:
    with pytest.raises(PromptTooLongError, match=r"8193 tokens.*at most 8192 tokens"):
        make(prompt_ids=(7,) * 8193).check_fits(GROK_1)
    make(prompt_ids=(7,) * 8192).check_fits(GROK_1)


@pytest.mark.parametrize("token_id", [-1, 131072])
def test_token_outside_the_vocabulary_is_refused(token_id: int) -> None:
    with pytest.raises(InvalidRequestError, match=r"0\.\.131071"):
        make(prompt_ids=(1, token_id)).check_fits(GROK_1)


def test_bias_on_a_token_outside_the_vocabulary_is_refused() -> None:
    sampling = SamplingParams(logit_bias={131072: 1.0})
    with pytest.raises(InvalidRequestError, match="logit_bias"):
        make(sampling=sampling).check_fits(GROK_1)
