"""One token stream: its tokens, how far they are computed, its KV blocks, its text."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from milliways.model.sampling_params import SampledToken
from milliways.router.requests.request import GenerationRequest
from milliways.router.requests.stop import StopMatcher


class SequenceStatus(Enum):
    """WAITING -> RUNNING -> FINISHED or FAILED; RUNNING <-> PREEMPTED if there are no blocks."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"
    FAILED = "failed"


ALLOWED_MOVES: dict[SequenceStatus, set[SequenceStatus]] = {
    SequenceStatus.WAITING: {SequenceStatus.RUNNING, SequenceStatus.FAILED},
    SequenceStatus.RUNNING: {
        SequenceStatus.PREEMPTED,
        SequenceStatus.FINISHED,
        SequenceStatus.FAILED,
    },
    SequenceStatus.PREEMPTED: {SequenceStatus.RUNNING, SequenceStatus.FAILED},
    SequenceStatus.FINISHED: set(),
    SequenceStatus.FAILED: set(),
}


class FinishReason(Enum):
    """Why a sequence ended; the values are OpenAI's."""

    STOP = "stop"
    LENGTH = "length"
    # The logits were not finite: no token can be drawn from them.
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvent:
    """A token of one sequence, with the text it completes (often none, sometimes held back)."""

    sample_index: int
    token_id: int
    text: str
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...]
    finish_reason: FinishReason | None
    # The stop string or the stop token that ended the sequence; None if anything else did.
    stop_reason: str | int | None = None
    # On a sequence's first token here: how many tokens of its prompt were in the prefix cache. That
    # depends on what was computed before, so equal events may differ in it.
    num_cached: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptScores:
    """Log-probabilities of the prompt's tokens from `position` on, each given the tokens before it.

    The first token of a prompt has none, so the first `position` is 1. All samples of a request
    share them.
    """

    position: int
    tokens: tuple[SampledToken, ...]


# The output of a request: first all scores that it wants, then the tokens of its samples.
Event = PromptScores | TokenEvent


