"""Sampling on the wire: the input of a draw, and the drawn tokens.

Numbers are float32 on the wire. A draw packs them to float32 as well, so a row that crossed the
wire draws the same tokens. They are read as the shortest decimal that has this float32: a client
that sends 0.01 gets 0.01, which is within a bound of 0.01, and not 0.009999999776.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np

from milliways.model.errors import InvalidRequestError
from milliways.model.sampling_params import (
    INVALID_TOKEN,
    MAX_LOGIT_BIASES,
    PARAMETERS,
    SampledToken,
    SampleRow,
    SamplingParams,
)
from milliways.v1 import sampling_pb2, worker_pb2
from milliways.wire.tensors import MalformedMessageError

_MAX_INT32 = 2**31 - 1


def encode_params(params: SamplingParams) -> sampling_pb2.SamplingParams:
    """Encodes parameters, each in the field of its name."""
    fields: dict[str, Any] = {
        parameter.name: getattr(params, parameter.name) for parameter in PARAMETERS
    }
    return sampling_pb2.SamplingParams(**fields)


def decode_params(
    message: sampling_pb2.SamplingParams, default_seed: int | None = None
) -> SamplingParams:
    """Decodes parameters. An unset field has the default of its declaration.

    Raises:
        InvalidRequestError: a field is out of range; names field, value and limit.
    """
    fields = {descriptor.name: _decode_value(value) for descriptor, value in message.ListFields()}
    if default_seed is not None:
        fields.setdefault("seed", default_seed)
    return SamplingParams(**fields)


def encode_sample(row: SampleRow) -> worker_pb2.SampleRow:
    """Encodes a row. Its tokens are sent only if a penalty reads them."""
    return worker_pb2.SampleRow(
        params=encode_params(row.params),
        position=len(row.token_ids),
        num_prompt_tokens=row.num_prompt_tokens,
        sample_index=row.sample_index,
        token_ids=row.token_ids if row.params.has_penalty else (),
        given_token_id=row.given_id,
        forbidden_token_ids=row.forbidden_ids,
        allowed_token_ids=row.allowed_ids,
    )


def decode_samples(messages: Iterable[worker_pb2.SampleRow]) -> tuple[SampleRow, ...]:
    """Decodes the rows of a batch.

    Raises:
        MalformedMessageError: a row is not possible.
    """
    return tuple(_decode_sample(message) for message in messages)


def encode_drawn(tokens: Iterable[SampledToken]) -> list[worker_pb2.DrawnToken]:
    """Encodes drawn tokens."""
    return [
        worker_pb2.DrawnToken(
            token_id=token.token_id if token.is_valid else INVALID_TOKEN,
            logprob=token.logprob,
            top_token_ids=[token_id for token_id, _ in token.top_logprobs],
            top_logprobs=[logprob for _, logprob in token.top_logprobs],
        )
        for token in tokens
    ]


def decode_drawn(messages: Iterable[worker_pb2.DrawnToken]) -> tuple[SampledToken, ...]:
    """Decodes drawn tokens.

    Raises:
        MalformedMessageError: a token has more top tokens than log-probabilities, or fewer.
    """
    return tuple(_decode_drawn(message) for message in messages)


def _decode_sample(message: worker_pb2.SampleRow) -> SampleRow:
    largest = max(
        message.position, message.num_prompt_tokens, message.sample_index, message.given_token_id
    )
    if largest > _MAX_INT32:
        raise MalformedMessageError(f"sample row with a field of {largest}")
    try:
        params = decode_params(message.params)
    except InvalidRequestError as error:
        raise MalformedMessageError(f"sampling: {error}") from error
    forbidden, allowed = tuple(message.forbidden_token_ids), tuple(message.allowed_token_ids)
    num_biased = len(allowed) or len(forbidden) + len(params.logit_bias)
    if num_biased > MAX_LOGIT_BIASES or max((*forbidden, *allowed), default=0) > _MAX_INT32:
        raise MalformedMessageError(f"sample row with {num_biased} biased tokens")
    return SampleRow(
        params=params,
        token_ids=_history(message, params),
        num_prompt_tokens=message.num_prompt_tokens,
        sample_index=message.sample_index,
        given_id=message.given_token_id if message.HasField("given_token_id") else None,
        forbidden_ids=forbidden,
        allowed_ids=allowed,
    )


def _history(message: worker_pb2.SampleRow, params: SamplingParams) -> Sequence[int]:
    if not params.has_penalty:
        # Only the number of tokens matters, which is the position.
        return range(message.position)
    token_ids = tuple(message.token_ids)
    if len(token_ids) != message.position or max(token_ids, default=0) > _MAX_INT32:
        raise MalformedMessageError(f"{len(token_ids)} tokens up to position {message.position}")
    return token_ids


def _decode_drawn(message: worker_pb2.DrawnToken) -> SampledToken:
    if len(message.top_token_ids) != len(message.top_logprobs):
        raise MalformedMessageError(
            "a drawn token with unequal numbers of top tokens and log-probabilities"
        )
    return SampledToken(
        token_id=message.token_id,
        logprob=message.logprob,
        top_logprobs=tuple(zip(message.top_token_ids, message.top_logprobs, strict=True)),
        is_valid=message.token_id != INVALID_TOKEN,
    )


def _decode_value(value: Any) -> Any:
    if isinstance(value, float):
        return _shortest(value)
    if isinstance(value, int):
        return value
    # Sorted: a map has no order on the wire.
    biases = sorted(cast(Mapping[int, float], value).items())
    return {token_id: _shortest(bias) for token_id, bias in biases}


def _shortest(number: float) -> float:
    # Most numbers are 0 or 1, and a conversion takes a microsecond.
    return number if number in (0.0, 1.0) else float(str(np.float32(number)))
