"""Sampling on the wire: what drawing a token needs, and what was drawn.

Numbers are float32 there. Drawing packs them to float32 as well, so a row that crossed the wire
draws the same tokens.
"""

from collections.abc import Iterable, Sequence

from milliways.model.errors import InvalidRequestError
from milliways.model.sampling_params import INVALID_TOKEN, SampledToken, SampleRow, SamplingParams
from milliways.v1 import sampling_pb2, worker_pb2
from milliways.wire.tensors import MalformedMessageError

_MAX_INT32 = 2**31 - 1
# The least values allowed, which float32 rounds to below themselves.
_MIN_TOP_P = 1e-37
_MIN_REPETITION_PENALTY = 0.01


def encode_params(params: SamplingParams) -> sampling_pb2.SamplingParams:
    """As a message."""
    return sampling_pb2.SamplingParams(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=params.logit_bias,
        num_logprobs=params.num_logprobs,
        seed=params.seed,
    )


def decode_params(message: sampling_pb2.SamplingParams) -> SamplingParams:
    """From a message; an unset field has its default.

    Raises:
        InvalidRequestError: a field is out of range.
    """
    temperature = message.temperature if message.HasField("temperature") else 1.0
    top_p = message.top_p if message.HasField("top_p") else 1.0
    repetition = message.repetition_penalty if message.HasField("repetition_penalty") else 1.0
    return SamplingParams(
        temperature=temperature,
        top_p=_lifted(top_p, _MIN_TOP_P),
        top_k=message.top_k,
        min_p=message.min_p,
        repetition_penalty=_lifted(repetition, _MIN_REPETITION_PENALTY),
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        # Sorted: a map of the wire has no order.
        logit_bias=dict(sorted(message.logit_bias.items())),
        num_logprobs=message.num_logprobs,
        seed=message.seed,
    )


def encode_sample(row: SampleRow) -> worker_pb2.SampleRow:
    """A sequence's row; its tokens only where a penalty looks at them."""
    return worker_pb2.SampleRow(
        params=encode_params(row.params),
        position=len(row.token_ids),
        num_prompt_tokens=row.num_prompt_tokens,
        sample_index=row.sample_index,
        token_ids=row.token_ids if row.params.has_penalty else (),
        given_token_id=row.given_id,
    )


def decode_samples(messages: Iterable[worker_pb2.SampleRow]) -> tuple[SampleRow, ...]:
    """Rows of a batch.

    Raises:
        MalformedMessageError: one of them cannot be.
    """
    return tuple(_decode_sample(message) for message in messages)


def encode_drawn(tokens: Iterable[SampledToken]) -> list[worker_pb2.DrawnToken]:
    """Drawn tokens as messages."""
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
    """Drawn tokens from messages.

    Raises:
        MalformedMessageError: one has not as many log-probabilities as tokens.
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
    return SampleRow(
        params=params,
        token_ids=_history(message, params),
        num_prompt_tokens=message.num_prompt_tokens,
        sample_index=message.sample_index,
        given_id=message.given_token_id if message.HasField("given_token_id") else None,
    )


def _history(message: worker_pb2.SampleRow, params: SamplingParams) -> Sequence[int]:
    if not params.has_penalty:
        # Nobody looks at the tokens themselves: how many they are is the position.
        return range(message.position)
    token_ids = tuple(message.token_ids)
    if len(token_ids) != message.position or max(token_ids, default=0) > _MAX_INT32:
        raise MalformedMessageError(f"{len(token_ids)} tokens up to position {message.position}")
    return token_ids


def _decode_drawn(message: worker_pb2.DrawnToken) -> SampledToken:
    if len(message.top_token_ids) != len(message.top_logprobs):
        raise MalformedMessageError("a drawn token with other log-probabilities than tokens")
    return SampledToken(
        token_id=message.token_id,
        logprob=message.logprob,
        top_logprobs=tuple(zip(message.top_token_ids, message.top_logprobs, strict=True)),
        is_valid=message.token_id != INVALID_TOKEN,
    )


def _lifted(value: float, least: float) -> float:
    """`least` for what is the float32 nearest to it; NaN and what is too small stay as they are."""
    return least if least * (1 - 1e-6) < value < least else value
