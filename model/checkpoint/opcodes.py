"""The pickle opcodes that a released tensor file may have, and the sizes that decide framing."""

from enum import IntEnum

PROTOCOL = 4
# CPython's pickler ends a frame of this size, and writes payloads of this size outside of frames.
FRAME_TARGET_BYTES = 64 * 1024
# A shorter frame is written without a header.
FRAME_MIN_BYTES = 4


class Op(IntEnum):
    """The allowed opcodes; all others are refused."""

    PROTO = 0x80
    FRAME = 0x95
    STOP = ord(".")
    MARK = ord("(")

    NONE = ord("N")
    NEWTRUE = 0x88
    NEWFALSE = 0x89
    BININT = ord("J")
    BININT1 = ord("K")
    BININT2 = ord("M")
    BINUNICODE = ord("X")
    SHORT_BINUNICODE = 0x8C
    BINBYTES = ord("B")
    SHORT_BINBYTES = ord("C")
    BINBYTES8 = 0x8E

    EMPTY_TUPLE = ord(")")
    TUPLE1 = 0x85
    TUPLE2 = 0x86
    TUPLE3 = 0x87
    TUPLE = ord("t")
    EMPTY_DICT = ord("}")
    SETITEM = ord("s")
    SETITEMS = ord("u")

    MEMOIZE = 0x94
    BINPUT = ord("q")
    LONG_BINPUT = ord("r")
    BINGET = ord("h")
    LONG_BINGET = ord("j")

    GLOBAL = ord("c")
    STACK_GLOBAL = 0x93
    REDUCE = ord("R")
    NEWOBJ = 0x81
    BUILD = ord("b")
