"""What comes back: frozen values, the same from `LLM` and over a `Client`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from milliways.api.prompts import CheckedPrompt
from milliways.api.sampling import SamplingParams
from milliways.model.errors import NonFiniteLogitsError
from milliways.model.sampling_params import SampledToken
from milliways.router.requests.sequence import FinishReason, TokenEvent

_REASONS: dict[FinishReason, Literal["stop", "length"]] = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """The natural logarithm of a token's probability, before temperature and all else is applied.

    `top` has the most likely tokens in its place and their log-probabilities, best first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A token of a stream.

    `text` is the text that it completes. It is often empty: a token may be part of a character, and
    text that may begin a stop string is held back. `finish_reason` is set on a sample's last token;
    `logprob` is set if log-probabilities were asked for.
    """

    sample_index: int
    token_id: int
    text: str
    finish_reason: Literal["stop", "length"] | None
    logprob: TokenLogprob | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One continuation of a prompt.

    `finish_reason` is "stop" after the end-of-sequence token or a stop string, and "length" after
    as many tokens as were asked for, or as the model's context holds. `token_ids` include the
    end-of-sequence token. `logprobs` has one entry for each token, or is None if none were asked
    for.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]
    logprobs: tuple[TokenLogprob, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Exact counts; completion tokens are those of all samples, end-of-sequence tokens included."""

    num_prompt_tokens: int
    num_completion_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationResult:
    """What became of one prompt: `n` samples. The properties are those of the first sample."""

    prompt: CheckedPrompt
    samples: tuple[Sample, ...]
    usage: Usage

    @property
    def text(self) -> str:
        return self.samples[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.samples[0].token_ids

    @property
    def finish_reason(self) -> Literal["stop", "length"]:
        return self.samples[0].finish_reason

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...] | None:
        return self.samples[0].logprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How likely a text is: the log-probability of each token but the first, given those before it.

    The first token has none, because nothing precedes it.
    """

    prompt: CheckedPrompt
    tokens: tuple[TokenLogprob, ...]

    @property
    def total(self) -> float:
        """The log-probability of the text, given its first token: the sum over `tokens`."""
        return sum(token.logprob for token in self.tokens)


def piece_of(event: TokenEvent, params: SamplingParams) -> Piece:
    """A drawn token, as callers see it.

    Raises:
        NonFiniteLogitsError: no token could be drawn.
    """
    if event.finish_reason is FinishReason.ERROR:
        raise NonFiniteLogitsError
    logprob = TokenLogprob(token_id=event.token_id, logprob=event.logprob, top=event.top_logprobs)
    return Piece(
        sample_index=event.sample_index,
        token_id=event.token_id,
        text=event.text,
        finish_reason=_REASONS[event.finish_reason] if event.finish_reason else None,
        logprob=None if params.logprobs is None else logprob,
    )


def result_of(
    prompt: CheckedPrompt, num_prompt_tokens: int, pieces: Sequence[Piece], n: int
) -> GenerationResult:
    """All pieces of a prompt's `n` samples, put together."""
    return GenerationResult(
        prompt=prompt,
        samples=tuple(_sample_of(i, [p for p in pieces if p.sample_index == i]) for i in range(n)),
        usage=Usage(num_prompt_tokens=num_prompt_tokens, num_completion_tokens=len(pieces)),
    )


def score_of(prompt: CheckedPrompt, tokens: Iterable[SampledToken]) -> Score:
    """A prompt's scores, as callers see them."""
    return Score(
        prompt=prompt,
        tokens=tuple(
            TokenLogprob(token_id=token.token_id, logprob=token.logprob, top=token.top_logprobs)
            for token in tokens
        ),
    )


def _sample_of(index: int, pieces: Sequence[Piece]) -> Sample:
    finish_reason = pieces[-1].finish_reason
    assert finish_reason is not None
    logprobs = tuple(piece.logprob for piece in pieces if piece.logprob is not None)
    return Sample(
        index=index,
        text="".join(piece.text for piece in pieces),
        token_ids=tuple(piece.token_id for piece in pieces),
        finish_reason=finish_reason,
        logprobs=logprobs or None,
    )
