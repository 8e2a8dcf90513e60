"""Between the wire's messages and ours. Messages stay at the edge.

Numbers of the wire are float32, as those that draw tokens are. They are read as the shortest
decimal that means them, so that a bound such as 0.01 is not overstepped by a rounding.
"""

import numpy as np

from milliways.model.errors import InvalidRequestError
from milliways.model.sampling_params import INVALID_TOKEN, SampledToken, SamplingParams
from milliways.router.requests.journal import Journal
from milliways.router.requests.sequence import FinishReason, PromptScores, TokenEvent
from milliways.v1 import router_pb2, sampling_pb2
from milliways.wire.sampling import encode_params

_TO_WIRE = {
    FinishReason.STOP: router_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: router_pb2.FINISH_REASON_LENGTH,
    FinishReason.ERROR: router_pb2.FINISH_REASON_ERROR,
}
_FROM_WIRE = {number: reason for reason, number in _TO_WIRE.items()}


def sampling_from_wire(message: sampling_pb2.SamplingParams, seed: int) -> SamplingParams:
    """How a client wants tokens drawn, with the seed that was settled.

    Raises:
        InvalidRequestError: names field, value and limit.
    """
    optional = {
        name: _shortest(getattr(message, name))
        for name in ("temperature", "top_p", "repetition_penalty")
        if message.HasField(name)
    }
    return SamplingParams(
        **optional,
        top_k=message.top_k,
        min_p=_shortest(message.min_p),
        presence_penalty=_shortest(message.presence_penalty),
        frequency_penalty=_shortest(message.frequency_penalty),
        # Sorted: a map of the wire has no order.
        logit_bias={token: _shortest(b) for token, b in sorted(message.logit_bias.items())},
        num_logprobs=message.num_logprobs,
        seed=seed,
    )


def route_request(journal: Journal, request_id: str, timeout_s: float) -> router_pb2.RouteRequest:
    """Asks a router to run a request, or to carry it on after what was delivered."""
    request = journal.request
    return router_pb2.RouteRequest(
        request_id=request_id,
        prompt_token_ids=request.prompt_ids,
        max_tokens=request.max_tokens,
        sampling=encode_params(request.sampling),
        num_samples=request.num_samples,
        stop=request.stop,
        ignore_eos=request.ignore_eos,
        timeout_ms=min(max(1, round(timeout_s * 1000)), 2**32 - 1),
        delivered=[
            router_pb2.DeliveredTokens(
                sample_index=sample.sample_index,
                token_ids=sample.token_ids,
                is_finished=sample.is_finished,
            )
            for sample in journal.delivered()
        ],
        prompt_logprobs=request.prompt_logprobs,
        num_delivered_prompt_logprobs=journal.num_scored,
    )


def event_to_wire(event: TokenEvent, index: int) -> router_pb2.TokenEvent:
    """A token, the `index`-th of its sample."""
    return router_pb2.TokenEvent(
        sample_index=event.sample_index,
        index=index,
        # A token that means nothing has no place among unsigned numbers.
        token_id=max(0, event.token_id),
        text=event.text,
        logprob=event.logprob,
        top_token_ids=[token_id for token_id, _ in event.top_logprobs],
        top_logprobs=[logprob for _, logprob in event.top_logprobs],
        finish_reason=_TO_WIRE[event.finish_reason]
        if event.finish_reason
        else router_pb2.FINISH_REASON_UNSPECIFIED,
    )


def event_from_wire(message: router_pb2.TokenEvent) -> TokenEvent:
    """A token as the router sent it."""
    reason = _FROM_WIRE.get(message.finish_reason)
    return TokenEvent(
        sample_index=message.sample_index,
        token_id=INVALID_TOKEN if reason is FinishReason.ERROR else message.token_id,
        text=message.text,
        logprob=message.logprob,
        top_logprobs=tuple(zip(message.top_token_ids, message.top_logprobs, strict=False)),
        finish_reason=reason,
    )


def scores_to_wire(scores: PromptScores) -> list[router_pb2.PromptLogprob]:
    """Log-probabilities of prompt tokens, each with its position."""
    return [
        router_pb2.PromptLogprob(
            position=position,
            token_id=score.token_id,
            logprob=score.logprob,
            top_token_ids=[token_id for token_id, _ in score.top_logprobs],
            top_logprobs=[logprob for _, logprob in score.top_logprobs],
        )
        for position, score in enumerate(scores.tokens, scores.position)
    ]


def score_from_wire(message: router_pb2.PromptLogprob) -> SampledToken:
    """The log-probability of a prompt token as the router sent it."""
    return SampledToken(
        token_id=message.token_id,
        logprob=message.logprob,
        top_logprobs=tuple(zip(message.top_token_ids, message.top_logprobs, strict=False)),
        is_valid=True,
    )


def checked_seed(seed: int) -> int:
    """A seed of the wire, which has one bit more than ours.

    Raises:
        InvalidRequestError: it does not fit.
    """
    if seed >= 2**63:
        raise InvalidRequestError("seed", seed, f"a whole number in 0..{2**63 - 1}")
    return seed


def _shortest(number: float) -> float:
    return float(str(np.float32(number)))
