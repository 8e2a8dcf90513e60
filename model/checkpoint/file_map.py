"""A read-only memory map that holds no file descriptor.

`mmap.mmap` keeps a duplicate of the descriptor while the map exists (Python 3.13 can avoid it with
`trackfd`). Grok-1 has 770 files, and processes are usually allowed 1024 descriptors. The kernel
itself needs no descriptor for a map.
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
    """Maps one whole file. It is unmapped when the object and all arrays made from it are gone.

    Invariant: the `num_bytes` bytes from `address` on are mapped while the object exists.
    """

    def __init__(self, path: Path, num_expected_bytes: int) -> None:
        with open_regular(path) as (fd, num_bytes):
            if num_bytes != num_expected_bytes:
                # Reading a page after the end of the file would kill the process.
                raise CorruptTensorError(
                    path, f"had {num_expected_bytes} bytes when it was scanned, now {num_bytes}"
                )
            address = _mmap(None, num_bytes, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
        if address is None or address == _MAP_FAILED:
            reason = os.strerror(ctypes.get_errno())
            raise CheckpointError(path, f"cannot be mapped: {reason}")
        self.address: int = address
        self.num_bytes = num_bytes
        release = weakref.finalize(self, _munmap, address, num_bytes)
        # At exit the kernel unmaps. If we did it before, a running thread might still read pages.
        release.atexit = False

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """NumPy's protocol for a read-only array over the map. The array keeps the map alive."""
        return {
            "version": 3,
            "typestr": "|u1",
            "shape": (self.num_bytes,),
            "data": (self.address, True),
        }

    def view(self, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> np.ndarray:
        """A read-only array over a part of the map. It may be unaligned, as payloads are."""
        num_bytes = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        return np.asarray(self)[offset : offset + num_bytes].view(dtype).reshape(shape)

    def expect_slices(self) -> None:
        """Tells the kernel not to read ahead."""
        self._advise(0, self.num_bytes, mmap.MADV_RANDOM)

    def expect_all(self) -> None:
        """Tells the kernel to read ahead again."""
        self._advise(0, self.num_bytes, mmap.MADV_NORMAL)

    def fetch(self, offset: int, num_bytes: int) -> None:
        """Tells the kernel to read a range in the background, in large pieces."""
        start = offset - offset % mmap.PAGESIZE
        self._advise(start, offset + num_bytes - start, mmap.MADV_WILLNEED)

    def _advise(self, start: int, num_bytes: int, advice: int) -> None:
        """Gives advice to the kernel. The result is unused: refused advice only costs speed."""
        _madvise(self.address + start, num_bytes, advice)
