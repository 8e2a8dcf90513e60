"""Which KV blocks of a router its buddy has, and which it is sent next. Pure: times are given.

Life of a full block of a running sequence:

1. `next_run` finds that the buddy has not been sent it, and cuts a run of blocks that follow one
   another, as long as fewer calls and bytes than the limits are in flight. Else the block stays
   where it is: nothing is kept for later, and nobody waits.
2. `stored`: the buddy has it. Equal blocks of other sequences are not sent again.
   `failed`: it has not; the block is looked at anew, after a while.
   `found_gap`: it no longer has those before; the sequence is sent from its beginning.
3. Its sequence ends, and the block is forgotten here. The buddy keeps it until it is evicted.

`follow` names another buddy, who has nothing: what runs then is sent anew.
"""

from collections import OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from milliways.model.block_pool import chain_digest
from milliways.router.requests.sequence import Sequence, SequenceStatus

# A worker by its worker_id, and which life of it.
Buddy = tuple[str, int]

_ENDED = (SequenceStatus.FINISHED, SequenceStatus.FAILED)


@dataclass(frozen=True, slots=True, kw_only=True)
class StandbyLimits:
    """Bounds of what is on its way to a buddy, and of what is remembered of it."""

    max_calls: int = 4
    # An expert call to the same worker may have so much ahead of it. One block goes in any case.
    max_bytes: int = 4 << 20
    max_call_bytes: int = 1 << 20
    # So long nothing is sent after the buddy had no room, or could not be reached.
    pause_s: float = 1.0
    max_remembered: int = 1 << 16


@dataclass(slots=True)
class StandbyFigures:
    """Counts since the start, for status and metrics."""

    num_copied: int = 0
    num_copied_bytes: int = 0
    # The buddy did not take them, or their sequence ended before they were sent.
    num_dropped: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Run:
    """Full blocks of one sequence, one after another, that are sent in one call."""

    sequence: Sequence
    parent: bytes
    digests: tuple[bytes, ...]
    block_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    num_bytes: int
    # Of what was told to `follow`: a later buddy has nothing of it.
    generation: int


@dataclass(slots=True)
class _Track:
    """A live sequence: the digests of its full blocks, and how many of them were sent."""

    digests: list[bytes] = field(default_factory=list[bytes])
    num_sent: int = 0


