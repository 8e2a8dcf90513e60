"""The answer that a client received, and how it differs from the wanted one. Pure: no I/O.

The wanted answer is the answer to the same request before any fault was injected.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from milliways.benchmarks.chaos.requests import ChaosRequest
from milliways.v1 import router_pb2

MAX_REASON_CHARS = 200
_REASONS = {
    router_pb2.FINISH_REASON_UNSPECIFIED: "",
    router_pb2.FINISH_REASON_STOP: "stop",
    router_pb2.FINISH_REASON_LENGTH: "length",
    router_pb2.FINISH_REASON_ERROR: "error",
}


@dataclass(slots=True)
class Choice:
    """One sample of an answer. It grows while its tokens arrive."""

    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[object] = field(default_factory=list[object])
    text: str = ""
    finish_reason: str = ""

    def add(
        self, token_ids: Sequence[int], text: str, logprobs: object, finish_reason: str
    ) -> None:
        """Appends the next tokens. `finish_reason` is empty if they are not the last ones."""
        self.token_ids += token_ids
        self.text += text
        self.logprobs.append(logprobs)
        self.finish_reason = finish_reason or self.finish_reason


@dataclass(frozen=True, slots=True)
class Break:
    """A connection that ended before the answer was complete."""

    at_s: float
    reason: str


@dataclass(slots=True)
class Answer:
    """All choices of an answer, the arrival times of tokens, and the connections that broke.

    Invariant: `token_times_s` never decreases; `choices[i]` is sample i of the request.
    """

    choices: list[Choice]
    token_times_s: list[float] = field(default_factory=list[float])
    # For gRPC only. Over HTTP, log-probabilities of the prompt are in each choice's `logprobs`.
    prompt_logprobs: list[object] = field(default_factory=list[object])
    breaks: list[Break] = field(default_factory=list[Break])

    @classmethod
    def of(cls, request: ChaosRequest) -> "Answer":
        """An empty answer with one choice for each sample of the request."""
        return cls([Choice() for _ in range(request.num_samples)])

    @property
    def is_complete(self) -> bool:
        return all(choice.finish_reason for choice in self.choices)

    def note_break(self, now_s: float, reason: object) -> None:
        """Records that a connection broke. The client requests the rest over another connection."""
        # gRPC's messages have several lines: join them, and keep the beginning.
        text = " ".join(str(reason).split())[:MAX_REASON_CHARS]
        self.breaks.append(Break(now_s, f"{type(reason).__name__}: {text}"))

    def add_chunk(self, chunk: Mapping[str, Any], now_s: float) -> None:
        """Adds a chunk of an HTTP stream."""
        for piece in chunk["choices"]:
            index: int = piece["index"]
            self.choices[index].add(
                piece["token_ids"], piece["text"], piece["logprobs"], piece["finish_reason"] or ""
            )
            self.token_times_s.append(now_s)

    def add_scores(self, scores: Iterable[router_pb2.PromptLogprob]) -> None:
        """Adds log-probabilities of the prompt from a gRPC stream.

        Raises:
            ValueError: a position is repeated or skipped.
        """
        for score in scores:
            if score.position != len(self.prompt_logprobs) + 1:
                number = len(self.prompt_logprobs)
                raise ValueError(f"prompt token {score.position} came after {number}")
            tops = [*score.top_token_ids], [*score.top_logprobs]
            self.prompt_logprobs.append((score.token_id, score.logprob, tops))

    def add_event(self, event: router_pb2.TokenEvent, now_s: float) -> None:
        """Adds a token of a gRPC stream.

        Raises:
            ValueError: a token is repeated or skipped.
        """
        choice = self.choices[event.sample_index]
        # A token with another index must not be appended.
        if event.index != len(choice.token_ids):
            raise ValueError(f"token {event.index} came after {len(choice.token_ids)}")
        tops = [*event.top_token_ids], [*event.top_logprobs]
        choice.add(
            [event.token_id], event.text, (event.logprob, tops), _REASONS[event.finish_reason]
        )
        self.token_times_s.append(now_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How one request ended: with a complete answer, or with an error."""

    request_index: int
    started_s: float
    ended_s: float
    answer: Answer
    error: str = ""
    # The first difference from the wanted answer; "" if there is none, None until compared.
    difference: str | None = None

    def compared(self, wanted: Mapping[int, Answer]) -> "Outcome":
        """Compares the answer with the wanted answer of its request index; returns a new outcome.

        The new outcome has the times of the tokens but not the tokens, to save memory.
        """
        if self.difference is not None:
            return self
        is_comparable = not self.error and self.request_index in wanted
        found = difference(wanted[self.request_index], self.answer) if is_comparable else ""
        times_only = replace(self.answer, choices=[], prompt_logprobs=[])
        return replace(self, answer=times_only, difference=found)

    @property
    def first_token_s(self) -> float | None:
        """Seconds from the start to the first token; None if no token came."""
        times_s = self.answer.token_times_s
        return times_s[0] - self.started_s if times_s else None

    def stall_s(self, since_s: float = float("-inf"), until_s: float = float("inf")) -> float:
        """The longest wait for a token that overlaps the given period; 0 if there is none.

        The wait for the first token does not count. If the request failed, the time from its last
        token to the error counts.
        """
        times_s = list(self.answer.token_times_s)
        if self.error and times_s:
            times_s.append(self.ended_s)
        gaps = [
            late_s - early_s
            for early_s, late_s in pairwise(times_s)
            if early_s <= until_s and late_s >= since_s
        ]
        return max(gaps, default=0.0)

    def was_running(self, since_s: float, until_s: float) -> bool:
        """Whether the request ran at any time in the given period."""
        return self.started_s <= until_s and self.ended_s >= since_s


def difference(wanted: Answer, got: Answer) -> str:
    """Describes the first difference between two answers; "" if they are bit-equal."""
    was, now = wanted.prompt_logprobs, got.prompt_logprobs
    if was != now:
        at = _first_difference(was, now)
        return f"prompt_logprobs[{at}]: {now[at : at + 3]}, was {was[at : at + 3]}"
    for index, (one, other) in enumerate(zip(wanted.choices, got.choices, strict=True)):
        for name in ("token_ids", "logprobs"):
            was, now = getattr(one, name), getattr(other, name)
            if was != now:
                at = _first_difference(was, now)
                return f"sample {index}, {name}[{at}]: {now[at : at + 3]}, was {was[at : at + 3]}"
        for name in ("text", "finish_reason"):
            was, now = getattr(one, name), getattr(other, name)
            if was != now:
                return f"sample {index}, {name}: {now!r}, was {was!r}"
    return ""


def _first_difference(one: Sequence[object], other: Sequence[object]) -> int:
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
