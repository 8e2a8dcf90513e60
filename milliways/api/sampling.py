"""What a request asks for: how tokens are drawn, how many, and what ends them.

    SamplingParams(temperature=0, max_tokens=32, stop="\\n", logprobs=5)

How a token is drawn is declared in `model/sampling_params.py`. The class here inherits its fields
from there, so that a parameter added there is a parameter here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import cast

from milliways.model.errors import InvalidRequestError
from milliways.model.sampling_params import MAX_LOGPROBS
from milliways.model.sampling_params import SamplingParams as DrawParams
from milliways.router.requests.request import MAX_SAMPLES, MAX_STOP_CHARS, MAX_STOP_STRINGS

DEFAULT_MAX_TOKENS = 16
_MAX_INT32 = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams(DrawParams):
    """How a prompt is continued. The inherited fields say how each token is drawn.

    Equal parameters and equal prompts give equal tokens, in `LLM` as over a `Client`: `seed` is 0
    unless it is given.

    `max_tokens`: a sample has at most this many tokens.
    `n`: how many samples are drawn of each prompt.
    `stop`: a string, or several, that end a sample and are not part of its text.
    `ignore_eos`: go on after the end-of-sequence token.
    `logprobs`: give the log-probability of each token, with those of this many most likely tokens
    in its place. None: give none.

    Raises:
        InvalidRequestError: a field is mistyped or out of range; names field, value and limit.
    """

    max_tokens: int = DEFAULT_MAX_TOKENS
    n: int = 1
    stop: str | Sequence[str] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    # Follows from `logprobs`.
    num_logprobs: int = field(init=False, default=0, repr=False)

    def __post_init__(self) -> None:
        check_whole("max_tokens", self.max_tokens, 1, _MAX_INT32)
        check_whole("n", self.n, 1, MAX_SAMPLES)
        if self.logprobs is not None:
            check_whole("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        object.__setattr__(self, "num_logprobs", self.logprobs or 0)
        object.__setattr__(self, "stop", _checked_stop(self.stop))
        # Checks all that is inherited; the mapping is copied.
        object.__setattr__(self, "logit_bias", self.draw_params().logit_bias)

    def draw_params(self) -> DrawParams:
        """The part that decides how a token is drawn."""
        return DrawParams(**{f.name: getattr(self, f.name) for f in fields(DrawParams)})


def check_whole(name: str, value: object, least: int, largest: int) -> None:
    """Raises InvalidRequestError unless the value is a whole number between both."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= largest:
        raise InvalidRequestError(name, value, f"a whole number in {least}..{largest}")


def _checked_stop(stop: object) -> tuple[str, ...]:
    if not isinstance(stop, Sequence):
        raise InvalidRequestError("stop", stop, "a string or a sequence of strings")
    texts = (stop,) if isinstance(stop, str) else tuple(cast("Sequence[object]", stop))
    if len(texts) > MAX_STOP_STRINGS:
        raise InvalidRequestError("stop", f"{len(texts)} strings", f"at most {MAX_STOP_STRINGS}")
    checked: list[str] = []
    for text in texts:
        if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_CHARS:
            raise InvalidRequestError("stop", text, f"a string of 1 to {MAX_STOP_CHARS} characters")
        checked.append(text)
    return tuple(checked)
