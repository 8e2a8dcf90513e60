"""What a client heard of a request, and whether it is what it heard before. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from milliways.benchmarks.chaos.asks import Ask
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
    """One sample as it grows."""

    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[object] = field(default_factory=list[object])
    text: str = ""
    finish_reason: str = ""

    def add(
        self, token_ids: Sequence[int], text: str, logprobs: object, finish_reason: str
    ) -> None:
        """The next tokens of it."""
        self.token_ids += token_ids
        self.text += text
        self.logprobs.append(logprobs)
        self.finish_reason = finish_reason or self.finish_reason


@dataclass(frozen=True, slots=True)
class Break:
    """The end of a connection before that of the answer."""

    at_s: float
    reason: str


@dataclass(slots=True)
class Answer:
    """All samples of a request, when tokens came, and when a connection broke meanwhile."""

    choices: list[Choice]
    token_times_s: list[float] = field(default_factory=list[float])
    # Of a gRPC stream; over HTTP they are among those of each choice.
    prompt_logprobs: list[object] = field(default_factory=list[object])
    breaks: list[Break] = field(default_factory=list[Break])

    @classmethod
    def of(cls, ask: Ask) -> "Answer":
        """An answer that is to come."""
        return cls([Choice() for _ in range(ask.num_samples)])

    @property
    def is_complete(self) -> bool:
        return all(choice.finish_reason for choice in self.choices)

    def note_break(self, now_s: float, reason: object) -> None:
        """A connection broke; the rest comes over another."""
        # Those of gRPC are paragraphs.
        text = " ".join(str(reason).split())[:MAX_REASON_CHARS]
        self.breaks.append(Break(now_s, f"{type(reason).__name__}: {text}"))

    def add_chunk(self, chunk: Mapping[str, Any], now_s: float) -> None:
        """A piece of an HTTP stream."""
        for piece in chunk["choices"]:
            index: int = piece["index"]
            self.choices[index].add(
                piece["token_ids"], piece["text"], piece["logprobs"], piece["finish_reason"] or ""
            )
            self.token_times_s.append(now_s)

    def add_scores(self, scores: Iterable[router_pb2.PromptLogprob]) -> None:
        """Log-probabilities of the prompt, of a gRPC stream."""
        for score in scores:
            if score.position != len(self.prompt_logprobs) + 1:
                number = len(self.prompt_logprobs)
                raise ValueError(f"prompt token {score.position} came after {number}")
            tops = [*score.top_token_ids], [*score.top_logprobs]
            self.prompt_logprobs.append((score.token_id, score.logprob, tops))

    def add_event(self, event: router_pb2.TokenEvent, now_s: float) -> None:
        """A token of a gRPC stream."""
        choice = self.choices[event.sample_index]
        # A token that came twice, or too early, must not pass for the one that was to come.
        if event.index != len(choice.token_ids):
            raise ValueError(f"token {event.index} came after {len(choice.token_ids)}")
        tops = [*event.top_token_ids], [*event.top_logprobs]
        choice.add(
            [event.token_id], event.text, (event.logprob, tops), _REASONS[event.finish_reason]
        )
        self.token_times_s.append(now_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """What became of one request: an answer that is complete, or what went wrong."""

    ask_index: int
    started_s: float
    ended_s: float
    answer: Answer
    error: str = ""
    # Where the answer is not what it was undisturbed; None as long as nobody has looked.
    difference: str | None = None

    def judged(self, wanted: Mapping[int, Answer]) -> "Heard":
        """As it was compared with what was wanted of each request; the tokens are let go of."""
        if self.difference is not None:
            return self
        is_comparable = not self.error and self.ask_index in wanted
        found = difference(wanted[self.ask_index], self.answer) if is_comparable else ""
        times_only = replace(self.answer, choices=[], prompt_logprobs=[])
        return replace(self, answer=times_only, difference=found)

    @property
    def first_token_s(self) -> float | None:
        """The wait for the first token; None where none came."""
        times_s = self.answer.token_times_s
        return times_s[0] - self.started_s if times_s else None

    def stall_s(self, since_s: float = float("-inf"), until_s: float = float("inf")) -> float:
        """The longest wait between two tokens that fell at least in part into this time."""
        times_s = list(self.answer.token_times_s)
        if self.error and times_s:
            # Who is failed at last has waited for that.
            times_s.append(self.ended_s)
        gaps = [
            late_s - early_s
            for early_s, late_s in pairwise(times_s)
            if early_s <= until_s and late_s >= since_s
        ]
        return max(gaps, default=0.0)

    def was_running(self, since_s: float, until_s: float) -> bool:
        """Whether any of its time lies there."""
        return self.started_s <= until_s and self.ended_s >= since_s


def difference(wanted: Answer, got: Answer) -> str:
    """Where an answer is not what it was before; empty where it is, to the bit."""
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
