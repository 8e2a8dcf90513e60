"""Writes tensor files as in the release, with the same bytes that Python's pickler would write.

It uses no pickler. The opcodes around a payload depend on dtype and shape only, so this module
writes them itself, and writes the payload directly from the array's memory. A file gets its name
when it is complete.
"""

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from milliways.model.checkpoint.layout import (
    TENSOR_PREFIX,
    TensorRole,
    TensorSpec,
    expected,
    scales_fit,
    tensor_specs,
)
from milliways.model.checkpoint.opcodes import FRAME_MIN_BYTES, FRAME_TARGET_BYTES, PROTOCOL, Op
from milliways.model.checkpoint.records import BFLOAT16, FLOAT32, INT8, describe_array
from milliways.model.config import ModelConfig
from milliways.model.errors import CheckpointError, TensorLayoutError

# A plain array, or weights with their scales.
TensorArrays = np.ndarray | tuple[np.ndarray, np.ndarray]

_MAX_WRITTEN_DIMS = 3
_ENDS_OF_OBJECTS = frozenset(
    {
        Op.TUPLE1,
        Op.TUPLE2,
        Op.TUPLE3,
        Op.TUPLE,
        Op.SETITEMS,
        Op.STACK_GLOBAL,
        Op.REDUCE,
        Op.NEWOBJ,
        Op.BUILD,
        Op.MEMOIZE,
        Op.STOP,
    }
)


