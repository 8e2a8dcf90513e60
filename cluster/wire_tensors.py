"""Tensors of a message: where each lies in the payload, how it gets there and how it is read."""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from milliways.v1 import tensor_pb2 as pb

ALIGNMENT = 64

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

# Far above any tensor of a step; keeps the product of sizes a size.
_MAX_ELEMENTS = 1 << 40
_ZEROS = bytes(ALIGNMENT)


class MalformedMessageError(ValueError):
    """Bytes from a peer that say nothing that can be read."""


def aligned(num_bytes: int) -> int:
    """The next multiple of the alignment."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


class Payload:
    """The arrays of a message to be sent, in the order of their places."""

    __slots__ = ("_places", "num_bytes")

    def __init__(self) -> None:
        self._places: list[tuple[int, np.ndarray]] = []
        self.num_bytes = 0

    def add(self, array: np.ndarray) -> pb.TensorSpec:
        """Gives an array its place."""
        array = np.ascontiguousarray(array)
        element_type = _ELEMENT_TYPES[array.dtype]
        offset = aligned(self.num_bytes)
        self._places.append((offset, array))
        self.num_bytes = offset + array.nbytes
        return pb.TensorSpec(element_type=element_type, shape=array.shape, offset_bytes=offset)

    def write_to(self, room: np.ndarray) -> None:
        """Copies all into bytes that have room for them."""
        for offset, array in self._places:
            room[offset : offset + array.nbytes] = _bytes_of(array)

    def pieces(self) -> list[Any]:
        """The whole payload in buffers, fillers between them, to be joined."""
        pieces: list[Any] = []
        end = 0
        for offset, array in self._places:
            if offset != end:
                pieces.append(_ZEROS[: offset - end])
            pieces.append(_bytes_of(array))
            end = offset + array.nbytes
        return pieces


class PayloadReader:
    """Reads the tensors of a message that came in; the arrays are views unless copies are asked."""

    __slots__ = ("_data", "_is_shared", "_num_bytes")

    def __init__(self, data: memoryview | np.ndarray, *, is_shared: bool = False) -> None:
        """`is_shared`: another process may overwrite the bytes once it has its response."""
        self._data = data
        self._num_bytes = data.nbytes
        self._is_shared = is_shared

    def read(self, spec: pb.TensorSpec, types: ElementTypes, rank: int) -> np.ndarray:
        """One tensor.

        Raises:
            MalformedMessageError: its type, rank, sizes or place cannot be.
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
        end = offset + num_elements * dtype.itemsize
        if bound > _MAX_ELEMENTS or offset % ALIGNMENT or end > self._num_bytes:
            limit = f"a payload of {self._num_bytes} bytes"
            raise MalformedMessageError(f"tensor of shape {shape} at {offset} in {limit}")
        if not num_elements:
            return np.empty(shape, dtype)
        data = self._data
        if isinstance(data, np.ndarray):
            return data[offset:end].view(dtype).reshape(shape)
        return np.frombuffer(data, dtype, num_elements, offset).reshape(shape)

    def read_to_keep(self, spec: pb.TensorSpec, types: ElementTypes, rank: int) -> np.ndarray:
        """One tensor that outlives the response to its message."""
        array = self.read(spec, types, rank)
        return array.copy() if self._is_shared else array


def _bytes_of(array: np.ndarray) -> np.ndarray:
    # bfloat16 has no buffer protocol of its own.
    return array.reshape(-1).view(np.uint8)
