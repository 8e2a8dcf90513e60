"""Memory that a router shares with a worker on its host, and which call uses which part of it.

A segment is an anonymous file (memfd). It has no name, so nothing is left behind if both processes
are killed. The router makes it, sends it over a Unix socket, and divides it into regions. A call
owns a region from when it is sent until the last array of its result is gone. The worker reads and
writes only inside the regions that calls name.
"""

import fcntl
import mmap
import os
import weakref
from bisect import insort
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from milliways.wire.tensors import ALIGNMENT, MalformedMessageError, Payload, aligned

# Neither side can shrink the file, which would kill the other one with SIGBUS.
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def local_host_id() -> str:
    """Equal in two processes that can share memory and Unix sockets; empty if that is unknown."""
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        network = os.stat("/proc/self/ns/net").st_ino
    except OSError:
        return ""
    return f"{boot_id}/{network}/{os.getuid()}"


class Segment:
    """A mapped file. It is unmapped when the last array that lies in it is gone."""

    def __init__(self, fd: int, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.buffer = mmap.mmap(fd, num_bytes)

    def check(self, offset: int, num_bytes: int) -> None:
        """Raises MalformedMessageError if a peer's region is not inside, or not aligned."""
        if offset % ALIGNMENT or offset + num_bytes > self.num_bytes:
            text = f"a region of {num_bytes} bytes at {offset} of a segment of {self.num_bytes}"
            raise MalformedMessageError(text)


def make_file(num_bytes: int, name: str = "milliways") -> int:
    """A new anonymous file of a fixed size, filled with zeros; the caller closes it.

    The name is for people who look at the mappings of a process.
    """
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, num_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        return fd
    except BaseException:
        os.close(fd)
        raise


def check_file(fd: int, num_bytes: int) -> None:
    """Checks a file that a peer made, before it is mapped.

    Raises:
        MalformedMessageError: it has another size, or is not sealed against shrinking.
    """
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        actual_bytes = os.fstat(fd).st_size
    except OSError as error:
        raise MalformedMessageError(f"a file that cannot be shared: {error}") from error
    if seals & _SEALS != _SEALS or actual_bytes != num_bytes or not num_bytes:
        raise MalformedMessageError(f"a file of {actual_bytes} bytes, not a sealed {num_bytes}")


def make_segment(num_bytes: int) -> tuple[Segment, int]:
    """A new segment and its file, which the caller sends to the peer and then closes."""
    fd = make_file(num_bytes)
    try:
        return Segment(fd, num_bytes), fd
    except BaseException:
        os.close(fd)
        raise


def attach_segment(fd: int, num_bytes: int) -> Segment:
    """Maps a segment that a peer made; the caller closes the file.

    Raises:
        MalformedMessageError: it cannot be mapped, or `check_file` refuses it.
    """
    check_file(fd, num_bytes)
    try:
        return Segment(fd, num_bytes)
    except OSError as error:
        raise MalformedMessageError(f"a segment that cannot be mapped: {error}") from error


class RegionAllocator:
    """Divides a range into regions at multiples of the alignment; takes the first gap that fits.

    Invariant: gaps and taken regions cover the range without overlapping. Gaps are sorted, and no
    two of them touch.
    """

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        # Offset and size of each.
        self._gaps: list[tuple[int, int]] = [(0, num_bytes)]
        self._taken: dict[int, int] = {}

    @property
    def num_taken_bytes(self) -> int:
        return sum(self._taken.values())

    def try_allocate(self, num_bytes: int) -> int | None:
        """The offset of a new region; None if no gap is large enough."""
        num_bytes = aligned(max(num_bytes, 1))
        for index, (offset, gap_bytes) in enumerate(self._gaps):
            if gap_bytes >= num_bytes:
                self._taken[offset] = num_bytes
                if gap_bytes == num_bytes:
                    del self._gaps[index]
                else:
                    self._gaps[index] = (offset + num_bytes, gap_bytes - num_bytes)
                return offset
        return None

    def free(self, offset: int) -> None:
        """Frees a region."""
        gap = (offset, self._taken.pop(offset))
        insort(self._gaps, gap)
        index = self._gaps.index(gap)
        merged = [gap]
        for neighbour in self._gaps[index + 1 : index + 2]:
            if gap[0] + gap[1] == neighbour[0]:
                merged.append(neighbour)
        first = index
        if index and sum(self._gaps[index - 1]) == offset:
            first = index - 1
            merged.insert(0, self._gaps[first])
        self._gaps[first : first + len(merged)] = [
            (merged[0][0], sum(num_bytes for _, num_bytes in merged))
        ]


class Region(NamedTuple):
    """A part of a segment that one call owns: its request, then its response."""

    segment_id: int
    offset: int
    num_request_bytes: int
    num_response_bytes: int

    @property
    def response_offset(self) -> int:
        return self.offset + aligned(self.num_request_bytes)


class SharedMemory:
    """A router's segments for one worker: more are made when they are full, up to a limit.

    Invariant: every byte of a segment is free in the segment's allocator, or in one region. A
    region is owned by one call, or is in `_returned` or `_spare`. All segments together have at
    most `max_bytes`.
    """

    def __init__(self, first_segment_bytes: int, max_bytes: int) -> None:
        self._next_bytes = first_segment_bytes
        self._max_bytes = max_bytes
        self._segments: list[tuple[Segment, RegionAllocator]] = []
        # The region of a result is returned when its last array is dropped, in any thread.
        self._returned: deque[Region] = deque()
        self._watchers: dict[Region, Any] = {}
        # Returned regions by their sizes, because most calls have the sizes of an earlier one.
        self._spare: dict[tuple[int, int], list[Region]] = {}

    @property
    def num_bytes(self) -> int:
        return sum(segment.num_bytes for segment, _ in self._segments)

    @property
    def num_taken_bytes(self) -> int:
        self._take_back()
        self._free_spare()
        return sum(allocator.num_taken_bytes for _, allocator in self._segments)

    def try_allocate(self, num_request_bytes: int, num_response_bytes: int) -> Region | None:
        """A region in the present segments; None if it fits into none."""
        if self._returned:
            self._take_back()
        spare = self._spare.get((num_request_bytes, num_response_bytes))
        if spare:
            return spare.pop()
        region = self._try_cut(num_request_bytes, num_response_bytes)
        if region is None and self._spare:
            self._free_spare()
            region = self._try_cut(num_request_bytes, num_response_bytes)
        return region

    def _try_cut(self, num_request_bytes: int, num_response_bytes: int) -> Region | None:
        num_bytes = aligned(num_request_bytes) + num_response_bytes
        for segment_id, (_, allocator) in enumerate(self._segments):
            offset = allocator.try_allocate(num_bytes)
            if offset is not None:
                return Region(segment_id, offset, num_request_bytes, num_response_bytes)
        return None

    def try_grow(self, num_bytes: int) -> tuple[int, int, int] | None:
        """Adds a segment of at least this size; returns its id, size and file.

        None if the limit is reached, or the system has no more memory.
        """
        size = max(self._next_bytes, -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE)
        if self.num_bytes + size > self._max_bytes:
            return None
        try:
            segment, fd = make_segment(size)
        except OSError:
            return None
        self._segments.append((segment, RegionAllocator(size)))
        self._next_bytes = 2 * size
        return len(self._segments) - 1, size, fd

    def write_request(self, region: Region, payload: Payload) -> None:
        """Copies a call's payload to its region."""
        segment, _ = self._segments[region.segment_id]
        payload.write_to(segment.buffer, region.offset)

    def response(self, region: Region, num_bytes: int) -> np.ndarray:
        """The response's payload; the region is returned when the last view of it is gone."""
        segment, _ = self._segments[region.segment_id]
        payload = np.ndarray((num_bytes,), np.uint8, segment.buffer, region.response_offset)
        returned = self._returned

        def give_back(_: Any) -> None:
            returned.append(region)

        self._watchers[region] = weakref.ref(payload, give_back)
        return payload

    def free(self, region: Region) -> None:
        """Returns a region whose response is not needed."""
        self._returned.append(region)

    def close(self) -> None:
        """Drops all segments; memory in which arrays of results lie stays until they are gone."""
        self._segments.clear()
        self._returned.clear()
        self._spare.clear()
        self._watchers.clear()

    def _take_back(self) -> None:
        while self._returned:
            region = self._returned.popleft()
            self._watchers.pop(region, None)
            size = (region.num_request_bytes, region.num_response_bytes)
            self._spare.setdefault(size, []).append(region)

    def _free_spare(self) -> None:
        for regions in self._spare.values():
            for region in regions:
                self._segments[region.segment_id][1].free(region.offset)
        self._spare.clear()
