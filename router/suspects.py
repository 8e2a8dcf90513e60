"""Which sequences may be killing workers. Pure: told of deaths and of steps that went well.

Workers that die one after the other with the same rows may be bad luck, or the work of one of the
sequences in them. Each of those is then computed alone. A step that goes well clears it; who is
there alone when a worker dies, time after time, is guilty.

Alone at this router is not alone at a worker: another router's rows may be the ones that kill it.
Whoever shares its fate would be blamed as well, so attempts wait a random while, longer each time:
two routers that suspect their own then hardly ever meet at a worker again and again.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Row
from random import Random

from milliways.router.requests.sequence import Sequence
from milliways.wire.errors import ClusterError

MAX_DEATHS_ALONE = 3
PAUSE_S = 0.5


class RowsKilledWorkersError(ClusterError):
    """Workers died with the same rows: several, or one with rows of a suspect."""

    def __init__(self, worker_ids: Row[str]) -> None:
        super().__init__(f"{', '.join(worker_ids)} died computing the same tokens")


class Suspects:
    """Owns who is to be computed alone."""

    def __init__(self, random: Random) -> None:
        self._random = random
        # How many workers died while it was computed alone; in the order in which they are tried.
        self._deaths_alone: dict[Sequence, int] = {}

    def next(self) -> Sequence | None:
        """Who is to be computed alone now; nobody else is, until it is cleared or gone."""
        return next(iter(self._deaths_alone), None)

    def pause_s(self, suspect: Sequence) -> float:
        """How long to wait before it is tried."""
        return self._random.uniform(0.0, PAUSE_S * 2 ** self._deaths_alone[suspect])

    def accuse(self, sequences: Iterable[Sequence]) -> None:
        """Workers died with these, and one of them may be why."""
        for sequence in sequences:
            self._deaths_alone.setdefault(sequence, 0)

    def is_guilty(self, suspect: Sequence) -> bool:
        """A worker died while this one was computed alone: whether that is enough."""
        self._deaths_alone[suspect] += 1
        return self._deaths_alone[suspect] >= MAX_DEATHS_ALONE

    def clear(self, sequences: Iterable[Sequence]) -> None:
        """A step with these went well, or they are gone."""
        for sequence in sequences:
            self._deaths_alone.pop(sequence, None)
