"""Sampling parameters: what is refused, and by which name."""

import math
from typing import Any

import pytest

from milliways.model.errors import InvalidRequestError
from milliways.model.sampling_params import SamplingParams

V = 1200


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 100.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", True),
        ("temperature", "1"),
        ("temperature", None),
        ("top_p", -0.1),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("top_k", -1),
        ("top_k", 1.0),
        ("top_k", False),
        ("top_k", 2**31),
        ("min_p", -0.01),
        ("min_p", 1.01),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-30),
        ("repetition_penalty", 10**400),
        ("presence_penalty", 2.01),
        ("presence_penalty", -2.01),
        ("frequency_penalty", math.nan),
        ("frequency_penalty", [1.0]),
        ("num_logprobs", -1),
        ("num_logprobs", 21),
        ("seed", -1),
        ("seed", 2**64),
        ("seed", 1.5),
        ("logit_bias", None),
        ("logit_bias", [3]),
        ("logit_bias", {"3": 1.0}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {True: 1.0}),
        ("logit_bias", {3: 100.5}),
        ("logit_bias", {3: math.nan}),
        ("logit_bias", {3: "x"}),
        ("logit_bias", dict.fromkeys(range(301), 1.0)),
    ],
)
def test_impossible_parameter_is_refused_by_name(name: str, value: Any):
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{name: value})
    assert caught.value.field == name


def test_limits_themselves_are_accepted():
    lowest = {"temperature": 0, "top_p": 1e-30, "min_p": 0, "repetition_penalty": 0.01, "seed": 0}
    highest = {"temperature": 100, "top_p": 1, "min_p": 1, "repetition_penalty": 100}
    SamplingParams(**lowest, presence_penalty=-2, frequency_penalty=-2, logit_bias={0: -100})
    SamplingParams(**highest, presence_penalty=2, frequency_penalty=2, logit_bias={0: 100})
    SamplingParams(seed=2**64 - 1, num_logprobs=20, top_k=2**31 - 1)


def test_biased_token_outside_the_vocabulary_is_refused_with_the_limit():
    params = SamplingParams(logit_bias={5: 1.0, V: 1.0})
    params.check_vocab(V + 1)
    with pytest.raises(InvalidRequestError, match=str(V - 1)) as caught:
        params.check_vocab(V)
    assert (caught.value.field, caught.value.value) == ("logit_bias", V)


def test_later_change_of_the_callers_bias_does_not_reach_the_parameters():
    bias = {3: 1.0}
    params = SamplingParams(logit_bias=bias)
    bias[4] = 2.0
    assert params.logit_bias == {3: 1.0}
