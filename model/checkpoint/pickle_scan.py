"""Finds the arrays of a tensor file by reading its pickle opcodes. It executes nothing.

The release consists of pickles, and unpickling runs any code that a file names. Here a `_Machine`
reads the opcodes and keeps only notes: a call of `numpy.dtype` becomes the note "a dtype", and a
payload becomes the note "bytes from here to there" and is skipped.

1. `scan` opens the file and gives opcodes to a `_Machine` until STOP.
2. The release uses five globals. Another global, or one of the five in another use, is refused.
3. At the end, the stack must hold one array, or one quantised weight with two arrays.

Every loop and size has a limit, so a scan of any input soon ends with a record or a
CheckpointError. Notes are never compared, printed or hashed: in nested tuples that share parts,
that could take forever.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import Final, NoReturn

import numpy as np

from milliways.model.checkpoint.byte_window import ByteWindow, open_regular
from milliways.model.checkpoint.opcodes import PROTOCOL, Op
from milliways.model.checkpoint.records import (
    BFLOAT16,
    ArrayRecord,
    PlainArray,
    QuantizedArray,
    TensorRecord,
)
from milliways.model.errors import UnsafePickleError

# A released file has about 120 opcodes, 40 memo entries and a stack 15 deep.
MAX_OPCODES = 512
MAX_MEMO = 256
MAX_STACK = 128
MAX_STRING_BYTES = 128
MAX_DIMS = 8

_PICKLE_ARRAY_VERSION = 1
_PICKLE_DTYPE_VERSION = 3
# Flag bits of a numpy dtype that change how Python accesses items, not what the bytes mean.
_HARMLESS_DTYPE_FLAGS = 0x60


class _Global(Enum):
    """The five globals that a file may name."""

    RECONSTRUCT = ("numpy.core.multiarray", "_reconstruct")
    NDARRAY = ("numpy", "ndarray")
    DTYPE = ("numpy", "dtype")
    BFLOAT16 = ("ml_dtypes", "bfloat16")
    QUANTIZED = ("__main__", "QuantizedWeight8bit")


# Since version 2, numpy writes the same function under another name.
_NUMPY_2: Final = {("numpy._core.multiarray", "_reconstruct"): _Global.RECONSTRUCT}
_GLOBALS: Final[Mapping[tuple[str, str], _Global]] = MappingProxyType(
    {g.value: g for g in _Global} | _NUMPY_2
)
# More dtypes than the release uses, so that the error can name a wrong one.
_DTYPES: Final[Mapping[str, np.dtype]] = MappingProxyType(
    {
        code: np.dtype(code)
        for code in ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
    }
)


@dataclass(frozen=True, slots=True, eq=False)
class _Span:
    """The place of a bytes object in the file."""

    offset: int
    num_bytes: int


@dataclass(slots=True, eq=False)
class _DType:
    dtype: np.dtype
    built: bool = False


@dataclass(slots=True, eq=False)
class _Array:
    record: ArrayRecord | None = None


@dataclass(slots=True, eq=False)
class _Dict:
    items: dict[str, object]


@dataclass(slots=True, eq=False)
class _Quantized:
    weight: ArrayRecord | None = None
    scales: ArrayRecord | None = None


def scan(path: Path) -> TensorRecord:
    """Finds the places of the arrays of one tensor file, without reading the arrays.

    Raises:
        UnsafePickleError: an opcode or a global is not allowed, or is misused.
        CorruptTensorError: the file is truncated or malformed, or its sizes contradict each other.
        CheckpointError: the file cannot be opened or read.
    """
    with open_regular(path) as (fd, num_file_bytes):
        window = ByteWindow(path, fd, num_file_bytes)
        found = _run(_Machine(window))
        if isinstance(found, _Array) and found.record is not None:
            return PlainArray(
                path=path,
                num_file_bytes=num_file_bytes,
                num_scanned_bytes=window.num_scanned_bytes,
                array=found.record,
            )
        if isinstance(found, _Quantized) and found.weight is not None and found.scales is not None:
            return QuantizedArray(
                path=path,
                num_file_bytes=num_file_bytes,
                num_scanned_bytes=window.num_scanned_bytes,
                weight=found.weight,
                scales=found.scales,
            )
        raise window.corrupt("the file holds neither an array nor a quantised weight")


def _run(machine: "_Machine") -> object:
    window = machine.window
    if window.take(1)[0] != Op.PROTO:
        raise window.corrupt("not a pickle: the file does not begin with a protocol opcode")
    protocol = window.take_int(1)
    if protocol > PROTOCOL:
        raise UnsafePickleError(
            window.path, f"the pickle has protocol {protocol}, the highest allowed is {PROTOCOL}"
        )
    for _ in range(MAX_OPCODES):
        opcode = window.take(1)[0]
        if opcode == Op.STOP:
            return machine.result()
        handler = _HANDLERS.get(opcode)
        if handler is None:
            machine.refuse(f"opcode 0x{opcode:02x} is not allowed")
        handler(machine)
    raise window.corrupt(f"the pickle has more than {MAX_OPCODES} opcodes")


class _Machine:
    """The stack, marks and memo of one scan. A public method notes what one opcode would do.

    Invariant: `_stack` and `_marks` have at most `MAX_STACK` items, `_memo` at most `MAX_MEMO`.

    Invariant: `_marks` never decreases, and no mark is above the length of `_stack`.
    """

    def __init__(self, window: ByteWindow) -> None:
        self.window = window
        self._stack: list[object] = []
        self._marks: list[int] = []
        self._memo: dict[int, object] = {}

    def refuse(self, reason: str) -> NoReturn:
        raise UnsafePickleError(
            self.window.path, f"{reason} (near byte {self.window.position}); nothing was executed"
        )

    def result(self) -> object:
        value = self._pop()
        if self._stack or self._marks:
            raise self.window.corrupt("the pickle ends with more than one object")
        trailing = self.window.num_file_bytes - self.window.position
        if trailing:
            raise self.window.corrupt(f"{trailing} bytes follow the end of the pickle")
        return value

    def push(self, value: object) -> None:
        if len(self._stack) >= MAX_STACK:
            raise self.window.corrupt(f"the stack has more than {MAX_STACK} objects")
        self._stack.append(value)

    def _pop(self) -> object:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise self.window.corrupt("an opcode takes an object from an empty stack")
        return self._stack.pop()

    def _top(self) -> object:
        value = self._pop()
        self._stack.append(value)
        return value

    def _pop_mark(self) -> list[object]:
        if not self._marks:
            raise self.window.corrupt("an opcode ends a group that has not begun")
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def mark(self) -> None:
        if len(self._marks) >= MAX_STACK:
            raise self.window.corrupt(f"the pickle has more than {MAX_STACK} open groups")
        self._marks.append(len(self._stack))

    # Values.

    def frame(self) -> None:
        self.window.begin_frame(self.window.take_int(8))

    def text(self, num_length_bytes: int) -> None:
        num_bytes = self.window.take_int(num_length_bytes)
        if num_bytes > MAX_STRING_BYTES:
            raise self.window.corrupt(
                f"a string has {num_bytes} bytes, the limit is {MAX_STRING_BYTES}"
            )
        self.push(self._decode(self.window.take(num_bytes)))

    def _decode(self, raw: bytes) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.window.corrupt("a string is not UTF-8") from error

    def payload(self, num_length_bytes: int) -> None:
        num_bytes = self.window.take_int(num_length_bytes)
        self.push(_Span(self.window.skip(num_bytes), num_bytes))

    def tuple_of(self, num_items: int) -> None:
        values = [self._pop() for _ in range(num_items)]
        self.push(tuple(reversed(values)))

    def tuple_from_mark(self) -> None:
        self.push(tuple(self._pop_mark()))

    def set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._store([key, value])

    def set_items(self) -> None:
        self._store(self._pop_mark())

    def _store(self, keys_and_values: list[object]) -> None:
        target = self._top()
        if not isinstance(target, _Dict) or len(keys_and_values) % 2:
            raise self.window.corrupt("an opcode sets items of an object that is not a dict")
        for key, value in zip(keys_and_values[::2], keys_and_values[1::2], strict=True):
            if not isinstance(key, str) or key in target.items:
                raise self.window.corrupt("a dict key is repeated or is not a string")
            target.items[key] = value

    # Memo.

    def memoize(self) -> None:
        self._remember(len(self._memo))

    def put(self, num_index_bytes: int) -> None:
        self._remember(self.window.take_int(num_index_bytes))

    def _remember(self, index: int) -> None:
        if index >= MAX_MEMO:
            raise self.window.corrupt(f"memo index {index} is not below {MAX_MEMO}")
        self._memo[index] = self._top()

    def get(self, num_index_bytes: int) -> None:
        index = self.window.take_int(num_index_bytes)
        if index not in self._memo:
            raise self.window.corrupt(f"memo index {index} was never stored")
        self.push(self._memo[index])

    # Globals, and their allowed uses.

    def global_from_lines(self) -> None:
        self._push_global(self._line(), self._line())

    def _line(self) -> str:
        raw = bytearray()
        while len(raw) <= MAX_STRING_BYTES:
            byte = self.window.take(1)
            if byte == b"\n":
                return self._decode(bytes(raw))
            raw += byte
        raise self.window.corrupt(f"a name has more than {MAX_STRING_BYTES} bytes")

    def global_from_stack(self) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            self.refuse("the name of a global is not a string")
        self._push_global(module, name)

    def _push_global(self, module: str, name: str) -> None:
        known = _GLOBALS.get((module, name))
        if known is None:
            self.refuse(f"global {module!r} {name!r} is not allowed")
        self.push(known)

    def reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        if function is _Global.RECONSTRUCT:
            self.push(self._reconstruct(arguments))
        elif function is _Global.DTYPE:
            self.push(self._dtype(arguments))
        else:
            self.refuse("it calls something other than numpy's array and dtype constructors")

    def _reconstruct(self, arguments: object) -> _Array:
        match arguments:
            case (_Global.NDARRAY, (int(length),), _Span(num_bytes=1)) if length == 0:
                return _Array()
        self.refuse("it constructs an array with unknown arguments")

    def _dtype(self, arguments: object) -> _DType:
        match arguments:
            case (_Global.BFLOAT16, False, True):
                return _DType(BFLOAT16)
            case (str(code), False, True):
                if code not in _DTYPES:
                    raise self.window.corrupt(f"the dtype {code!r} is not numeric")
                return _DType(_DTYPES[code])
        self.refuse("it constructs a dtype with unknown arguments")

    def new_object(self) -> None:
        arguments, cls = self._pop(), self._pop()
        if cls is not _Global.QUANTIZED or not isinstance(arguments, tuple) or arguments:
            self.refuse("it constructs an object of a class other than the quantised weight")
        self.push(_Quantized())

    def build(self) -> None:
        state, target = self._pop(), self._top()
        match target:
            case _Array():
                self._build_array(target, state)
            case _DType():
                self._build_dtype(target, state)
            case _Quantized():
                self._build_quantized(target, state)
            case _:
                self.refuse("it sets the state of an object that has none")

    def _build_dtype(self, target: _DType, state: object) -> None:
        match state:
            case (int(version), str(order), None, None, None, int(), int(), int(flags)):
                if version != _PICKLE_DTYPE_VERSION or flags & ~_HARMLESS_DTYPE_FLAGS:
                    raise self.window.corrupt("a dtype has an unknown version or unknown flags")
            case _:
                raise self.window.corrupt("the state of a dtype is malformed")
        if order != ("|" if target.dtype.itemsize == 1 else "<"):
            raise self.window.corrupt(f"the byte order {order!r} is not little-endian")
        target.built = True

    def _build_array(self, target: _Array, state: object) -> None:
        if target.record is not None:
            raise self.window.corrupt("an array is built twice")
        match state:
            case (
                int(version),
                tuple() as shape,
                _DType() as dtype,
                bool(fortran),
                _Span() as data,
            ):
                if version != _PICKLE_ARRAY_VERSION or not dtype.built:
                    raise self.window.corrupt(
                        "an array has an unknown version or an unfinished dtype"
                    )
                if fortran:
                    raise self.window.corrupt("the array is in Fortran order")
                target.record = self._record(self._shape(shape), dtype.dtype, data)
            case _:
                raise self.window.corrupt("the state of an array is malformed")

    def _shape(self, items: tuple[object, ...]) -> tuple[int, ...]:
        if len(items) > MAX_DIMS:
            raise self.window.corrupt(
                f"an array has {len(items)} dimensions, the limit is {MAX_DIMS}"
            )
        shape = tuple(item for item in items if type(item) is int and item >= 0)
        if len(shape) != len(items):
            raise self.window.corrupt("a dimension is negative or not a number")
        return shape

    def _record(self, shape: tuple[int, ...], dtype: np.dtype, data: _Span) -> ArrayRecord:
        num_expected = math.prod(shape) * dtype.itemsize
        if data.num_bytes != num_expected:
            raise self.window.corrupt(
                f"{dtype.name} {list(shape)} needs {num_expected} bytes, the file has"
                f" {data.num_bytes}"
            )
        return ArrayRecord(dtype, shape, data.offset, data.num_bytes)

    def _build_quantized(self, target: _Quantized, state: object) -> None:
        if target.weight is not None:
            raise self.window.corrupt("a quantised weight is built twice")
        if not isinstance(state, _Dict) or state.items.keys() != {"weight", "scales"}:
            raise self.window.corrupt("a quantised weight must have exactly weight and scales")
        weight, scales = state.items["weight"], state.items["scales"]
        if not isinstance(weight, _Array) or not isinstance(scales, _Array):
            raise self.window.corrupt("weight or scales is not an array")
        if weight.record is None or scales.record is None:
            raise self.window.corrupt("weight or scales is an unfinished array")
        target.weight, target.scales = weight.record, scales.record


def _repeated_proto(machine: _Machine) -> None:
    raise machine.window.corrupt("the pickle has a second protocol opcode")


_HANDLERS: Final[Mapping[int, Callable[[_Machine], None]]] = MappingProxyType(
    {
        Op.PROTO: _repeated_proto,
        Op.FRAME: _Machine.frame,
        Op.MARK: _Machine.mark,
        Op.NONE: lambda machine: machine.push(None),
        Op.NEWTRUE: lambda machine: machine.push(True),
        Op.NEWFALSE: lambda machine: machine.push(False),
        Op.BININT: lambda machine: machine.push(machine.window.take_int(4, signed=True)),
        Op.BININT1: lambda machine: machine.push(machine.window.take_int(1)),
        Op.BININT2: lambda machine: machine.push(machine.window.take_int(2)),
        Op.BINUNICODE: lambda machine: machine.text(4),
        Op.SHORT_BINUNICODE: lambda machine: machine.text(1),
        Op.BINBYTES: lambda machine: machine.payload(4),
        Op.SHORT_BINBYTES: lambda machine: machine.payload(1),
        Op.BINBYTES8: lambda machine: machine.payload(8),
        Op.EMPTY_TUPLE: lambda machine: machine.push(()),
        Op.TUPLE1: lambda machine: machine.tuple_of(1),
        Op.TUPLE2: lambda machine: machine.tuple_of(2),
        Op.TUPLE3: lambda machine: machine.tuple_of(3),
        Op.TUPLE: _Machine.tuple_from_mark,
        Op.EMPTY_DICT: lambda machine: machine.push(_Dict({})),
        Op.SETITEM: _Machine.set_item,
        Op.SETITEMS: _Machine.set_items,
        Op.MEMOIZE: _Machine.memoize,
        Op.BINPUT: lambda machine: machine.put(1),
        Op.LONG_BINPUT: lambda machine: machine.put(4),
        Op.BINGET: lambda machine: machine.get(1),
        Op.LONG_BINGET: lambda machine: machine.get(4),
        Op.GLOBAL: _Machine.global_from_lines,
        Op.STACK_GLOBAL: _Machine.global_from_stack,
        Op.REDUCE: _Machine.reduce,
        Op.NEWOBJ: _Machine.new_object,
        Op.BUILD: _Machine.build,
    }
)