@dataclass(frozen=True, slots=True)
class _Form:
    """Dtype and shape of an array. They decide the opcodes around it."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True, slots=True)
class _Hole:
    """A place in the stream for the bytes of an array."""

    array_index: int
    num_bytes: int


_Piece = bytes | _Hole


def write_plain(path: Path, array: np.ndarray) -> int:
    """Writes a float32 array; returns the size of the file.

    Raises:
        TensorLayoutError: the dtype is not float32, or there are not 1 to 3 dimensions.
    """
    form = _Form(array.dtype, array.shape)
    _check_form(path, form, FLOAT32)
    return _write(path, _plain_pieces(form), [array])


def write_quantized(path: Path, weight: np.ndarray, scales: np.ndarray) -> int:
    """Writes int8 weights [..., K, N] and bfloat16 scales [..., G, N]; returns the file's size.

    Raises:
        TensorLayoutError: a dtype is wrong, or the scales do not fit the weights.
    """
    weight_form, scales_form = _Form(weight.dtype, weight.shape), _Form(scales.dtype, scales.shape)
    _check_form(path, weight_form, INT8)
    _check_form(path, scales_form, BFLOAT16)
    if weight.ndim < 2 or not scales_fit(weight.shape, scales.shape):
        raise TensorLayoutError(
            path, f"scales {list(scales.shape)} do not fit weights {list(weight.shape)}"
        )
    return _write(path, _quantized_pieces(weight_form, scales_form), [weight, scales])


def write_checkpoint(
    ckpt_dir: Path, config: ModelConfig, tensor_of: Callable[[TensorSpec], TensorArrays]
) -> int:
    """Writes every tensor of a model, one after another; returns the bytes of all files.

    Raises:
        TensorLayoutError: `tensor_of` returned another shape or dtype than the spec requires, or
            the directory has tensor files that do not belong to the model.
        CheckpointError: the directory or a file cannot be written.
    """
    specs = tensor_specs(config)
    _prepare_directory(ckpt_dir, specs)
    return sum(write_tensor(ckpt_dir / spec.file_name, spec, tensor_of(spec)) for spec in specs)


def write_tensor(path: Path, spec: TensorSpec, arrays: TensorArrays) -> int:
    """Writes one tensor of a model; returns the size of its file.

    Raises:
        TensorLayoutError: the arrays have another shape or dtype than the spec requires.
        CheckpointError: the file cannot be written.
    """
    weight, *scales = arrays if isinstance(arrays, tuple) else (arrays,)
    if weight.shape != spec.shape or bool(scales) != spec.quantized:
        found = " with scales ".join(describe_array(a.dtype, a.shape) for a in (weight, *scales))
        raise TensorLayoutError(path, f"{spec.name}: expected {expected(spec)}, got {found}")
    if scales:
        return write_quantized(path, weight, scales[0])
    return write_plain(path, weight)


def write_sparse_checkpoint(ckpt_dir: Path, config: ModelConfig, *, num_row_blocks: int = 8) -> int:
    """Writes a checkpoint of zeros whose payloads take no space on disk, for tests of sizes.

    `num_row_blocks` is G of the matrices that the release quantised in row blocks. G of all others
    is 1.
    """
    specs = tensor_specs(config)
    _prepare_directory(ckpt_dir, specs)
    return sum(_write_sparse(ckpt_dir / spec.file_name, spec, num_row_blocks) for spec in specs)


def _prepare_directory(ckpt_dir: Path, specs: Sequence[TensorSpec]) -> None:
    try:
        ckpt_dir.mkdir(parents=True, exist_ok=True)
        found = {name for name in os.listdir(ckpt_dir) if name.startswith(TENSOR_PREFIX)}
    except OSError as error:
        raise CheckpointError(ckpt_dir, f"cannot be written: {error.strerror}") from error
    if foreign := found - {spec.file_name for spec in specs}:
        raise TensorLayoutError(
            ckpt_dir / min(foreign),
            f"does not belong to the model to write, which has {len(specs)} files",
        )


def _write_sparse(path: Path, spec: TensorSpec, num_row_blocks: int) -> int:
    if not spec.quantized:
        return _write(path, _plain_pieces(_Form(FLOAT32, spec.shape)), None)
    by_rows = spec.role in (TensorRole.EXPERT_LINEAR_1, TensorRole.ATTENTION_OUT)
    scales_shape = (*spec.shape[:-2], num_row_blocks if by_rows else 1, spec.shape[-1])
    pieces = _quantized_pieces(_Form(INT8, spec.shape), _Form(BFLOAT16, scales_shape))
    return _write(path, pieces, None)


def _check_form(path: Path, form: _Form, dtype: np.dtype) -> None:
    if form.dtype != dtype:
        raise TensorLayoutError(path, f"expected {dtype.name}, got {form.dtype}")
    if not 1 <= len(form.shape) <= _MAX_WRITTEN_DIMS or 0 in form.shape:
        raise TensorLayoutError(path, f"cannot write an array of shape {list(form.shape)}")


# The stream of opcodes.


class _Stream:
    """The opcodes that the pickler would have written so far, in frames, with a memo by label.

    Invariant: `_pieces` has the complete frames, `_frame` the pieces of the frame that is open.
    `_num_frame_bytes` is the size of `_frame`.

    Invariant: `_memo` maps the label of each memoized object to its index, counted from 0.
    """

    def __init__(self) -> None:
        self._pieces: list[_Piece] = [bytes([Op.PROTO, PROTOCOL])]
        self._frame: list[_Piece] = []
        self._num_frame_bytes = 0
        self._memo: dict[str, int] = {}

    def finish(self) -> list[_Piece]:
        self.put(Op.STOP)
        self._close_frame()
        return self._pieces

    def put(self, op: Op, argument: bytes = b"") -> None:
        # The pickler checks the size of its frame before each object, not inside an object.
        if op not in _ENDS_OF_OBJECTS and self._num_frame_bytes >= FRAME_TARGET_BYTES:
            self._close_frame()
        self._add(bytes([op]) + argument)

    def memoize(self, label: str) -> None:
        """Memoizes the last object. The pickler uses its identity, we use a label."""
        assert label not in self._memo
        self._memo[label] = len(self._memo)
        self.put(Op.MEMOIZE)

    def recall(self, label: str) -> bool:
        if label not in self._memo:
            return False
        self.put(Op.BINGET, bytes([self._memo[label]]))
        return True

    def text(self, value: str) -> None:
        if not self.recall(value):
            raw = value.encode()
            self.put(Op.SHORT_BINUNICODE, bytes([len(raw)]) + raw)
            self.memoize(value)

    def integer(self, value: int) -> None:
        if 0 <= value < 1 << 8:
            self.put(Op.BININT1, bytes([value]))
        elif 0 <= value < 1 << 16:
            self.put(Op.BININT2, value.to_bytes(2, "little"))
        else:
            self.put(Op.BININT, value.to_bytes(4, "little", signed=True))

    def hole(self, hole: _Hole) -> None:
        """Adds a bytes object. A large one goes between frames."""
        op, length = _bytes_header(hole.num_bytes)
        if hole.num_bytes >= FRAME_TARGET_BYTES:
            self._close_frame()
            self._pieces += [bytes([op]) + length, hole]
            return
        self.put(op, length)
        self._frame.append(hole)
        self._num_frame_bytes += hole.num_bytes

    def _add(self, data: bytes) -> None:
        self._frame.append(data)
        self._num_frame_bytes += len(data)

    def _close_frame(self) -> None:
        if self._num_frame_bytes >= FRAME_MIN_BYTES:
            self._pieces.append(bytes([Op.FRAME]) + self._num_frame_bytes.to_bytes(8, "little"))
        self._pieces += self._frame
        self._frame = []
        self._num_frame_bytes = 0


def _bytes_header(num_bytes: int) -> tuple[Op, bytes]:
    if num_bytes < 1 << 8:
        return Op.SHORT_BINBYTES, bytes([num_bytes])
    if num_bytes < 1 << 32:
        return Op.BINBYTES, num_bytes.to_bytes(4, "little")
    return Op.BINBYTES8, num_bytes.to_bytes(8, "little")


def _plain_pieces(form: _Form) -> list[_Piece]:
    stream = _Stream()
    _put_array(stream, 0, form)
    return stream.finish()


def _quantized_pieces(weight: _Form, scales: _Form) -> list[_Piece]:
    stream = _Stream()
    _put_global(stream, "__main__", "QuantizedWeight8bit")
    stream.put(Op.EMPTY_TUPLE)
    stream.put(Op.NEWOBJ)
    stream.memoize("the quantised weight")
    stream.put(Op.EMPTY_DICT)
    stream.memoize("its state")
    stream.put(Op.MARK)
    stream.text("weight")
    _put_array(stream, 0, weight)
    stream.text("scales")
    _put_array(stream, 1, scales)
    stream.put(Op.SETITEMS)
    stream.put(Op.BUILD)
    return stream.finish()


def _put_array(stream: _Stream, index: int, form: _Form) -> None:
    # numpy 2 calls this module numpy._core. The release and its readers know only this name.
    _put_global(stream, "numpy.core.multiarray", "_reconstruct")
    _put_global(stream, "numpy", "ndarray")
    stream.integer(0)
    _put_tuple(stream, f"empty shape {index}", 1)
    if not stream.recall("type code"):
        stream.put(Op.SHORT_BINBYTES, b"\x01b")
        stream.memoize("type code")
    _put_tuple(stream, f"arguments {index}", 3)
    stream.put(Op.REDUCE)
    stream.memoize(f"array {index}")
    stream.put(Op.MARK)
    stream.integer(1)
    for size in form.shape:
        stream.integer(size)
    _put_tuple(stream, f"shape {index}", len(form.shape))
    _put_dtype(stream, index, form.dtype)
    stream.put(Op.NEWFALSE)
    stream.hole(_Hole(index, form.num_bytes))
    stream.memoize(f"payload {index}")
    stream.put(Op.TUPLE)
    stream.memoize(f"array state {index}")
    stream.put(Op.BUILD)


def _put_dtype(stream: _Stream, index: int, dtype: np.dtype) -> None:
    _put_global(stream, "numpy", "dtype")
    if dtype == BFLOAT16:
        _put_global(stream, "ml_dtypes", "bfloat16")
        size_alignment_flags = (2, 2, 0x40)
    else:
        stream.text("i1" if dtype == INT8 else "f4")
        size_alignment_flags = (-1, -1, 0)
    stream.put(Op.NEWFALSE)
    stream.put(Op.NEWTRUE)
    _put_tuple(stream, f"dtype arguments {index}", 3)
    stream.put(Op.REDUCE)
    stream.memoize(f"dtype {index}")
    stream.put(Op.MARK)
    stream.integer(3)
    stream.text("|" if dtype.itemsize == 1 else "<")
    for _ in ("subdtype", "names", "fields"):
        stream.put(Op.NONE)
    for value in size_alignment_flags:
        stream.integer(value)
    stream.put(Op.TUPLE)
    stream.memoize(f"dtype state {index}")
    stream.put(Op.BUILD)


def _put_global(stream: _Stream, module: str, name: str) -> None:
    label = f"global {module} {name}"
    if not stream.recall(label):
        stream.text(module)
        stream.text(name)
        stream.put(Op.STACK_GLOBAL)
        stream.memoize(label)


def _put_tuple(stream: _Stream, label: str, num_items: int) -> None:
    stream.put((Op.TUPLE1, Op.TUPLE2, Op.TUPLE3)[num_items - 1])
    stream.memoize(label)


# To disk.


def _write(path: Path, pieces: Sequence[_Piece], arrays: Sequence[np.ndarray] | None) -> int:
    """Writes the pieces. Without arrays, payloads become holes of a sparse file."""
    # A hidden name: if the process dies, the file that it leaves is not taken for a tensor file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            for piece in pieces:
                _write_piece(file, piece, arrays)
            num_bytes = file.tell()
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(path, f"cannot be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return num_bytes


def _write_piece(file: BinaryIO, piece: _Piece, arrays: Sequence[np.ndarray] | None) -> None:
    if isinstance(piece, bytes):
        file.write(piece)
    elif arrays is None:
        file.seek(piece.num_bytes, os.SEEK_CUR)
    else:
        # This copies only an array that is not in C order.
        flat = np.ascontiguousarray(arrays[piece.array_index]).reshape(-1)
        file.write(flat.view(np.uint8).data)
