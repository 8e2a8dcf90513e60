"""Tensors of a message: where each lies in the payload, how it is written and how it is read.

The offset of a tensor follows from the types and shapes of the tensors before it. Most messages
have the shapes of earlier ones, so layouts and places are cached.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from milliways.v1 import tensor_pb2 as pb

ALIGNMENT = 64
# How many forms of messages are cached: layers times numbers of rows.
NUM_FORMS = 4096

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_FLOAT32 = np.dtype("<f4")
_INT32 = np.dtype("<i4")
_ELEMENT_TYPES = {
    _FLOAT32: pb.ELEMENT_TYPE_FLOAT32,
    _BFLOAT16: pb.ELEMENT_TYPE_BFLOAT16,
    _INT32: pb.ELEMENT_TYPE_INT32,
}

ElementTypes = Mapping[int, np.dtype[Any]]
FLOAT32: ElementTypes = {pb.ELEMENT_TYPE_FLOAT32: _FLOAT32}
INT32: ElementTypes = {pb.ELEMENT_TYPE_INT32: _INT32}
ACTIVATIONS: ElementTypes = {**FLOAT32, pb.ELEMENT_TYPE_BFLOAT16: _BFLOAT16}

Shape = tuple[int, ...]

# Far more than any tensor of a step has; limits the product of the sizes.
_MAX_ELEMENTS = 1 << 40
_ZEROS = bytes(ALIGNMENT)


class MalformedMessageError(ValueError):
    """Bytes from a peer that cannot be read."""


def aligned(num_bytes: int) -> int:
    """The next multiple of the alignment."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


class Layout(NamedTuple):
    """Where the tensors of a payload lie."""

    specs: tuple[pb.TensorSpec, ...]
    offsets: tuple[int, ...]
    num_bytes: int


@lru_cache(maxsize=NUM_FORMS)
def lay_out(*forms: tuple[np.dtype[Any], Shape]) -> Layout:
    """Places one tensor after another, each at the next multiple of the alignment."""
    specs: list[pb.TensorSpec] = []
    offsets: list[int] = []
    end = 0
    for dtype, shape in forms:
        offset = aligned(end)
        element_type = _ELEMENT_TYPES[dtype]
        specs.append(pb.TensorSpec(element_type=element_type, shape=shape, offset_bytes=offset))
        offsets.append(offset)
        end = offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return Layout(tuple(specs), tuple(offsets), end)


class Payload(NamedTuple):
    """The arrays of a message to be sent, and their offsets."""

    arrays: Sequence[np.ndarray]
    offsets: Sequence[int]
    num_bytes: int

    def write_to(self, room: Any, start: int = 0) -> None:
        """Copies all arrays to their offsets in a buffer of bytes, counted from `start`."""
        for array, offset in zip(self.arrays, self.offsets, strict=True):
            if array.size:
                begin = start + offset
                room[begin : begin + array.nbytes] = _bytes_of(array)

    def pieces(self) -> list[Any]:
        """The whole payload as buffers to be joined, with padding between them."""
        pieces: list[Any] = []
        end = 0
        for array, offset in zip(self.arrays, self.offsets, strict=True):
            if offset != end:
                pieces.append(_ZEROS[: offset - end])
            pieces.append(_bytes_of(array))
            end = offset + array.nbytes
        return pieces


NO_PAYLOAD = Payload((), (), 0)


class Place(NamedTuple):
    """Where a tensor lies and how it is read: a spec that was checked."""

    shape: Shape
    dtype: np.dtype[Any]
    offset: int
    end: int


def place_of(spec: pb.TensorSpec, types: ElementTypes, rank: int) -> Place:
    """Checks the place that a peer gives for a tensor.

    Raises:
        MalformedMessageError: its type, rank, sizes or offset are not valid.
    """
    dtype = types.get(spec.element_type)
    shape = tuple(spec.shape)
    if dtype is None or len(shape) != rank:
        raise MalformedMessageError(f"tensor of type {spec.element_type}, shape {shape}")
    num_elements = 1
    bound = 1
    for size in shape:
        if size < 0:
            raise MalformedMessageError(f"tensor of shape {shape}")
        num_elements *= size
        bound *= size or 1
    offset = spec.offset_bytes
    if bound > _MAX_ELEMENTS or offset % ALIGNMENT:
        raise MalformedMessageError(f"tensor of shape {shape} at {offset}")
    return Place(shape, dtype, offset, offset + num_elements * dtype.itemsize)


class PayloadReader:
    """Reads the tensors of a received message as views, or as copies where that is needed."""

    __slots__ = ("_buffer", "_is_shared", "_num_bytes", "_start")

    def __init__(self, buffer: Any, start: int, num_bytes: int, *, is_shared: bool = False) -> None:
        """`is_shared`: another process may overwrite the bytes after it has its response."""
        self._buffer = buffer
        self._start = start
        self._num_bytes = num_bytes
        self._is_shared = is_shared

    def read(self, place: Place) -> np.ndarray:
        """One tensor; raises MalformedMessageError where it ends beyond the payload."""
        shape, dtype, offset, end = place
        if end > self._num_bytes:
            limit = f"a payload of {self._num_bytes} bytes"
            raise MalformedMessageError(f"tensor of shape {shape} at {offset} in {limit}")
        if offset == end:
            return np.empty(shape, dtype)
        return np.ndarray(shape, dtype, self._buffer, self._start + offset)

    def read_to_keep(self, place: Place) -> np.ndarray:
        """One tensor that stays valid after the response to its message was sent."""
        array = self.read(place)
        return array.copy() if self._is_shared else array


def _bytes_of(array: np.ndarray) -> np.ndarray:
    """The same memory as bytes, because the buffer protocol has no bfloat16."""
    if not array.flags.c_contiguous:
        array = np.ascontiguousarray(array)
    return array.reshape(-1).view(np.uint8)
