"""A request, which checks itself when it is made."""

from dataclasses import dataclass, field

from milliways.model.config import ModelConfig
from milliways.model.errors import InvalidRequestError, PromptTooLongError
from milliways.model.sampling_params import MAX_LOGIT_BIASES, MAX_LOGPROBS, SamplingParams
from milliways.router.requests.rules import TokenRules

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_SAMPLES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One prompt, and how to continue it.

    `num_samples` sequences are drawn from the same prompt. A stop string ends a sequence and is not
    part of its text. The end-of-sequence token ends it too, unless `ignore_eos` is set.

    If `prompt_logprobs` is set, the prompt is scored: before the first drawn token, the request
    yields the log-probability of each prompt token except the first, with this number of most
    likely tokens for the same position. `max_tokens` may be 0 then, and nothing is drawn.

    Invariant: every field is within its limits. `check_fits` checks those of the model.

    Raises:
        InvalidRequestError: a field is invalid; the error names it, its value and limit.
    """

    prompt_ids: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    num_samples: int = 1
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    prompt_logprobs: int | None = None
    rules: TokenRules = field(default_factory=TokenRules)

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise InvalidRequestError("prompt", "", "at least one token")
        if self.prompt_logprobs is None:
            limit = "at least 1, or 0 with log-probabilities of the prompt"
            _check_count("max_tokens", self.max_tokens, 1, None, limit)
        else:
            _check_count("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
            _check_count("max_tokens", self.max_tokens, 0, None)
        _check_count("num_samples", self.num_samples, 1, MAX_SAMPLES)
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequestError("stop", len(self.stop), f"at most {MAX_STOP_STRINGS} strings")
        for text in self.stop:
            if not 0 < len(text) <= MAX_STOP_CHARS:
                raise InvalidRequestError("stop", text, f"1 to {MAX_STOP_CHARS} characters long")
        if self.rules.min_tokens > self.max_tokens:
            limit = f"at most max_tokens = {self.max_tokens}"
            raise InvalidRequestError("min_tokens", self.rules.min_tokens, limit)
        num_biased = len(self.sampling.logit_bias) + self.rules.num_forbidden
        if num_biased > MAX_LOGIT_BIASES and not self.rules.allowed_token_ids:
            limit = (
                f"at most {MAX_LOGIT_BIASES}, together with bad_words, and with tokens that end a"
                " sequence if min_tokens is set"
            )
            raise InvalidRequestError("logit_bias", f"{num_biased} entries", limit)

    def ends(self, eos_token: int) -> frozenset[int]:
        """The tokens that end a sequence."""
        own = () if self.ignore_eos else (eos_token,)
        return frozenset((*self.rules.stop_token_ids, *own))

    @property
    def num_to_score(self) -> int:
        """Number of prompt tokens to score: all except the first, or none."""
        return 0 if self.prompt_logprobs is None else len(self.prompt_ids) - 1

    def check_fits(self, config: ModelConfig) -> None:
        """Checks the request against the limits of the model.

        Raises:
            PromptTooLongError: the prompt is longer than the context.
            InvalidRequestError: a token id is outside the vocabulary.
        """
        if len(self.prompt_ids) > config.sequence_len:
            raise PromptTooLongError(len(self.prompt_ids), config.sequence_len)
        for token_id in (min(self.prompt_ids), max(self.prompt_ids)):
            if not 0 <= token_id < config.vocab_size:
                limit = f"a token id in 0..{config.vocab_size - 1}"
                raise InvalidRequestError("prompt token", token_id, limit)
        self.sampling.check_vocab(config.vocab_size)
        self.rules.check_fits(config.vocab_size, self.ends(config.eos_token))


def _check_count(
    name: str, value: object, least: int, largest: int | None, limit: str | None = None
) -> None:
    if limit is None:
        limit = f"at least {least}" if largest is None else f"between {least} and {largest}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequestError(name, value, f"a whole number, {limit}")
    if value < least or (largest is not None and value > largest):
        raise InvalidRequestError(name, value, limit)
