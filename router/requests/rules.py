"""Rules of a request: which tokens may be drawn, what ends a sequence, what is shown.

Everything here is a function of the tokens so far. So any router that takes a sequence over applies
the same rules to its next token.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from milliways.model.errors import InvalidRequestError
from milliways.model.sampling_params import MAX_LOGIT_BIASES

MAX_STOP_TOKENS = 128
MAX_BAD_WORDS = 256
MAX_BAD_WORD_TOKENS = 64
_MAX_INT32 = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRules:
    """The defaults change nothing.

    `min_tokens`: until a sequence has so many tokens, no token that ends it is drawn, and its text
    is not searched for stop strings.
    `stop_token_ids`: end a sequence, as the end-of-sequence token does; also if that is ignored.
    `allowed_token_ids`: no other tokens are drawn; empty: all are allowed.
    `bad_words`: their last token is not drawn after the others. If that would leave no allowed
    token, they do not apply.
    `includes_stop`: what ended a sequence is part of its text.
    `shows_special`: control tokens have text; with `spaces_special`, spaces around it.

    Raises:
        InvalidRequestError: a field is out of range; names field, value and limit.
    """

    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    includes_stop: bool = False
    shows_special: bool = False
    spaces_special: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.min_tokens <= _MAX_INT32:
            raise InvalidRequestError("min_tokens", self.min_tokens, f"in 0..{_MAX_INT32}")
        _check_number("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKENS)
        _check_number("allowed_token_ids", self.allowed_token_ids, MAX_LOGIT_BIASES)
        _check_number("bad_words", self.bad_words, MAX_BAD_WORDS)
        for word in self.bad_words:
            if not 0 < len(word) <= MAX_BAD_WORD_TOKENS:
                limit = f"words of 1 to {MAX_BAD_WORD_TOKENS} tokens"
                raise InvalidRequestError("bad_words", f"a word of {len(word)} tokens", limit)

    @property
    def limits_draws(self) -> bool:
        """Whether some token may be forbidden at some place."""
        return bool(self.min_tokens or self.allowed_token_ids or self.bad_words)

    @property
    def num_forbidden(self) -> int:
        """The most tokens that are forbidden at one place, besides those that are not allowed."""
        num_ends = len(self.stop_token_ids) + 1 if self.min_tokens else 0
        return num_ends + len(self.bad_words)

    def forbidden(self, completion: Sequence[int], ends: Collection[int]) -> tuple[int, ...]:
        """The tokens that must not follow a completion; `ends` are those that end a sequence."""
        early = set(ends) if len(completion) < self.min_tokens else set[int]()
        all_of_them = early | {word[-1] for word in self.bad_words if _precedes(word, completion)}
        if self.allowed_token_ids and all_of_them.issuperset(self.allowed_token_ids):
            return tuple(sorted(early))
        return tuple(sorted(all_of_them))

    def check_fits(self, vocab_size: int, ends: Collection[int]) -> None:
        """Checks the rules against a vocabulary, and against what ends a sequence.

        Raises:
            InvalidRequestError: a token id is outside the vocabulary, or none could be drawn.
        """
        for name in ("stop_token_ids", "allowed_token_ids"):
            _check_ids(name, getattr(self, name), vocab_size)
        for word in self.bad_words:
            _check_ids("bad_words", word, vocab_size)
        if self.min_tokens and self.allowed_token_ids and set(self.allowed_token_ids) <= set(ends):
            limit = "with a token that does not end the sequence, because min_tokens is set"
            raise InvalidRequestError("allowed_token_ids", self.allowed_token_ids, limit)


def _precedes(word: tuple[int, ...], completion: Sequence[int]) -> bool:
    """Whether a completion ends in all tokens of a word but its last."""
    num_before = len(word) - 1
    return num_before <= len(completion) and (
        tuple(completion[len(completion) - num_before :]) == word[:-1]
    )


def _check_number(name: str, items: Collection[object], most: int) -> None:
    if len(items) > most:
        raise InvalidRequestError(name, f"{len(items)} entries", f"at most {most} entries")


def _check_ids(name: str, token_ids: Collection[int], vocab_size: int) -> None:
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(name, token_id, f"of token ids in 0..{vocab_size - 1}")
