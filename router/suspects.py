"""Which sequences may be killing workers. Pure: told of deaths and of steps that went well.

Workers that die one after the other with the same rows may be bad luck, or the work of one of the
sequences in them. Each of those is then computed alone: who takes workers down alone as well is
guilty, all others are cleared by the step that goes well.
"""

from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Row

from cluster.errors import ClusterError
from router.sequence import Sequence, SequenceStatus

_ENDED = (SequenceStatus.FINISHED, SequenceStatus.FAILED)


class WorkersDiedError(ClusterError):
    """Workers died one after the other with the same rows."""

    def __init__(self, worker_ids: Row[str]) -> None:
        super().__init__(f"{', '.join(worker_ids)} died computing the same tokens")


class Suspects:
    """Owns who is to be computed alone."""

    def __init__(self) -> None:
        self._untried: deque[Sequence] = deque()
        self._accused: list[Sequence] = []

    def next(self) -> Sequence | None:
        """Who is to be computed alone now; nobody else is, until it is cleared or gone."""
        while self._untried and self._untried[0].status in _ENDED:
            self._untried.popleft()
        return self._untried[0] if self._untried else None

    def accuse(self, sequences: Row[Sequence]) -> Sequence | None:
        """Workers died with these: which one it was, if that is clear."""
        if len(sequences) == 1 and sequences[0] in self._accused:
            self.clear(sequences)
            return sequences[0]
        self._accused += [s for s in sequences if s not in self._accused]
        self._untried += [s for s in sequences if s not in self._untried]
        return None

    def clear(self, sequences: Iterable[Sequence]) -> None:
        """A step with these went well, or they are gone."""
        for sequence in sequences:
            if sequence in self._accused:
                self._accused.remove(sequence)
            if sequence in self._untried:
                self._untried.remove(sequence)
