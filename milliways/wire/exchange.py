"""A worker's end of the exchange in compiled steps: what it shares with the threads that compute.

A compiled step (`model/ops/native/exchange.h`) sends each layer's rows to other workers of this
host, over rings of shared memory, and no Python runs between the layers. `ExchangeNode` is how
Python takes part: it opens and closes rings, says where the experts are, and fills what is missing.
"""

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any

import numpy as np

from milliways.model.ops.native import library
from milliways.wire.shm import make_file
from milliways.wire.tensors import MalformedMessageError, aligned

# The slots of a ring: one is used at a time, others wait for late answers that nobody needs.
NUM_SLOTS = 8
# Targets of a plan; a positive number is that of a link.
BY_PYTHON, HERE = -1, 0

_INT64, _UINT64, _INT = ctypes.c_int64, ctypes.c_uint64, ctypes.c_int
_POINTER = ctypes.c_void_p


class CallState(Enum):
    """What became of a call; the values are those of exchange.h."""

    OPEN = 0
    ANSWERED = 1
    REFUSED = 2
    LOST = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeShape:
    """The sizes that both ends of a ring must agree on; rows have `item_bytes` for a number."""

    num_layers: int
    num_experts: int
    num_selected: int
    width: int
    item_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RingShape:
    """Slots of a ring, and the most bytes of a request and of a response."""

    num_slots: int
    request_bytes: int
    response_bytes: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the ring's file.

        Raises:
            MalformedMessageError: a ring cannot have this shape.
        """
        num_bytes = _functions().mw_ring_bytes(ctypes.byref(_ring_of(self)))
        if num_bytes < 0:
            raise MalformedMessageError(f"a ring of the shape {self}")
        return num_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertStack:
    """Experts of one layer in memory, for the kernels: addresses of gate, up and down matrices.

    `kind` and `num_groups` are those of `PackedMatrix` and its scales. The owner keeps the arrays.
    """

    layer: int
    expert_ids: tuple[int, ...]
    kind: int
    num_hidden: int
    panels: tuple[int, int, int]
    scales: tuple[int, int, int]
    num_groups: tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Missing:
    """A layer that waits for Python: its rows [T, D] and expert ids [T, A], copied.

    `is_missing_N` says which places have no output yet; rows are bytes of the activation type.
    """

    number: int
    batch: int
    layer: int
    rows_TB: np.ndarray
    expert_ids_TA: np.ndarray
    is_missing_N: np.ndarray
    num_calls: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowsCall:
    """A call of a missing layer: the places that it was to fill, and how long it has waited.

    `rows_NB` has its outputs, as bytes, if it was answered.
    """

    link: int
    slot: int
    sequence: int
    state: CallState
    status: int
    placement_epoch: int
    waited_s: float
    places: np.ndarray
    rows_NB: np.ndarray | None = None


def bell_bytes() -> int:
    """The size of a bell's file."""
    return _functions().mw_bell_bytes()