class Detokenizer(Protocol):
    """Turns the tokens of one sequence into text, one complete character after another."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...

    def copy(self) -> "Detokenizer":
        """Another one in the same state."""
        ...


class NoText:
    """The detokenizer of a model without a tokenizer: tokens have no text."""

    def push(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""

    def copy(self) -> "NoText":
        return self


class Sequence:
    """A prompt and the tokens drawn so far. `num_computed` tokens have their keys and values.

    `num_scored` tokens of the prompt need no score any more: one sequence of a request scores the
    prompt for all. Until then it takes no more than these from the prefix cache, because a block
    holds keys and values, but not the rows of logits that score.

    Invariant: `block_table` has a block for each computed position. `finish_reason` is set once, by
    the token or score that ends the sequence. `status` changes by `move` only.
    """

    def __init__(
        self,
        request: GenerationRequest,
        sample_index: int,
        detokenizer: Detokenizer,
        max_completion_tokens: int,
        eos_token: int,
        num_scored: int = 0,
    ) -> None:
        self.request = request
        self.sample_index = sample_index
        self.status = SequenceStatus.WAITING
        self.token_ids = list(request.prompt_ids)
        self.num_computed = 0
        # Set once, when it begins to run: tokens of the prompt that need not be computed.
        self.num_cached: int | None = None
        self.num_scored = num_scored
        # Set by its last token, or by its last score if no token is wanted.
        self.finish_reason: FinishReason | None = None
        self.block_table: list[int] = []
        self._max_tokens = len(request.prompt_ids) + max_completion_tokens
        self._ends = request.ends(eos_token)
        self._detokenizer = detokenizer
        self._stop_matcher = StopMatcher(request.stop, keeps_match=request.rules.includes_stop)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def num_to_compute(self) -> int:
        """Tokens whose keys and values are missing: 1 while decoding, more in prefill."""
        # The row of the last token predicts the next one; without a next one it is not needed.
        num_wanted = len(self.token_ids) - (not self.wants_tokens)
        return num_wanted - self.num_computed

    @property
    def wants_tokens(self) -> bool:
        """Whether tokens are drawn; otherwise the prompt is only scored."""
        return self.request.max_tokens > 0

    @property
    def is_scored(self) -> bool:
        """Whether all wanted log-probabilities of the prompt were sent."""
        return self.num_scored >= self.request.num_to_score

    @property
    def reusable_ids(self) -> list[int]:
        """The tokens of which all but the last may be taken from the prefix cache."""
        return self.token_ids if self.is_scored else self.token_ids[: self.num_scored + 1]

    def forbidden_ids(self) -> tuple[int, ...]:
        """Tokens that must not be drawn next, besides those that are never allowed."""
        rules = self.request.rules
        if not rules.limits_draws:
            return ()
        return rules.forbidden(self.token_ids[self.num_prompt_tokens :], self._ends)

    def next_tokens(self, num_tokens: int) -> list[int]:
        """The next tokens to compute, from position `num_computed` on."""
        return self.token_ids[self.num_computed : self.num_computed + num_tokens]

    def move(self, to: SequenceStatus) -> None:
        """Changes the status; the only place that does."""
        assert to in ALLOWED_MOVES[self.status], f"{self.status} -> {to}"
        self.status = to

    def score(self, tokens: list[SampledToken]) -> PromptScores:
        """Adds the log-probabilities of the next prompt tokens."""
        scores = PromptScores(position=self.num_scored + 1, tokens=tuple(tokens))
        self.num_scored += len(tokens)
        assert self.num_scored <= self.request.num_to_score
        if self.is_scored and not self.wants_tokens:
            self.finish_reason = FinishReason.LENGTH
        return scores

    def append(self, sampled: SampledToken) -> TokenEvent:
        """Adds a drawn token; the event has its text, and says whether the sequence ends."""
        if not sampled.is_valid:
            return self._event(sampled, self._flush(), FinishReason.ERROR)
        self.token_ids.append(sampled.token_id)
        if sampled.token_id in self._ends:
            return self._end(sampled)
        text = self._push(sampled.token_id)
        if self._stop_matcher.has_matched:
            return self._event(sampled, text, FinishReason.STOP, self._stop_matcher.matched)
        if len(self.token_ids) >= self._max_tokens:
            return self._event(sampled, text + self._flush(), FinishReason.LENGTH)
        return self._event(sampled, text, None)

    def replay(self, token_ids: Iterable[int]) -> None:
        """Adds tokens that another router drew and whose text the client has received."""
        for token_id in token_ids:
            self.token_ids.append(token_id)
            self._push(token_id)

    def _push(self, token_id: int) -> str:
        """The text that can be shown after the last token, which was just added."""
        text = self._detokenizer.push(token_id)
        if len(self.token_ids) - self.num_prompt_tokens <= self.request.rules.min_tokens:
            return text
        return self._stop_matcher.push(text)

    def _end(self, sampled: SampledToken) -> TokenEvent:
        """Ends with a token that is only shown if the request wants it."""
        rules, token_id = self.request.rules, sampled.token_id
        shown = self._push(token_id) if rules.includes_stop else ""
        reason = token_id if token_id in rules.stop_token_ids else None
        return self._event(sampled, shown + self._flush(), FinishReason.STOP, reason)

    def _flush(self) -> str:
        """The text that was held back: an incomplete character, the start of a stop string."""
        return self._stop_matcher.push(self._detokenizer.flush()) + self._stop_matcher.flush()

    def _event(
        self,
        sampled: SampledToken,
        text: str,
        reason: FinishReason | None,
        stop_reason: str | int | None = None,
    ) -> TokenEvent:
        self.finish_reason = reason
        return TokenEvent(
            sample_index=self.sample_index,
            token_id=sampled.token_id,
            text=text,
            logprob=sampled.logprob,
            top_logprobs=sampled.top_logprobs,
            finish_reason=reason,
            stop_reason=stop_reason,
            num_cached=self._take_num_cached(),
        )

    def found_cached(self, num_tokens: int) -> None:
        """Notes how many of the tokens had keys and values when it began to run."""
        if self.num_cached is None:
            self.num_cached = min(num_tokens, self.num_prompt_tokens)

    def _take_num_cached(self) -> int:
        """What the first event says; later ones say nothing."""
        num_cached, self.num_cached = self.num_cached or 0, 0
        return num_cached
