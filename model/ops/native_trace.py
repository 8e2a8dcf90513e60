"""What the CPU kernels did when: a log of the library (native/trace.h), off until it is started."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from milliways.model.ops.native_library import library

# The fields of `Event` in native/trace.h.
_EVENT = np.dtype(
    [("work", np.int32), ("width", np.int32), ("start_ns", np.int64), ("end_ns", np.int64)]
)
_MAX_EVENTS = 1 << 20


class KernelEvent(NamedTuple):
    """One operation. The clock is that of `time.monotonic_ns`; `width` is 0 where it says nothing.

    `width` has the columns of the result.
    """

    name: str
    width: int
    start_ns: int
    end_ns: int


@contextmanager
def traced() -> Iterator[None]:
    """Logs operations while the block runs, and forgets older ones. One at a time."""
    take_events()
    library().mw_trace(1)
    try:
        yield
    finally:
        library().mw_trace(0)


def take_events() -> list[KernelEvent]:
    """The logged operations in the order of their start; the log forgets them.

    It has room for a million. Operations after that are lost. None may run at the same time.
    """
    native = library()
    native.mw_take_events.restype = ctypes.c_int64
    native.mw_take_events.argtypes = (ctypes.c_void_p, ctypes.c_int64)
    native.mw_work_name.restype = ctypes.c_char_p
    raw = np.empty(_MAX_EVENTS, _EVENT)
    count = native.mw_take_events(raw.ctypes.data, len(raw))
    kinds = set(raw["work"][:count].tolist())
    names = {kind: native.mw_work_name(kind).decode() for kind in kinds}
    events = [KernelEvent(names[work], *rest) for work, *rest in raw[:count].tolist()]
    return sorted(events, key=lambda event: event.start_ns)
