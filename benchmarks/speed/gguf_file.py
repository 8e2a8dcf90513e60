"""Writes GGUF, the file format of llama.cpp: a header that names tensors, then their bytes.

The version is 3, little-endian. Tensors are given in C order; the format lists the sizes of their
dimensions from the innermost outwards. Q8_0 has blocks of 32 values along a row: a float16 scale
and 32 int8 steps.
"""

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import BinaryIO

import numpy as np

_MAGIC = b"GGUF"
_VERSION = 3
_ALIGNMENT = 32
_TYPE_UINT32, _TYPE_FLOAT32, _TYPE_STRING = 4, 6, 8
Q8_BLOCK = 32
_Q8_DTYPE = np.dtype([("scale", "<f2"), ("steps", "i1", Q8_BLOCK)])

# Written as uint32, float32 or string; our metadata needs no other types.
MetaValue = int | float | str


class GgufType(IntEnum):
    """Encodings of a tensor, with the numbers that the format gives them."""

    F32 = 0
    F16 = 1
    Q8_0 = 8

    def num_bytes(self, num_values: int) -> int:
        if self is GgufType.Q8_0:
            return num_values // Q8_BLOCK * _Q8_DTYPE.itemsize
        return num_values * (4 if self is GgufType.F32 else 2)


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor to write: name, shape in C order, encoding, and its float32 rows in pieces."""

    name: str
    shape: tuple[int, ...]
    type: GgufType
    pieces: Iterable[np.ndarray]

    @property
    def num_bytes(self) -> int:
        return self.type.num_bytes(int(np.prod(self.shape, dtype=np.int64)))


def write_gguf(
    path: Path, metadata: Mapping[str, MetaValue], tensors: Sequence[GgufTensor]
) -> None:
    """Writes a file. Only one piece of one tensor is in memory at a time."""
    with path.open("wb") as file:
        file.write(_MAGIC + struct.pack("<IQQ", _VERSION, len(tensors), len(metadata)))
        for key, value in metadata.items():
            file.write(_string(key) + _meta_value(value))
        offset = 0
        for tensor in tensors:
            file.write(_tensor_info(tensor, offset))
            offset += _aligned(tensor.num_bytes)
        _pad(file)
        for tensor in tensors:
            _write_tensor(file, tensor)


def encode(rows: np.ndarray, type: GgufType) -> np.ndarray:
    """Encodes float32 rows."""
    if type is GgufType.Q8_0:
        return quantise_q8(rows)
    return rows.astype("<f4" if type is GgufType.F32 else "<f2")


def quantise_q8(rows: np.ndarray) -> np.ndarray:
    """Encodes rows as Q8_0. Steps are rounded with the scale before it is rounded to float16."""
    blocks = rows.reshape(-1, Q8_BLOCK)
    scales = np.abs(blocks).max(axis=1) / 127
    inverses = np.divide(1.0, scales, out=np.zeros_like(scales), where=scales > 0)
    encoded = np.empty(len(blocks), _Q8_DTYPE)
    encoded["scale"] = scales
    encoded["steps"] = np.rint(blocks * inverses[:, None])
    return encoded


def _write_tensor(file: BinaryIO, tensor: GgufTensor) -> None:
    start = file.tell()
    for piece in tensor.pieces:
        file.write(encode(np.ascontiguousarray(piece), tensor.type).tobytes())
    assert file.tell() - start == tensor.num_bytes, tensor.name
    _pad(file)


def _tensor_info(tensor: GgufTensor, offset: int) -> bytes:
    sizes = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
    return _string(tensor.name) + sizes + struct.pack("<IQ", tensor.type, offset)


def _meta_value(value: MetaValue) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _TYPE_STRING) + _string(value)
    if isinstance(value, int):
        return struct.pack("<II", _TYPE_UINT32, value)
    return struct.pack("<If", _TYPE_FLOAT32, value)


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _pad(file: BinaryIO) -> None:
    file.write(bytes(_aligned(file.tell()) - file.tell()))
