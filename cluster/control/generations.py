"""Which generations of workers there are, which of them serves, and which one ends.

The workers of a generation have the same model, the same number formats, and all else in which
workers must agree (`changes.GENERATION`). A cluster has one generation; while it changes to
another one it has two:

1. The new one is *wanted*: whoever wants it asks again and again while its workers load. If
   nobody asks any more, it ends.
2. When it is complete, Ray Serve starts ingress replicas. As soon as one is healthy, it *follows*
   the new generation, which serves from then on.
3. Replicas of the old one leave. When the last one has, nobody follows the old one: it ends.

Nothing of this is stored. Replicas and whoever wants a generation say so with every question, so a
controller that starts learns it within seconds; until then nothing ends that it found.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from milliways.cluster.control.changes import OF_INGRESS, Values, differences
from milliways.cluster.control.worker_record import WorkerRecord
from milliways.wire.errors import ClusterError

# A replica asks for a newer view at least every ten seconds, and may be slow.
FORGET_AFTER_S = 60.0
# A replica notices at once that its controller died, and asks the next one.
UNHEARD_S = 20.0
# Tries to load, or deaths, of one worker in a row after which a new generation is given up.
MAX_FAILED_LOADS = 3
MAX_DEATHS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Follower:
    """An ingress replica that asks for a view: its settings, and the generation that it knows.

    Before it has been healthy it wants its generation, and does not follow it yet.
    """

    follower_id: str
    values: Values
    generation: int = 0
    is_healthy: bool = True


@dataclass(frozen=True, slots=True)
class _Heard:
    """When a follower was heard last, and with which settings it runs."""

    at_s: float
    values: Values

    def is_alive(self, now_s: float) -> bool:
        return now_s - self.at_s <= FORGET_AFTER_S


@dataclass(slots=True)
class _Life:
    """When a generation was wanted last, and what was heard last of each of its followers."""

    wanted_at_s: float
    # Until then there may be followers that this controller has not heard yet.
    unheard_until_s: float
    followers: dict[str, _Heard] = field(default_factory=dict[str, _Heard])

    def is_followed(self, now_s: float) -> bool:
        return any(heard.is_alive(now_s) for heard in self.followers.values())


class Generations:
    """The generations by number; a newer one has a higher number.

    Invariant: `serving` is one of them, unless there is none. It never ends.
    """

    def __init__(self) -> None:
        self._lives: dict[int, _Life] = {}
        self._serving = 0

    @property
    def numbers(self) -> tuple[int, ...]:
        return tuple(sorted(self._lives))

    @property
    def next_number(self) -> int:
        """The number of a generation that is to be started."""
        return max(self._lives, default=0) + 1

    def add(self, number: int, now_s: float, *, was_found: bool = False) -> None:
        """A generation begins, or a controller that starts has found it."""
        unheard_until_s = now_s + UNHEARD_S if was_found else now_s
        self._lives[number] = _Life(now_s, unheard_until_s)
        if self._serving not in self._lives:
            self._serving = number

    def remove(self, number: int) -> None:
        """A generation has ended."""
        assert number != self._serving, "the generation that serves does not end"
        del self._lives[number]

    def want(self, number: int, now_s: float) -> None:
        """Somebody waits until a generation is complete, or has it."""
        self._lives[number].wanted_at_s = now_s

    def follow(
        self, number: int, follower_id: str, now_s: float, values: Values = MappingProxyType({})
    ) -> None:
        """An ingress replica with these settings follows a generation, and no other one."""
        self.unfollow(follower_id)
        life = self._lives[number]
        life.followers[follower_id] = _Heard(now_s, values)
        # From now on it is there for its followers.
        life.wanted_at_s = float("-inf")

    def unfollow(self, follower_id: str) -> None:
        """An ingress replica has nothing left to do."""
        for life in self._lives.values():
            life.followers.pop(follower_id, None)

    def serving(self, now_s: float) -> int:
        """The generation that serves: the newest one that is followed, or the last that was."""
        followed = [n for n, life in self._lives.items() if life.is_followed(now_s)]
        if followed:
            self._serving = max(followed)
        return self._serving

    def others(self, now_s: float) -> tuple[int, ...]:
        """All but the one that serves, in order."""
        serving = self.serving(now_s)
        return tuple(number for number in self.numbers if number != serving)

    def is_followed(self, number: int, now_s: float) -> bool:
        """Whether an ingress replica has something to do with it."""
        return self._lives[number].is_followed(now_s)

    def outdated_followers(self, number: int, declared: Values, now_s: float) -> tuple[str, ...]:
        """The replicas that do not run with the settings that are declared, in order."""
        heard = self._lives[number].followers.items()
        return tuple(
            sorted(
                follower_id
                for follower_id, last in heard
                if last.is_alive(now_s) and differences(last.values, declared, OF_INGRESS)
            )
        )

    def due(self, now_s: float) -> list[int]:
        """The generations that nobody needs any more.

        If no replica says what it follows, as when all died, nobody knows: none is due.
        """
        if not any(life.is_followed(now_s) for life in self._lives.values()):
            return []
        return [number for number in self.others(now_s) if not self._is_needed(number, now_s)]

    def _is_needed(self, number: int, now_s: float) -> bool:
        life = self._lives[number]
        is_wanted = now_s - life.wanted_at_s <= FORGET_AFTER_S
        return is_wanted or life.is_followed(now_s) or now_s <= life.unheard_until_s


def hopeless(
    records: Sequence[WorkerRecord],
    failure: ClusterError | None,
    waited_s: float,
    start_timeout_s: float,
    load_timeout_s: float,
) -> str:
    """Why a generation that starts will not be complete; empty as long as it may be.

    Time to load comes in addition, once all workers have a process.
    """
    if failure is not None:
        return str(failure)
    for record in records:
        gave_up = record.num_failed_loads >= MAX_FAILED_LOADS
        if gave_up or record.num_quick_deaths >= MAX_DEATHS:
            return record.last_error or f"{record.worker_id} dies again and again"
    limit_s = start_timeout_s
    if all(record.spawned is not None for record in records):
        limit_s += load_timeout_s
    if waited_s <= limit_s:
        return ""
    waits = [f"{r.worker_id} waits for {r.waits_for}" for r in records if r.waits_for]
    return f"it is not complete within {limit_s:g} s: {'; '.join(waits)}"
