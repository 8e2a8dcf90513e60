"""Sampling parameters, and the input and output of a draw. Nothing here holds arrays.

Processes that compute nothing import this module, so it must not import JAX, which costs seconds
and hundreds of megabytes.

A sampling parameter is declared once, as a field of `SamplingParams`. The declaration names its
type, default, bounds and meaning. Everything that handles parameters reads `PARAMETERS`:

- `SamplingParams` checks values, and names field, value and limit in the error;
- `wire/sampling.py` carries each in the field of the same name in `sampling.proto`;
- HTTP bodies have a field of the same name, described in their schema;
- `milliways generate` has an option of the same name;
- `sampling.py` packs each real number into the array of the same name in `SampleInputs`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, no_type_check

from milliways.model.errors import InvalidRequestError

MAX_LOGPROBS = 20
MAX_LOGIT_BIASES = 300
INVALID_TOKEN = -1

_MAX_INT32 = 2**31 - 1


def _parameter(
    default: Any,
    least: float,
    most: float,
    meaning: str,
    *,
    metavar: str,
    has_own_option: bool = True,
) -> Any:
    """A field of `SamplingParams`; the arguments are those of `Parameter`."""
    metadata = {
        "least": least,
        "most": most,
        "meaning": meaning,
        "metavar": metavar,
        "has_own_option": has_own_option,
    }
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@no_type_check  # it checks its own fields, and must accept the mistyped values that it refuses
@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of a request are drawn. The defaults draw from the model's distribution.

    Invariant: every field has its declared type and lies within its declared bounds.

    Raises:
        InvalidRequestError: a field is mistyped or out of range; names field, value and limit.
    """

    temperature: float = _parameter(
        1.0, 0.0, 100.0, "randomness of the draw; 0 takes the most likely token", metavar="T"
    )
    top_p: float = _parameter(
        1.0,
        0.0,
        1.0,
        "keep the most likely tokens that together have this probability; 1 keeps all, 0 the best",
        metavar="P",
    )
    top_k: int = _parameter(
        0, 0, _MAX_INT32, "keep this number of most likely tokens; 0 keeps all", metavar="K"
    )
    min_p: float = _parameter(
        0.0,
        0.0,
        1.0,
        "drop tokens less likely than this fraction of the most likely one; 0 drops none",
        metavar="P",
    )
    repetition_penalty: float = _parameter(
        1.0,
        0.01,
        100.0,
        "divides positive logits, and multiplies the others, of tokens that the prompt or the"
        " completion has; 1 changes none",
        metavar="R",
    )
    presence_penalty: float = _parameter(
        0.0,
        -2.0,
        2.0,
        "subtracted from the logit of every token that the completion has",
        metavar="R",
    )
    frequency_penalty: float = _parameter(
        0.0,
        -2.0,
        2.0,
        "subtracted from the logit of a token for each time that the completion has it",
        metavar="R",
    )
    logit_bias: Mapping[int, float] = _parameter(
        dict, -100.0, 100.0, "added to the logits of these tokens", metavar="ID=BIAS"
    )
    # OpenAI's API and the command line call it `logprobs`, and answer in another shape with it.
    num_logprobs: int = _parameter(
        0,
        0,
        MAX_LOGPROBS,
        "number of most likely tokens whose log-probabilities come with each token",
        metavar="K",
        has_own_option=False,
    )
    seed: int = _parameter(0, 0, 2**64 - 1, "equal seeds draw equal tokens", metavar="S")

    def __post_init__(self) -> None:
        for parameter in PARAMETERS:
            parameter.check(getattr(self, parameter.name))
        # A copy: later changes by the caller must not reach the request.
        biases = {token_id: float(bias) for token_id, bias in self.logit_bias.items()}
        object.__setattr__(self, "logit_bias", biases)

    @property
    def has_penalty(self) -> bool:
        """Whether drawing reads the tokens of prompt and completion."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1.0, 0.0, 0.0)

    def check_vocab(self, vocab_size: int) -> None:
        """Raises InvalidRequestError if a biased token id lies outside the vocabulary."""
        for token_id in self.logit_bias:
            if token_id >= vocab_size:
                limit = f"of token ids in 0..{vocab_size - 1}"
                raise InvalidRequestError("logit_bias", token_id, limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """The declaration of one sampling parameter."""

    name: str
    # float, int, or Mapping[int, float]: biases by token id.
    kind: Any
    # None for biases: there are none.
    default: float | None
    # Bounds of the value. Those of biases hold for each bias.
    least: float
    most: float
    # What the parameter does, as a phrase for `--help` and for the schema of HTTP bodies.
    meaning: str
    # Stands for the value in `--help`.
    metavar: str
    # Whether HTTP bodies and `milliways generate` get a field and an option of the same name.
    has_own_option: bool

    def check(self, value: Any) -> None:
        """Raises InvalidRequestError unless the value has the right type and range."""
        # The usual case comes first: workers check the parameters of each row in each step.
        if type(value) is self.kind and self.least <= value <= self.most:
            return
        if self.kind is float:
            _check_number(self.name, value, self.least, self.most)
        elif self.kind is int:
            _check_whole(self.name, value, self.least, self.most)
        else:
            self._check_biases(value)

    def _check_biases(self, value: Any) -> None:
        if not isinstance(value, Mapping):
            raise InvalidRequestError(self.name, value, "a mapping of token ids to numbers")
        if len(value) > MAX_LOGIT_BIASES:
            limit = f"at most {MAX_LOGIT_BIASES} entries"
            raise InvalidRequestError(self.name, f"{len(value)} entries", limit)
        for token_id, bias in value.items():
            _check_whole(self.name, token_id, 0, _MAX_INT32)
            _check_number(self.name, bias, self.least, self.most)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRow:
    """One sequence that gets its next token. `token_ids` are its prompt and completion so far.

    `forbidden_ids` and `logit_bias` together have at most MAX_LOGIT_BIASES entries, unless there
    are `allowed_ids`.

    If `given_id` is set, the next token is known, as it is within a prompt. Nothing is drawn then:
    the result is that token with its log-probability.
    """

    params: SamplingParams
    token_ids: Sequence[int]
    num_prompt_tokens: int
    sample_index: int = 0
    given_id: int | None = None
    # Not drawn, whatever their logits are.
    forbidden_ids: tuple[int, ...] = ()
    # No other tokens are drawn; empty: all may be. At most MAX_LOGIT_BIASES.
    allowed_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledToken:
    """A token, drawn or given, with the requested log-probabilities of the raw logits."""

    token_id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...]
    # False if the logits were not finite. The token means nothing then: its sequence must fail.
    is_valid: bool


def _check_number(name: str, value: Any, least: float, most: float) -> None:
    # NaN fails both comparisons. An int of any size can be compared with a float.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and least <= value <= most):
        raise InvalidRequestError(name, value, f"a number in {least:g}..{most:g}")


def _check_whole(name: str, value: Any, least: float, most: float) -> None:
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not (is_whole and least <= value <= most):
        raise InvalidRequestError(name, value, f"a whole number in {least}..{most}")


def _declared(parameter: Any) -> Parameter:
    default = None if parameter.default is MISSING else parameter.default
    return Parameter(
        name=parameter.name, kind=parameter.type, default=default, **parameter.metadata
    )


PARAMETERS: tuple[Parameter, ...] = tuple(_declared(each) for each in fields(SamplingParams))
