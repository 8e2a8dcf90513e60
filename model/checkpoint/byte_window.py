"""Reads a file forwards through a small window, so that payloads can be skipped unread."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from milliways.model.errors import CheckpointError, CorruptTensorError

# The bytes before and after a payload are fewer than 300. A larger window would read payload.
WINDOW_BYTES = 512


class ByteWindow:
    """A position in an open file. Tracks pickle frames, to refuse those that are inconsistent.

    Invariant: 0 <= `position` <= `num_file_bytes`.

    Invariant: `_window` holds the bytes of the file from `_window_start` on.

    Invariant: `_frame_end` is the end of the last frame that began; it is at most `num_file_bytes`.
    """

    def __init__(self, path: Path, fd: int, num_file_bytes: int) -> None:
        self.path = path
        self.num_file_bytes = num_file_bytes
        self.num_scanned_bytes = 0
        self.position = 0
        self._fd = fd
        self._frame_end = 0
        self._window = b""
        self._window_start = 0
        if hasattr(os, "posix_fadvise"):
            # Otherwise the kernel reads ahead, hundreds of times as much as we need.
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)

    def corrupt(self, reason: str) -> CorruptTensorError:
        """An error for the bytes just before the current position."""
        return CorruptTensorError(self.path, f"{reason} (near byte {self.position})")

    def take(self, num_bytes: int) -> bytes:
        """Reads the next bytes, at most `WINDOW_BYTES`."""
        assert num_bytes <= WINDOW_BYTES
        start = self.skip(num_bytes)
        at = start - self._window_start
        if at < 0 or at + num_bytes > len(self._window):
            self._refill(start)
            at = 0
        taken = self._window[at : at + num_bytes]
        if len(taken) < num_bytes:
            raise self.corrupt("the file shrank while it was read")
        return taken

    def take_int(self, num_bytes: int, *, signed: bool = False) -> int:
        return int.from_bytes(self.take(num_bytes), "little", signed=signed)

    def skip(self, num_bytes: int) -> int:
        """Skips the next bytes without reading them; returns where they begin."""
        start, end = self.position, self.position + num_bytes
        if end > self.num_file_bytes:
            missing = end - self.num_file_bytes
            raise self.corrupt(f"truncated: {missing} of the next {num_bytes} bytes are missing")
        if start < self._frame_end < end:
            raise self.corrupt("an opcode crosses the end of its frame")
        self.position = end
        return start

    def begin_frame(self, num_bytes: int) -> None:
        if self.position < self._frame_end:
            raise self.corrupt("a frame begins inside another")
        if num_bytes > self.num_file_bytes - self.position:
            raise self.corrupt(f"truncated: a frame of {num_bytes} bytes exceeds the file")
        self._frame_end = self.position + num_bytes

    def _refill(self, start: int) -> None:
        try:
            self._window = os.pread(self._fd, WINDOW_BYTES, start)
        except OSError as error:
            raise CheckpointError(self.path, f"cannot be read: {error.strerror}") from error
        self._window_start = start
        self.num_scanned_bytes += len(self._window)


@contextmanager
def open_regular(path: Path) -> Iterator[tuple[int, int]]:
    """Opens a regular file; yields its descriptor and its size.

    Raises:
        CheckpointError: the file is missing, may not be read, or is a directory, pipe or device.
    """
    try:
        # Non-blocking: opening a pipe with the name of a tensor file must not wait for a writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise CheckpointError(path, f"cannot be opened: {error.strerror}") from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(path, "is not a regular file")
        yield fd, status.st_size
    finally:
        os.close(fd)
