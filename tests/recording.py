"""Records what a router sends for its requests."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from milliways.router.requests.sequence import PromptScores, TokenEvent
from milliways.wire.errors import ClusterError


@dataclass(slots=True)
class Recording:
    """The listener of one request; it records everything it receives."""

    events: list[TokenEvent] = field(default_factory=list)
    scores: list[PromptScores] = field(default_factory=list)
    error: ClusterError | None = None
    has_ended: bool = False
    has_moved: bool = False

    def scored(self, scores: PromptScores) -> None:
        assert not (self.has_ended or self.events)
        self.scores.append(scores)

    def tokens(self, events: Sequence[TokenEvent]) -> None:
        assert not self.has_ended
        self.events += events

    def ended(self, error: ClusterError | None) -> None:
        assert not self.has_ended
        self.has_ended, self.error = True, error

    def moved(self) -> None:
        self.has_moved = True


def all_ended(recordings: Mapping[str, Recording]) -> bool:
    return all(one.has_ended or one.has_moved for one in recordings.values())


def num_running(recordings: Mapping[str, Recording]) -> int:
    return sum(not one.has_ended for one in recordings.values())
