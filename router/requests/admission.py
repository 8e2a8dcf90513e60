"""Turns a request into sequences: checks that it fits, and limits their numbers of tokens."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from milliways.model.config import ModelConfig
from milliways.model.errors import InvalidRequestError
from milliways.router.requests.request import GenerationRequest
from milliways.router.requests.sequence import Detokenizer, Sequence

DetokenizerFor = Callable[[GenerationRequest], Detokenizer]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedRequest:
    """A request at a router: its id, its time limit, and what its client has received.

    `delivered` are the tokens of each sample that another router drew; samples in `finished` have
    ended. `num_scored` log-probabilities of the prompt were delivered; if a token was delivered,
    this is the number of all wanted ones. `ingress_id` names the ingress that sent it.
    """

    request_id: str
    request: GenerationRequest
    timeout_s: float
    delivered: Mapping[int, tuple[int, ...]] = field(default_factory=dict[int, tuple[int, ...]])
    finished: frozenset[int] = frozenset()
    num_scored: int = 0
    ingress_id: str = ""


def max_completion_tokens(request: GenerationRequest, config: ModelConfig) -> int:
    """The limit on drawn tokens of a sample. If the prompt fills the context, one is possible."""
    room = config.sequence_len - len(request.prompt_ids)
    return min(request.max_tokens, max(1, room))


def make_sequences(
    routed: RoutedRequest, config: ModelConfig, detokenizer_for: DetokenizerFor
) -> list[Sequence]:
    """One sequence for each sample that has not ended; the first one scores the prompt.

    If no tokens are wanted, there is one sequence, whatever the number of samples, and none once
    the prompt is scored.

    Raises:
        InvalidRequestError: the request does not fit the model, or the delivered tokens do not fit
            the request.
    """
    request = routed.request
    request.check_fits(config)
    num_tokens = max_completion_tokens(request, config)
    _check_scored(routed)
    num_samples = request.num_samples
    if num_tokens == 0:
        num_samples = int(routed.num_scored < request.num_to_score)
    sequences: list[Sequence] = []
    # Prepared once: each sample begins where the prompt ends.
    prepared = detokenizer_for(request)
    for index in range(num_samples):
        if index in routed.finished:
            continue
        sequence = Sequence(
            request,
            index,
            prepared.copy(),
            num_tokens,
            config.eos_token,
            # If the prompt is not scored yet, no token was delivered, so sample 0 is here.
            num_scored=request.num_to_score if index else routed.num_scored,
        )
        delivered = routed.delivered.get(index, ())
        _check_delivered(delivered, num_tokens, config)
        sequence.replay(delivered)
        sequences.append(sequence)
    return sequences


def _check_scored(routed: RoutedRequest) -> None:
    """All scores have to precede the first token."""
    num_to_score = routed.request.num_to_score
    has_tokens = bool(routed.finished) or any(routed.delivered.values())
    least = num_to_score if has_tokens else 0
    if not least <= routed.num_scored <= num_to_score:
        limit = f"between {least} and {num_to_score}; all are delivered before a token"
        raise InvalidRequestError("num_delivered_prompt_logprobs", routed.num_scored, limit)


def _check_delivered(delivered: tuple[int, ...], num_tokens: int, config: ModelConfig) -> None:
    if delivered and len(delivered) >= num_tokens:
        limit = f"fewer than {num_tokens} tokens, the most that the request has"
        raise InvalidRequestError("delivered", f"{len(delivered)} tokens", limit)
    for token_id in delivered:
        if not 0 <= token_id < config.vocab_size:
            limit = f"token ids in 0..{config.vocab_size - 1}"
            raise InvalidRequestError("delivered", token_id, limit)
