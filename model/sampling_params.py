"""What a draw takes and what it gives, without arrays: for processes that compute nothing.

Whoever imports this does not import JAX, which costs seconds and hundreds of megabytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, no_type_check

from milliways.model.errors import InvalidRequestError

MAX_LOGPROBS = 20
MAX_LOGIT_BIASES = 300
INVALID_TOKEN = -1

# The least that float32 does not flush to zero.
_MIN_TOP_P = 1e-37


@no_type_check  # it checks itself, and has to see the mistyped values that it refuses
@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How a request wants its tokens drawn; the defaults draw from the model's distribution.

    Raises:
        InvalidRequestError: a field is mistyped or out of range; names field, value and limit.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    num_logprobs: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, 0.0, 100.0)
        _check_number("top_p", self.top_p, _MIN_TOP_P, 1.0)
        _check_number("min_p", self.min_p, 0.0, 1.0)
        _check_number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _check_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_whole("top_k", self.top_k, 0, 2**31 - 1)
        _check_whole("num_logprobs", self.num_logprobs, 0, MAX_LOGPROBS)
        _check_whole("seed", self.seed, 0, 2**63 - 1)
        object.__setattr__(self, "logit_bias", _checked_logit_bias(self.logit_bias))

    @property
    def has_penalty(self) -> bool:
        """Whether drawing needs to know the tokens so far."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1.0, 0.0, 0.0)

    def check_vocab(self, vocab_size: int) -> None:
        """Raises InvalidRequestError if a biased token id is not of the vocabulary."""
        for token_id in self.logit_bias:
            if token_id >= vocab_size:
                limit = f"of token ids in 0..{vocab_size - 1}"
                raise InvalidRequestError("logit_bias", token_id, limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRow:
    """One sequence about to get a token: its prompt and completion so far, in `token_ids`.

    With `given_id`, the token that follows is known, as within a prompt: nothing is drawn, and what
    comes back is that token with its log-probability.
    """

    params: SamplingParams
    token_ids: Sequence[int]
    num_prompt_tokens: int
    sample_index: int = 0
    given_id: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledToken:
    """A token, drawn or given, with the log-probabilities (of the raw logits) asked for."""

    token_id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...]
    # False where the logits were not finite: the sequence has to fail, the token means nothing.
    is_valid: bool


def _checked_logit_bias(logit_bias: object) -> dict[int, float]:
    """A copy, so that the caller's later changes do not reach the request."""
    if not isinstance(logit_bias, Mapping):
        raise InvalidRequestError("logit_bias", logit_bias, "a mapping of token ids to numbers")
    if len(logit_bias) > MAX_LOGIT_BIASES:
        num_entries = f"{len(logit_bias)} entries"
        raise InvalidRequestError("logit_bias", num_entries, f"at most {MAX_LOGIT_BIASES} entries")
    for token_id, bias in logit_bias.items():
        _check_whole("logit_bias", token_id, 0, 2**31 - 1)
        _check_number("logit_bias", bias, -100.0, 100.0)
    return {token_id: float(bias) for token_id, bias in logit_bias.items()}


def _check_number(name: str, value: Any, lowest: float, highest: float) -> None:
    """NaN fails both comparisons; an int of any size can be compared."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and lowest <= value <= highest):
        raise InvalidRequestError(name, value, f"a number in {lowest:g}..{highest:g}")


def _check_whole(name: str, value: Any, lowest: int, highest: int) -> None:
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not (is_whole and lowest <= value <= highest):
        raise InvalidRequestError(name, value, f"a whole number in {lowest}..{highest}")
