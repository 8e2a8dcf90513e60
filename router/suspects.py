"""Finds the sequences that kill workers. Pure: deaths and completed steps are arguments.

If workers die one after another with the same rows, that may be chance, or one of the sequences
may cause it. Each of these sequences is then computed alone. A step that completes clears it. If
workers die several times while it is computed alone, it is guilty.

A sequence that is alone at this router may share a worker with another router's rows, which may be
the ones that kill the worker. An innocent sequence should not be blamed for that, so each attempt
waits a random time, longer after each death: two routers that try their suspects then rarely meet
at the same worker several times.
"""

from collections.abc import Iterable
from random import Random

from milliways.router.requests.sequence import Sequence
from milliways.wire.errors import ClusterError

MAX_DEATHS_ALONE = 3
PAUSE_S = 0.5


class RowsKilledWorkersError(ClusterError):
    """Workers died with the same rows: several, or one with the rows of a suspect."""

    def __init__(self, worker_ids: list[str]) -> None:
        super().__init__(f"{', '.join(worker_ids)} died computing the same tokens")


class Suspects:
    """Owns the sequences that are computed alone.

    Invariant: `_deaths_alone` has only sequences that have not ended, in the order in which they
    are tried; each count is below MAX_DEATHS_ALONE until the sequence is failed.
    """

    def __init__(self, random: Random) -> None:
        self._random = random
        # How many workers died while it was computed alone.
        self._deaths_alone: dict[Sequence, int] = {}

    def next(self) -> Sequence | None:
        """The one sequence to compute now; it stays the next until it is cleared."""
        return next(iter(self._deaths_alone), None)

    def pause_s(self, suspect: Sequence) -> float:
        """How long to wait before the suspect is tried."""
        return self._random.uniform(0.0, PAUSE_S * 2 ** self._deaths_alone[suspect])

    def accuse(self, sequences: Iterable[Sequence]) -> None:
        """Workers died with these sequences, and one of them may be the cause."""
        for sequence in sequences:
            self._deaths_alone.setdefault(sequence, 0)

    def is_guilty(self, suspect: Sequence) -> bool:
        """Counts a worker that died while the suspect was alone; returns whether too many did."""
        self._deaths_alone[suspect] += 1
        return self._deaths_alone[suspect] >= MAX_DEATHS_ALONE

    def clear(self, sequences: Iterable[Sequence]) -> None:
        """A step with these sequences completed, or they ended."""
        for sequence in sequences:
            self._deaths_alone.pop(sequence, None)
