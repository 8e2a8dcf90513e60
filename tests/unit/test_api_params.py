"""What the Python API accepts, and how it names what it refuses."""

from dataclasses import FrozenInstanceError, fields
from typing import Any

import numpy as np
import pytest

from milliways import Client, SamplingParams
from milliways.api.errors import ConfigError, InvalidRequestError
from milliways.api.prompts import checked_prompt, paired
from milliways.model.sampling_params import SamplingParams as DrawParams


def test_defaults_are_those_of_the_declaration_of_draws() -> None:
    assert SamplingParams().draw_params() == DrawParams()
    assert SamplingParams().max_tokens == 16


@pytest.mark.parametrize("field", [f.name for f in fields(DrawParams)])
def test_every_parameter_of_a_draw_is_a_parameter_of_the_api(field: str) -> None:
    given: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 7,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "logit_bias": {3: -1.5},
        "seed": 11,
    }
    # Parameters that were added since have no value here: it is enough that the API takes them.
    value = given.get(field, getattr(DrawParams(), field))
    params = SamplingParams() if field == "num_logprobs" else SamplingParams(**{field: value})
    assert getattr(params.draw_params(), field) == value


@pytest.mark.parametrize(("logprobs", "num_logprobs"), [(None, 0), (0, 0), (5, 5)])
def test_log_probabilities_are_asked_for_by_one_name(
    logprobs: int | None, num_logprobs: int
) -> None:
    assert SamplingParams(logprobs=logprobs).draw_params().num_logprobs == num_logprobs


def test_one_stop_string_is_a_list_of_one() -> None:
    assert SamplingParams(stop="42").stop == SamplingParams(stop=["42"]).stop == ("42",)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 2.5),
        ("max_tokens", True),
        ("n", 0),
        ("n", 65),
        ("stop", ""),
        ("stop", ["a", 1]),
        ("stop", 5),
        ("stop", ["x"] * 17),
        ("logprobs", 21),
        ("logprobs", -1),
        ("temperature", -0.5),
        ("top_p", -0.1),
        ("seed", -1),
        ("logit_bias", {1: 1000.0}),
    ],
)
def test_bad_parameter_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field
    assert caught.value.limit in str(caught.value)


def test_parameters_do_not_change_once_made() -> None:
    bias = {3: 1.0}
    params = SamplingParams(logit_bias=bias)
    bias[3] = 2.0
    assert params.logit_bias == {3: 1.0}
    with pytest.raises(FrozenInstanceError):
        params.max_tokens = 3  # type: ignore[misc]


def test_prompt_is_text_or_token_ids() -> None:
    assert checked_prompt("text") == "text"
    assert checked_prompt(np.array([5, 6])) == (5, 6)


@pytest.mark.parametrize("prompt", [b"bytes", 5, None, [5, "6"], [-1], [1.5], [2**31]])
def test_other_prompt_is_refused_by_name(prompt: object) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        checked_prompt(prompt)
    assert caught.value.field == "prompt"


def test_one_prompt_in_the_place_of_a_list_is_refused() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        paired("Welcome to", None)
    assert caught.value.field == "prompts"


def test_each_prompt_may_have_parameters_of_its_own() -> None:
    greedy, warm = SamplingParams(temperature=0), SamplingParams(temperature=0.7)
    assert paired(["a", "b"], [greedy, warm]) == [("a", greedy), ("b", warm)]
    assert paired(["a", "b"], warm) == [("a", warm), ("b", warm)]
    with pytest.raises(InvalidRequestError) as caught:
        paired(["a", "b"], [greedy])
    assert caught.value.field == "params"


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("addresses", {"addresses": []}),
        ("addresses", {"addresses": "localhost"}),
        ("timeout_s", {"addresses": "localhost:1", "timeout_s": 0}),
        ("timeout_s", {"addresses": "localhost:1", "timeout_s": float("nan")}),
        ("max_in_flight", {"addresses": "localhost:1", "max_in_flight": 0}),
    ],
)
def test_bad_option_of_a_client_is_refused_by_name(field: str, options: dict[str, Any]) -> None:
    with pytest.raises((ConfigError, InvalidRequestError)) as caught:
        Client(**options)
    assert caught.value.field == field
