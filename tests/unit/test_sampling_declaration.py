"""A sampling parameter is declared once, and every surface knows it with its bounds.

Everything here runs once for each declared parameter. A new one that a surface forgets fails.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from milliways.cluster.cli.commands import generate
from milliways.cluster.ingress.openai.bodies import ChatBody, CompletionBody
from milliways.cluster.ingress.openai.fields import OTHER_NAMES
from milliways.cluster.ingress.openai.requests import completion_ask
from milliways.cluster.ingress.public_grpc.service import read_ask
from milliways.cluster.ingress.served_model import ServedModel
from milliways.model.errors import InvalidRequestError
from milliways.model.sampling import pack_rows
from milliways.model.sampling_params import PARAMETERS, Parameter, SampleRow, SamplingParams
from milliways.v1 import generate_pb2, sampling_pb2
from milliways.wire.sampling import decode_params, encode_params
from tests.ingresses import demo_model

REQUEST_ID = "0" * 32
TOKEN_ID = 7
# On the surfaces this parameter is called `logprobs`, and changes the form of the answer as well.
NAMED_OTHERWISE = {"num_logprobs": "logprobs"}

Ask = Callable[[ServedModel, dict[str, Any]], SamplingParams]


@pytest.fixture(scope="module")
def model() -> ServedModel:
    return demo_model()


def over_http(model: ServedModel, given: dict[str, Any]) -> SamplingParams:
    fields = {
        NAMED_OTHERWISE.get(name, name): {str(TOKEN_ID): value[TOKEN_ID]}
        if isinstance(value, dict)
        else value
        for name, value in given.items()
    }
    body = {"model": model.name, "prompt": [1], "max_tokens": 1} | fields
    return completion_ask(json.dumps(body).encode(), model, REQUEST_ID).requests[0].sampling


def over_grpc(model: ServedModel, given: dict[str, Any]) -> SamplingParams:
    message = generate_pb2.GenerateRequest(
        tokens={"token_ids": [1]},
        sampling=sampling_pb2.SamplingParams(**given),
    )
    wired = generate_pb2.GenerateRequest.FromString(message.SerializeToString())
    return read_ask(wired, model).request.sampling


def on_the_command_line(model: ServedModel, given: dict[str, Any]) -> SamplingParams:
    parser = argparse.ArgumentParser()
    generate.add_options(parser)
    arguments = ["prompt"]
    for name, value in given.items():
        text = f"{TOKEN_ID}={value[TOKEN_ID]!r}" if isinstance(value, dict) else repr(value)
        flag = NAMED_OTHERWISE.get(name, name).replace("_", "-")
        arguments.append(f"--{flag}={text}")
    return generate.sampling_params(parser.parse_args(arguments))


SURFACES = {"http": over_http, "grpc": over_grpc, "cli": on_the_command_line}
on_every_surface = pytest.mark.parametrize("ask", SURFACES.values(), ids=SURFACES.keys())
each_parameter = pytest.mark.parametrize("parameter", PARAMETERS, ids=lambda p: p.name)
each_with_own_option = pytest.mark.parametrize(
    "parameter", [p for p in PARAMETERS if p.has_own_option], ids=lambda p: p.name
)


def value_of(parameter: Parameter, number: float) -> Any:
    return number if parameter.kind in (float, int) else {TOKEN_ID: number}


def next_number(parameter: Parameter, number: float, step: int) -> float:
    """The next one that the wire can tell from `number`, up or down."""
    if parameter.kind is int:
        return number + step
    return float(np.nextafter(np.float32(number), np.float32(step * np.inf)))


@on_every_surface
@each_parameter
def test_bounds_themselves_are_accepted(model: ServedModel, ask: Ask, parameter: Parameter) -> None:
    for bound in (parameter.least, parameter.most):
        value = value_of(parameter, bound)
        assert getattr(ask(model, {parameter.name: value}), parameter.name) == value


@on_every_surface
@each_parameter
def test_next_number_beyond_a_bound_is_refused_by_name(
    model: ServedModel, ask: Ask, parameter: Parameter
) -> None:
    for bound, step in ((parameter.least, -1), (parameter.most, 1)):
        value = value_of(parameter, next_number(parameter, bound, step))
        if ask is over_http and (
            value in list(OTHER_NAMES.get(parameter.name, {}))
            or (parameter.name == "seed" and value < 0)
        ):
            # It means another value.
            continue
        if ask is over_grpc and parameter.kind is int and not 0 <= value < 2**64:
            with pytest.raises(ValueError, match="out of range"):
                sampling_pb2.SamplingParams(**{parameter.name: value})
            continue
        with pytest.raises(InvalidRequestError) as caught:
            ask(model, {parameter.name: value})
        assert caught.value.field in (parameter.name, NAMED_OTHERWISE.get(parameter.name))


@on_every_surface
@each_parameter
def test_parameter_that_is_not_given_has_its_default(
    model: ServedModel, ask: Ask, parameter: Parameter
) -> None:
    expected = getattr(SamplingParams(), parameter.name)
    value = getattr(ask(model, {}), parameter.name)
    if parameter.name == "seed" and ask is not on_the_command_line:
        # Otherwise two requests without a seed would draw the same tokens.
        assert value > 0
    elif parameter.name == "temperature" and ask is on_the_command_line:
        assert value == 0.7
    else:
        assert value == expected


@pytest.mark.parametrize("value", ["1", True, [1]])
@each_parameter
def test_http_accepts_no_other_type(model: ServedModel, parameter: Parameter, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        over_http(model, {parameter.name: value})
    assert caught.value.field in (parameter.name, NAMED_OTHERWISE.get(parameter.name))


@each_with_own_option
def test_schema_of_both_bodies_has_meaning_and_bounds(parameter: Parameter) -> None:
    for kind in (CompletionBody, ChatBody):
        declared = kind.model_json_schema()["properties"][parameter.name]
        assert declared["description"] == parameter.meaning
        place = declared if parameter.kind in (float, int) else declared["additionalProperties"]
        assert (place["minimum"], place["maximum"]) == (parameter.least, parameter.most)


@each_with_own_option
def test_help_has_the_meaning(parameter: Parameter) -> None:
    parser = argparse.ArgumentParser()
    generate.add_options(parser)
    assert " ".join(parameter.meaning.split()) in " ".join(parser.format_help().split())


@each_parameter
def test_bounds_cross_the_wire_between_processes(parameter: Parameter) -> None:
    for bound in (parameter.least, parameter.most):
        params = SamplingParams(**{parameter.name: value_of(parameter, bound)})
        message = encode_params(params).SerializeToString()
        assert decode_params(sampling_pb2.SamplingParams.FromString(message)) == params


@each_parameter
def test_wire_has_a_field_of_the_name_and_the_default(parameter: Parameter) -> None:
    descriptor = sampling_pb2.SamplingParams.DESCRIPTOR.fields_by_name[parameter.name]
    if parameter.kind is float:
        assert descriptor.type == descriptor.TYPE_FLOAT
    elif parameter.kind is int:
        assert descriptor.type in (descriptor.TYPE_UINT32, descriptor.TYPE_UINT64)
    # Without presence, an unset field and 0 are the same bytes.
    assert descriptor.has_presence or not parameter.default


def test_wire_has_no_field_that_is_not_declared() -> None:
    wired = set(sampling_pb2.SamplingParams.DESCRIPTOR.fields_by_name)
    assert wired == {parameter.name for parameter in PARAMETERS}
    assert decode_params(sampling_pb2.SamplingParams()) == SamplingParams()


def test_only_log_probabilities_have_another_name_on_the_surfaces() -> None:
    others = {parameter.name for parameter in PARAMETERS if not parameter.has_own_option}
    assert others == set(NAMED_OTHERWISE)


@each_with_own_option
def test_sampler_gets_the_value(parameter: Parameter) -> None:
    def packed(params: SamplingParams) -> list[Any]:
        row = SampleRow(params=params, token_ids=(1, 2), num_prompt_tokens=1)
        return [np.asarray(array) for array in pack_rows([row], vocab_size=1280, max_tokens=64)]

    usual = packed(SamplingParams())
    # top_k packs 0 and anything above the vocabulary alike.
    numbers = (parameter.least, parameter.most, 1)
    values = [value_of(parameter, number) for number in numbers]
    changed = [packed(SamplingParams(**{parameter.name: value})) for value in values]
    assert any(not all(map(np.array_equal, usual, arrays)) for arrays in changed)
