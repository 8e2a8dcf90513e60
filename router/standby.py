"""Knows which KV blocks the standby has, and chooses the next to send. Pure: times are arguments.

Life of a full block of a running sequence:

1. `next_run` finds a block that was not sent, and cuts a run of consecutive blocks from there. It
   does so only while calls and bytes in flight are below the limits. Otherwise the block is left:
   it is not queued, and nothing waits for it.
2. `stored`: the standby has it. Equal blocks of other sequences are not sent again.
   `failed`: the standby does not have it; the block is considered again after a pause.
   `found_gap`: the standby no longer has the blocks before it; the sequence is sent again from its
   beginning.
3. The sequence ends, and the block is forgotten here. The standby keeps it until it is evicted.

`follow` names another standby, which has nothing: blocks of running sequences are sent again.
"""

from collections import OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from milliways.model.block_pool import chain_digest
from milliways.router.requests.sequence import Sequence, SequenceStatus

# The router that receives copies: its worker_id and incarnation.
Peer = tuple[str, int]

_ENDED = (SequenceStatus.FINISHED, SequenceStatus.FAILED)


@dataclass(frozen=True, slots=True, kw_only=True)
class StandbyLimits:
    """Limits of what is in flight to a standby, and of what is remembered of it."""

    max_calls: int = 4
    # An expert call to the same worker may wait for this much. A larger block is sent alone.
    max_bytes: int = 4 << 20
    max_call_bytes: int = 1 << 20
    # Nothing is sent for this long after the standby had no room, or could not be reached.
    pause_s: float = 1.0
    max_remembered: int = 1 << 16


@dataclass(slots=True)
class StandbyFigures:
    """Counts since the start, for status and metrics."""

    num_copied: int = 0
    num_copied_bytes: int = 0
    # Blocks that the standby did not take, or whose sequence ended before they were sent.
    num_dropped: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Run:
    """Consecutive full blocks of one sequence that are sent in one call."""

    sequence: Sequence
    parent: bytes
    digests: tuple[bytes, ...]
    block_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    num_bytes: int
    # Counts the calls of `follow`: a later standby has nothing of it.
    generation: int


@dataclass(slots=True)
class _Track:
    """A sequence that has not ended: the digests of its full blocks, and how many were sent."""

    digests: list[bytes] = field(default_factory=list[bytes])
    num_sent: int = 0


class Standby:
    """Owns what is known of the standby's copies.

    Invariant: `_sending` has the digests of the runs in flight to the present peer, and
    `_num_calls` and `_num_bytes` count these runs. The first `num_sent` blocks of each tracked
    sequence are at the peer or in flight, as far as is known.
    """

    def __init__(self, block_size: int, limits: StandbyLimits | None = None) -> None:
        self.figures = StandbyFigures()
        self.peer: Peer | None = None
        self._block_size = block_size
        self._limits = limits or StandbyLimits()
        self._tracks: dict[Sequence, _Track] = {}
        # Digests of blocks that the peer has, the latest last; and of those in flight to it.
        self._there: OrderedDict[bytes, None] = OrderedDict()
        self._sending: set[bytes] = set()
        self._num_calls = 0
        self._num_bytes = 0
        self._generation = 0
        self._paused_until_s = 0.0

    @property
    def num_calls(self) -> int:
        """Runs in flight."""
        return self._num_calls

    @property
    def is_in_use(self) -> bool:
        """Whether blocks of a sequence that has not ended are at the peer, or in flight to it."""
        self._forget_ended()
        return any(track.num_sent for track in self._tracks.values())

    def follow(self, peer: Peer | None) -> None:
        """Sends copies to this peer from now on; without effect if it is the present one."""
        if peer == self.peer:
            return
        self.peer = peer
        self._generation += 1
        self._there.clear()
        self._sending.clear()
        self._num_calls = self._num_bytes = 0
        self._paused_until_s = 0.0
        for track in self._tracks.values():
            track.num_sent = 0

    def next_run(self, running: Iterable[Sequence], block_bytes: int, now_s: float) -> Run | None:
        """The run to send now, of the sequence with the most unsent blocks; None if there is none.

        The run is in flight until `stored`, `failed` or `found_gap`.
        """
        self._forget_ended()
        max_blocks = self._room(block_bytes)
        if self.peer is None or now_s < self._paused_until_s or not max_blocks:
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
        """The standby has the first `num_blocks` of a run; it had no room for the others."""
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
        """The standby did not take a run."""
        if self._land(run):
            self._lose(run.digests, now_s)

    def found_gap(self, run: Run, now_s: float) -> None:
        """The standby no longer has the blocks before a run."""
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
        """The number of full blocks from the first unsent one to the end of the sequence."""
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
        # After a gap or a failure, later blocks may have been sent: the run ends before them.
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
        """Counts a run as no longer in flight; returns whether it went to the present peer."""
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
        """Sends sequences again from the first of these blocks that they have."""
        for track in self._tracks.values():
            for i, digest in enumerate(track.digests[: track.num_sent]):
                if digest in lost:
                    track.num_sent = i
                    break

    def _forget_ended(self) -> None:
        for sequence in [s for s in self._tracks if s.status in _ENDED]:
            track = self._tracks.pop(sequence)
            self.figures.num_dropped += max(0, len(track.digests) - track.num_sent)