class Standby:
    """Owns what is known of the buddy's copies."""

    def __init__(self, block_size: int, limits: StandbyLimits | None = None) -> None:
        self.figures = StandbyFigures()
        self.buddy: Buddy | None = None
        self._block_size = block_size
        self._limits = limits or StandbyLimits()
        self._tracks: dict[Sequence, _Track] = {}
        # Digests of blocks that the buddy has, the latest last; and those on their way to it.
        self._there: OrderedDict[bytes, None] = OrderedDict()
        self._sending: set[bytes] = set()
        self._num_calls = 0
        self._num_bytes = 0
        self._generation = 0
        self._paused_until_s = 0.0

    @property
    def num_calls(self) -> int:
        """Runs that are neither stored nor failed."""
        return self._num_calls

    @property
    def is_in_use(self) -> bool:
        """Whether the buddy has, or is being sent, blocks of a sequence that has not ended."""
        self._forget_ended()
        return any(track.num_sent for track in self._tracks.values())

    def follow(self, buddy: Buddy | None) -> None:
        """From now on copies go there; without effect where they do already."""
        if buddy == self.buddy:
            return
        self.buddy = buddy
        self._generation += 1
        self._there.clear()
        self._sending.clear()
        self._num_calls = self._num_bytes = 0
        self._paused_until_s = 0.0
        for track in self._tracks.values():
            track.num_sent = 0

    def next_run(self, running: Iterable[Sequence], block_bytes: int, now_s: float) -> Run | None:
        """What to send now, of the sequence that would lose most; None where there is nothing.

        It counts as in flight until `stored`, `failed` or `found_gap`.
        """
        self._forget_ended()
        max_blocks = self._room(block_bytes)
        if self.buddy is None or now_s < self._paused_until_s or not max_blocks:
            return None
        chosen, most_behind = None, 0
        for sequence in running:
            num_behind = self._num_behind(sequence)
            if num_behind > most_behind:
                chosen, most_behind = sequence, num_behind
        if chosen is None:
            return None
        return self._cut(chosen, min(max_blocks, most_behind), block_bytes)

    def stored(self, run: Run, num_blocks: int, now_s: float) -> None:
        """The buddy has the first blocks of a run; for the rest of them it had no room."""
        if not self._land(run):
            return
        self.figures.num_copied += num_blocks
        self.figures.num_copied_bytes += run.num_bytes // len(run.digests) * num_blocks
        for digest in run.digests[:num_blocks]:
            self._there[digest] = None
        while len(self._there) > self._limits.max_remembered:
            self._there.popitem(last=False)
        self._lose(run.digests[num_blocks:], now_s)

    def failed(self, run: Run, now_s: float) -> None:
        """The buddy did not take a run."""
        if self._land(run):
            self._lose(run.digests, now_s)

    def found_gap(self, run: Run, now_s: float) -> None:
        """The buddy no longer has the blocks before a run."""
        if not self._land(run):
            return
        track = self._tracks.get(run.sequence)
        whole_chain = track.digests if track is not None else []
        for digest in whole_chain:
            self._there.pop(digest, None)
        self._rewind({*whole_chain, *run.digests})
        self._lose(run.digests, now_s)

    def _room(self, block_bytes: int) -> int:
        """How many blocks may be sent in a call now."""
        limits = self._limits
        if self._num_calls >= limits.max_calls:
            return 0
        num_bytes = min(limits.max_call_bytes, limits.max_bytes - self._num_bytes)
        # A block larger than the limits goes alone.
        least = 1 if self._num_calls == 0 or num_bytes >= block_bytes else 0
        return max(least, num_bytes // block_bytes)

    def _num_behind(self, sequence: Sequence) -> int:
        """Full blocks of a sequence from the first that is neither there nor on its way."""
        track = self._tracks.setdefault(sequence, _Track())
        size, digests = self._block_size, track.digests
        num_full = sequence.num_computed // size
        while len(digests) < num_full:
            start = len(digests) * size
            parent = digests[-1] if digests else b""
            digests.append(chain_digest(parent, sequence.token_ids[start : start + size]))
        while track.num_sent < num_full and self._is_sent(digests[track.num_sent]):
            track.num_sent += 1
        return num_full - track.num_sent

    def _is_sent(self, digest: bytes) -> bool:
        return digest in self._there or digest in self._sending

    def _cut(self, sequence: Sequence, max_blocks: int, block_bytes: int) -> Run:
        track = self._tracks[sequence]
        first = track.num_sent
        digests = track.digests[first : first + max_blocks]
        # After a gap or a failure, later ones may be known: the run ends before them.
        known = next((i for i, digest in enumerate(digests) if self._is_sent(digest)), None)
        digests = digests[:known]
        end = first + len(digests)
        size = self._block_size
        run = Run(
            sequence=sequence,
            parent=track.digests[first - 1] if first else b"",
            digests=tuple(digests),
            block_ids=tuple(sequence.block_table[first:end]),
            token_ids=tuple(sequence.token_ids[first * size : end * size]),
            num_bytes=len(digests) * block_bytes,
            generation=self._generation,
        )
        track.num_sent = end
        self._sending.update(digests)
        self._num_calls += 1
        self._num_bytes += run.num_bytes
        return run

    def _land(self, run: Run) -> bool:
        """Takes a run out of what is in flight; whether it went to the buddy of now."""
        if run.generation != self._generation:
            self.figures.num_dropped += len(run.digests)
            return False
        self._sending.difference_update(run.digests)
        self._num_calls -= 1
        self._num_bytes -= run.num_bytes
        return True

    def _lose(self, digests: Collection[bytes], now_s: float) -> None:
        if not digests:
            return
        self.figures.num_dropped += len(digests)
        self._paused_until_s = now_s + self._limits.pause_s
        self._rewind(set(digests))

    def _rewind(self, lost: set[bytes]) -> None:
        """Whoever was past one of these begins with it again."""
        for track in self._tracks.values():
            for i, digest in enumerate(track.digests[: track.num_sent]):
                if digest in lost:
                    track.num_sent = i
                    break

    def _forget_ended(self) -> None:
        for sequence in [s for s in self._tracks if s.status in _ENDED]:
            track = self._tracks.pop(sequence)
            self.figures.num_dropped += max(0, len(track.digests) - track.num_sent)