class ExchangeNode:
    """Owns a worker's bell, its table of experts for native threads, and one such thread.

    Any thread may call it. Arrays of numbers are copied before a call returns.
    """

    def __init__(self, shape: ExchangeShape, max_rows: int, max_ring_bytes: int) -> None:
        """Its rings have room for `max_rows` rows, or fewer if that took more than the limit."""
        self.shape = shape
        self.ring_shape = _ring_for(shape, max_rows, max_ring_bytes)
        self.given_up = -1
        # Rings of routers that are served now.
        self.num_rings = 0
        self.bell_fd = make_file(bell_bytes(), "milliways-bell")
        self.event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        number = _functions().mw_node_open(
            ctypes.byref(
                _ModelShape(
                    shape.num_layers,
                    shape.num_experts,
                    shape.num_selected,
                    shape.width,
                    shape.item_bytes,
                )
            ),
            self.bell_fd,
            self.event_fd,
        )
        assert number > 0, "the bell cannot be mapped, or no descriptor is left"
        self.number: int = number

    def close(self) -> None:
        """Ends its thread and gives all batches up."""
        if self.number:
            _functions().mw_node_close(self.number)
            self.number = 0
            os.close(self.bell_fd)
            os.close(self.event_fd)
            # Other files may get these numbers.
            self.bell_fd = self.event_fd = -1

    def clear_event(self) -> None:
        """`event_fd` was ready: makes it wait for the next event."""
        os.eventfd_read(self.event_fd)

    def set_experts(self, stacks: Sequence[ExpertStack]) -> None:
        """Replaces the table; afterwards no thread reads the stacks that were there before."""
        kept = [np.array(stack.expert_ids, np.int32) for stack in stacks]
        array = (_Stack * max(1, len(stacks)))()
        for entry, stack, ids in zip(array, stacks, kept, strict=False):
            entry.layer, entry.num_held = stack.layer, len(ids)
            entry.kind, entry.num_hidden = stack.kind, stack.num_hidden
            entry.expert_ids = ids.ctypes.data
            entry.panels[:] = stack.panels
            entry.scales[:] = stack.scales
            entry.num_groups[:] = stack.num_groups
        _functions().mw_node_set_experts(self.number, array, len(stacks))

    def set_fence(self, placement_epoch: int, incarnation: int, is_ready: bool) -> None:
        """What calls must assume; none is computed unless the worker is ready."""
        _functions().mw_node_set_fence(self.number, placement_epoch, incarnation, is_ready)

    def counts(self) -> tuple[int, int, int]:
        """Calls, calls that were computed together with others, and rows, of other processes."""
        counts = (_INT64 * 3)()
        _functions().mw_node_counts(self.number, counts)
        return counts[0], counts[1], counts[2]

    def drop_answers(self, count: int) -> None:
        """Does not answer the next `count` calls: a fault for tests."""
        _functions().mw_node_drop_answers(self.number, count)

    @property
    def num_to_drop(self) -> int:
        """How many answers are still to be dropped."""
        return _functions().mw_node_num_to_drop(self.number)

    def attach(self, ring_fd: int, bell_fd: int, shape: RingShape) -> int:
        """Serves a router's ring; `bell_fd` is the router's bell. The caller closes the files.

        Raises:
            MalformedMessageError: they cannot be mapped.
        """
        args = (self.number, ring_fd, bell_fd, ctypes.byref(_ring_of(shape)))
        connection = _functions().mw_node_attach(*args)
        if connection < 0:
            raise MalformedMessageError("a ring that cannot be mapped")
        self.num_rings += 1
        return connection

    def attach_carried(self, fd: int, hang_up_fd: int, shape: RingShape) -> int:
        """Serves the ring of a router on another host; a TCP connection carries it.

        Owns both descriptors from now on, and closes `hang_up_fd` when the connection is over.

        Raises:
            MalformedMessageError: there is no memory for such a ring.
        """
        ring = ctypes.byref(_ring_of(shape))
        connection = _functions().mw_node_attach_carried(self.number, fd, hang_up_fd, ring)
        if connection < 0:
            raise MalformedMessageError("a ring that there is no memory for")
        self.num_rings += 1
        return connection

    def detach(self, connection: int) -> None:
        """Afterwards nothing is read or written in the ring."""
        self.num_rings -= 1
        _functions().mw_node_detach(self.number, connection)

    def open_link(self, ring_fd: int, bell_fd: int, incarnation: int) -> int:
        """A link to one incarnation of a worker, over a ring of `ring_shape`; returns its number.

        Raises:
            MalformedMessageError: ring or bell cannot be mapped.
        """
        ring = ctypes.byref(_ring_of(self.ring_shape))
        link = _functions().mw_node_open_link(self.number, ring_fd, bell_fd, ring, incarnation)
        if link < 0:
            raise MalformedMessageError("a bell that cannot be mapped")
        return link

    def open_carried_link(self, fd: int, hang_up_fd: int, incarnation: int) -> int:
        """A link to a worker on another host; see `attach_carried`. Returns its number.

        Raises:
            MalformedMessageError: there is no memory for the ring.
        """
        ring = ctypes.byref(_ring_of(self.ring_shape))
        args = (self.number, fd, hang_up_fd, ring, incarnation)
        link = _functions().mw_node_open_carried_link(*args)
        if link < 0:
            raise MalformedMessageError("a ring that there is no memory for")
        return link

    def close_link(self, link: int) -> None:
        """The worker is lost: calls to it fail at once."""
        _functions().mw_node_close_link(self.number, link)

    def set_patience(self, link: int, patience_s: float) -> None:
        """How long an answer may take before the layer is reported as missing."""
        _functions().mw_node_set_patience(self.number, link, int(patience_s * 1e9))

    def take_latency(self, link: int) -> tuple[float, int]:
        """The longest answer in seconds since the last call of this, and the number of answers."""
        latency = (_INT64 * 2)()
        _functions().mw_node_take_latency(self.number, link, latency)
        return latency[0] / 1e9, latency[1]

    def is_unanswered(self, call: RowsCall) -> bool:
        """Whether a call that no layer waits for any more still has no answer."""
        args = (call.link, call.slot, call.sequence)
        return bool(_functions().mw_node_is_unanswered(self.number, *args))

    def set_plan(self, placement_epoch: int, targets_LE: np.ndarray) -> None:
        """Where each layer's experts are: HERE, BY_PYTHON, or a link; [L, E] int64."""
        assert targets_LE.shape == (self.shape.num_layers, self.shape.num_experts)
        targets = np.ascontiguousarray(targets_LE, np.int64)
        _functions().mw_node_set_plan(self.number, placement_epoch, targets.ctypes.data)

    def begin(self, batch: int, is_cautious: bool) -> None:
        """The exchanges that follow are of this batch. If it is cautious, Python does all."""
        _functions().mw_node_begin(self.number, batch, is_cautious)

    def end(self) -> None:
        """No batch is computed now."""
        _functions().mw_node_end(self.number)

    def give_up(self, batch: int) -> None:
        """Nobody needs a batch, nor those before it: their exchanges return zeros at once."""
        self.given_up = max(batch, self.given_up)
        _functions().mw_node_give_up(self.number, batch)

    def missing(self) -> Missing | None:
        """The layer that waits for Python, if one does; copied."""
        found = _Missing()
        if not _functions().mw_node_missing(self.number, ctypes.byref(found)):
            return None
        num_rows, num_selected = found.num_rows, self.shape.num_selected
        rows_TB = np.empty((num_rows, self.shape.width * self.shape.item_bytes), np.uint8)
        expert_ids_TA = np.empty((num_rows, num_selected), np.int32)
        is_filled = np.empty(num_rows * num_selected, np.bool_)
        copies = (rows_TB.ctypes.data, expert_ids_TA.ctypes.data, is_filled.ctypes.data)
        if not _functions().mw_node_copy_missing(self.number, found.number, *copies):
            return None
        return Missing(
            number=found.number,
            batch=found.batch,
            layer=found.layer,
            rows_TB=rows_TB,
            expert_ids_TA=expert_ids_TA,
            is_missing_N=~is_filled,
            num_calls=found.num_calls,
        )

    def call(self, number: int, index: int, num_places: int) -> RowsCall | None:
        """One call of a missing layer with so many places; None if that layer does not wait."""
        found = _Call()
        places = np.empty(num_places, np.int32)
        rows = np.empty((num_places, self.shape.width * self.shape.item_bytes), np.uint8)
        args = (ctypes.byref(found), places.ctypes.data, rows.ctypes.data)
        if not _functions().mw_node_call(self.number, number, index, *args):
            return None
        state = CallState(found.state)
        return RowsCall(
            link=found.link,
            slot=found.slot,
            sequence=found.sequence,
            state=state,
            status=found.status,
            placement_epoch=found.placement_epoch,
            waited_s=found.waited_ns / 1e9,
            places=places[: found.num_places].copy(),
            rows_NB=rows[: found.num_places].copy() if state is CallState.ANSWERED else None,
        )

    def fill(self, number: int, places: np.ndarray, rows: np.ndarray) -> None:
        """Puts outputs [N, D] into places of a missing layer."""
        places, rows = np.ascontiguousarray(places, np.int32), np.ascontiguousarray(rows)
        assert rows.nbytes == len(places) * self.shape.width * self.shape.item_bytes
        args = (places.ctypes.data, len(places), rows.ctypes.data)
        _functions().mw_node_fill(self.number, number, *args)

    def resume(self, number: int) -> None:
        """Lets a missing layer go on; without effect if it does not wait any more."""
        _functions().mw_node_resume(self.number, number)


