"""A read-only memory map that holds no file descriptor.

`mmap.mmap` keeps a duplicate of the descriptor for as long as the map lives (until Python 3.13's
`trackfd`), and 770 of them are most of a process's usual allowance. The kernel needs none.
"""

import ctypes
import mmap
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from milliways.model.checkpoint.byte_window import open_regular
from milliways.model.errors import CheckpointError, CorruptTensorError

_MAP_FAILED = ctypes.c_void_p(-1).value


def _libc(name: str, result: type, *arguments: type) -> Callable[..., Any]:
    prototype = ctypes.CFUNCTYPE(result, *arguments, use_errno=True)
    return prototype((name, ctypes.CDLL(None, use_errno=True)))


_mmap = _libc(
    "mmap",
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
)
_munmap = _libc("munmap", ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
_madvise = _libc("madvise", ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class FileMap:
    """The bytes of one whole file. Unmapped when it and every array made from it are gone."""

    def __init__(self, path: Path, num_expected_bytes: int) -> None:
        with open_regular(path) as (fd, num_bytes):
            if num_bytes != num_expected_bytes:
                # Touching a page beyond the end would kill the process.
                raise CorruptTensorError(
                    path, f"was {num_expected_bytes} bytes when scanned, is now {num_bytes}"
                )
            address = _mmap(None, num_bytes, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
        if address is None or address == _MAP_FAILED:
            reason = os.strerror(ctypes.get_errno())
            raise CheckpointError(path, f"cannot be mapped: {reason}")
        self.address: int = address
        self.num_bytes = num_bytes
        release = weakref.finalize(self, _munmap, address, num_bytes)
        # At exit the kernel unmaps; doing it earlier could take pages from a running thread.
        release.atexit = False

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """How numpy makes a read-only array over the map that keeps the map alive."""
        return {
            "version": 3,
            "typestr": "|u1",
            "shape": (self.num_bytes,),
            "data": (self.address, True),
        }

    def view(self, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> np.ndarray:
        """A read-only array over the map, wherever it begins: payloads are not aligned."""
        num_bytes = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        return np.asarray(self)[offset : offset + num_bytes].view(dtype).reshape(shape)

    def expect_slices(self) -> None:
        """Stops the kernel from reading ahead of what is touched."""
        self._advise(0, self.num_bytes, mmap.MADV_RANDOM)

    def expect_all(self) -> None:
        """Lets the kernel read ahead again."""
        self._advise(0, self.num_bytes, mmap.MADV_NORMAL)

    def fetch(self, offset: int, num_bytes: int) -> None:
        """Has the kernel read a range in large pieces, in the background."""
        start = offset - offset % mmap.PAGESIZE
        self._advise(start, offset + num_bytes - start, mmap.MADV_WILLNEED)

    def _advise(self, start: int, num_bytes: int, advice: int) -> None:
        """Advice the file system does not take changes speed only, so its answer is not needed."""
        _madvise(self.address + start, num_bytes, advice)
