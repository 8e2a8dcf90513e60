"""Converts between protobuf messages and the router's types.

Only the processes' edges (servers and clients) handle messages.
"""

from collections.abc import Iterable

from milliways.model.sampling_params import INVALID_TOKEN, SampledToken
from milliways.router.requests.journal import Journal
from milliways.router.requests.rules import TokenRules
from milliways.router.requests.sequence import FinishReason, PromptScores, TokenEvent
from milliways.v1 import router_pb2, sampling_pb2
from milliways.wire.sampling import encode_params

_TO_WIRE = {
    FinishReason.STOP: router_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: router_pb2.FINISH_REASON_LENGTH,
    FinishReason.ERROR: router_pb2.FINISH_REASON_ERROR,
}
_FROM_WIRE = {number: reason for reason, number in _TO_WIRE.items()}


def route_request(
    journal: Journal, request_id: str, timeout_s: float, ingress_id: str = ""
) -> router_pb2.RouteRequest:
    """A call that runs a request, or continues it after the tokens that were delivered."""
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
        ingress_id=ingress_id,
        rules=rules_to_wire(request.rules),
    )


def rules_to_wire(rules: TokenRules) -> sampling_pb2.TokenRules:
    """Encodes rules."""
    return sampling_pb2.TokenRules(
        min_tokens=rules.min_tokens,
        stop_token_ids=rules.stop_token_ids,
        allowed_token_ids=rules.allowed_token_ids,
        bad_words=[sampling_pb2.TokenRun(token_ids=word) for word in rules.bad_words],
        include_stop=rules.includes_stop,
        show_special=rules.shows_special,
        no_spaces_around_special=not rules.spaces_special,
    )


def rules_from_wire(
    message: sampling_pb2.TokenRules, more_bad_words: Iterable[tuple[int, ...]] = ()
) -> TokenRules:
    """Decodes rules; adds bad words.

    Raises:
        InvalidRequestError: a field is out of range; names field, value and limit.
    """
    return TokenRules(
        min_tokens=message.min_tokens,
        stop_token_ids=tuple(message.stop_token_ids),
        allowed_token_ids=tuple(message.allowed_token_ids),
        bad_words=(*(tuple(word.token_ids) for word in message.bad_words), *more_bad_words),
        includes_stop=message.include_stop,
        shows_special=message.show_special,
        spaces_special=not message.no_spaces_around_special,
    )


def event_to_wire(event: TokenEvent, index: int) -> router_pb2.TokenEvent:
    """Encodes a token, which is number `index` of its sample."""
    reason = event.stop_reason
    return router_pb2.TokenEvent(
        sample_index=event.sample_index,
        index=index,
        # The field is unsigned, and the id of an invalid token is negative.
        token_id=max(0, event.token_id),
        text=event.text,
        logprob=event.logprob,
        top_token_ids=[token_id for token_id, _ in event.top_logprobs],
        top_logprobs=[logprob for _, logprob in event.top_logprobs],
        finish_reason=_TO_WIRE[event.finish_reason]
        if event.finish_reason
        else router_pb2.FINISH_REASON_UNSPECIFIED,
        stop_string=reason if isinstance(reason, str) else None,
        stop_token_id=reason if isinstance(reason, int) else None,
        num_cached_prompt_tokens=event.num_cached,
    )


def event_from_wire(message: router_pb2.TokenEvent) -> TokenEvent:
    """Decodes a token."""
    reason = _FROM_WIRE.get(message.finish_reason)
    return TokenEvent(
        sample_index=message.sample_index,
        token_id=INVALID_TOKEN if reason is FinishReason.ERROR else message.token_id,
        text=message.text,
        logprob=message.logprob,
        top_logprobs=tuple(zip(message.top_token_ids, message.top_logprobs, strict=False)),
        finish_reason=reason,
        stop_reason=_stop_reason(message),
        num_cached=message.num_cached_prompt_tokens,
    )


def _stop_reason(message: router_pb2.TokenEvent) -> str | int | None:
    which = message.WhichOneof("stop_reason")
    return None if which is None else getattr(message, which)


def scores_to_wire(scores: PromptScores) -> list[router_pb2.PromptLogprob]:
    """Encodes log-probabilities of prompt tokens, each with its position."""
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
    """Decodes the log-probability of a prompt token."""
    return SampledToken(
        token_id=message.token_id,
        logprob=message.logprob,
        top_logprobs=tuple(zip(message.top_token_ids, message.top_logprobs, strict=False)),
        is_valid=True,
    )