def _ring_for(shape: ExchangeShape, max_rows: int, max_ring_bytes: int) -> RingShape:
    row_bytes = shape.width * shape.item_bytes
    # Ids and input of a row, then its outputs.
    bytes_each = (shape.num_selected + 1) * row_bytes + shape.num_selected * 4
    num_rows = max(1, min(max_rows, max_ring_bytes // NUM_SLOTS // bytes_each))
    return RingShape(
        num_slots=NUM_SLOTS,
        request_bytes=aligned(aligned(num_rows * shape.num_selected * 4) + num_rows * row_bytes),
        response_bytes=aligned(num_rows * shape.num_selected * row_bytes),
    )


class _ModelShape(ctypes.Structure):
    _fields_ = [
        (name, _INT64)
        for name in ("num_layers", "num_experts", "num_selected", "width", "item_bytes")
    ]


class _RingShape(ctypes.Structure):
    _fields_ = [(name, _INT64) for name in ("num_slots", "request_bytes", "response_bytes")]


class _Stack(ctypes.Structure):
    _fields_ = [
        *((name, _INT64) for name in ("layer", "num_held", "kind", "num_hidden")),
        ("expert_ids", _POINTER),
        ("panels", _POINTER * 3),
        ("scales", _POINTER * 3),
        ("num_groups", _INT64 * 3),
    ]


class _Missing(ctypes.Structure):
    _fields_ = [(name, _INT64) for name in ("number", "batch", "layer", "num_rows", "num_calls")]


class _Call(ctypes.Structure):
    _fields_ = [
        (name, _INT64)
        for name in (
            *("link", "slot", "sequence", "state", "status"),
            *("placement_epoch", "waited_ns", "num_places"),
        )
    ]


def _ring_of(shape: RingShape) -> _RingShape:
    return _RingShape(shape.num_slots, shape.request_bytes, shape.response_bytes)


@cache
def _functions() -> Any:
    """The library, with the types of all functions of exchange_ffi.cc."""
    loaded: Any = library()
    signatures: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "ring_bytes": (_INT64, (_POINTER,)),
        "bell_bytes": (_INT64, ()),
        "node_open": (_INT64, (_POINTER, _INT, _INT)),
        "node_close": (None, (_INT64,)),
        "node_set_experts": (None, (_INT64, _POINTER, _INT64)),
        "node_set_fence": (None, (_INT64, _UINT64, _UINT64, _INT)),
        "node_counts": (None, (_INT64, _POINTER)),
        "node_drop_answers": (None, (_INT64, _INT)),
        "node_num_to_drop": (_INT, (_INT64,)),
        "node_attach": (_INT64, (_INT64, _INT, _INT, _POINTER)),
        "node_detach": (None, (_INT64, _INT64)),
        "node_open_link": (_INT64, (_INT64, _INT, _INT, _POINTER, _UINT64)),
        "node_attach_carried": (_INT64, (_INT64, _INT, _INT, _POINTER)),
        "node_open_carried_link": (_INT64, (_INT64, _INT, _INT, _POINTER, _UINT64)),
        "node_close_link": (None, (_INT64, _INT64)),
        "node_set_patience": (None, (_INT64, _INT64, _INT64)),
        "node_take_latency": (None, (_INT64, _INT64, _POINTER)),
        "node_is_unanswered": (_INT, (_INT64, _INT64, _INT64, _INT64)),
        "node_set_plan": (None, (_INT64, _UINT64, _POINTER)),
        "node_begin": (None, (_INT64, _INT64, _INT)),
        "node_end": (None, (_INT64,)),
        "node_give_up": (None, (_INT64, _INT64)),
        "node_missing": (_INT, (_INT64, _POINTER)),
        "node_copy_missing": (_INT, (_INT64, _INT64, _POINTER, _POINTER, _POINTER)),
        "node_call": (_INT, (_INT64, _INT64, _INT64, _POINTER, _POINTER, _POINTER)),
        "node_fill": (None, (_INT64, _INT64, _POINTER, _INT64, _POINTER)),
        "node_resume": (None, (_INT64, _INT64)),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(loaded, f"mw_{name}")
        function.restype, function.argtypes = result, arguments
    return loaded
