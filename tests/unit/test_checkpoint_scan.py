"""The scanner on files it must accept, and on files it must refuse without running anything."""

import builtins
import os
import pickle
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from milliways.model.checkpoint import (
    PlainArray,
    QuantizedArray,
    scan,
    write_plain,
    write_quantized,
)
from milliways.model.checkpoint.records import BFLOAT16
from milliways.model.errors import CheckpointError, CorruptTensorError, UnsafePickleError

REPOSITORY = Path(__file__).parents[2]
TINY = REPOSITORY / "tests" / "golden" / "tiny" / "ckpt-0"
FRAME_HEADER_END = 11
NOBODY = 65534
VALUES = np.arange(15, dtype=np.float32).reshape(3, 5)


@pytest.fixture
def plain_opcodes(tmp_path: Path) -> bytes:
    """The opcodes of a 3 x 5 float32 array, without protocol and frame header."""
    write_plain(tmp_path / "valid", VALUES)
    return (tmp_path / "valid").read_bytes()[FRAME_HEADER_END:]


@pytest.fixture
def quantized_opcodes(tmp_path: Path) -> bytes:
    write_quantized(tmp_path / "valid", np.ones((4, 6), np.int8), np.ones((2, 6), dtype=BFLOAT16))
    return (tmp_path / "valid").read_bytes()[FRAME_HEADER_END:]


def framed(opcodes: bytes) -> bytes:
    return b"\x80\x04\x95" + struct.pack("<Q", len(opcodes)) + opcodes


def edited(opcodes: bytes, old: bytes, new: bytes) -> bytes:
    assert old in opcodes
    return framed(opcodes.replace(old, new, 1))


def scan_bytes(tmp_path: Path, data: bytes) -> PlainArray | QuantizedArray:
    path = tmp_path / "tensor00000_000"
    # A new file each time: some file systems flush one that is overwritten to disk at once.
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    return scan(path)


def test_plain_array_is_found_where_its_bytes_lie() -> None:
    path = TINY / "tensor00001_000"
    record = scan(path)
    assert isinstance(record, PlainArray)
    assert record.array.shape == (128,) and record.array.dtype == np.float32
    assert record.array.num_bytes == 512
    assert record.num_file_bytes == path.stat().st_size
    data = path.read_bytes()[record.array.offset :][:512]
    # The values of a reference norm are near 1. Bytes from another place would not be.
    assert np.abs(np.frombuffer(data, np.float32)).min() > 0
    assert np.abs(np.frombuffer(data, np.float32)).max() < 100


def test_quantized_array_has_weight_and_bfloat16_scales() -> None:
    record = scan(TINY / "tensor00002_000")
    assert isinstance(record, QuantizedArray)
    assert (record.weight.dtype, record.weight.shape) == (np.int8, (8, 128, 688))
    assert (record.scales.dtype, record.scales.shape) == (BFLOAT16, (8, 1, 688))
    assert record.weight.offset + record.weight.num_bytes < record.scales.offset


def test_large_payload_is_skipped() -> None:
    record = scan(TINY / "tensor00002_000")
    assert record.num_file_bytes > 700_000
    assert record.num_scanned_bytes < 2048


def test_protocol_three_without_frames_is_read(tmp_path: Path) -> None:
    data = pickle.dumps(VALUES, protocol=3).replace(b"numpy._core.", b"numpy.core.")
    record = scan_bytes(tmp_path, data)
    assert isinstance(record, PlainArray)
    lying = data[record.array.offset :][: record.array.num_bytes]
    assert np.array_equal(np.frombuffer(lying, np.float32).reshape(3, 5), VALUES)


@pytest.mark.parametrize("protocol", [3, 4])
def test_array_saved_by_numpy_2_is_read(tmp_path: Path, protocol: int) -> None:
    data = pickle.dumps(VALUES, protocol=protocol)
    # The numpy that is installed here has one of the two names; the release has the other.
    assert b"numpy._core.multiarray" in data
    record = scan_bytes(tmp_path, data)
    assert isinstance(record, PlainArray) and record.array.shape == (3, 5)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("numpy._core.multiarray", "fromfile"),
        ("numpy._core", "_reconstruct"),
        ("numpy._core.numeric", "_frombuffer"),
        ("numpy._core.multiarray._reconstruct", "_reconstruct"),
    ],
)
def test_numpy_2_has_one_name_more_and_no_other(tmp_path: Path, module: str, name: str) -> None:
    named = b"".join(b"\x8c" + bytes([len(t)]) + t.encode() for t in (module, name))
    with pytest.raises(UnsafePickleError):
        scan_bytes(tmp_path, framed(named + b"\x93."))


class Attack:
    """An object whose pickle calls a function."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    "attack",
    [
        lambda canary: Attack(os.system, f"touch {canary}"),
        lambda canary: Attack(os.mkdir, str(canary)),
        lambda canary: Attack(builtins.eval, f"open({str(canary)!r}, 'w')"),
        lambda canary: Attack(builtins.exec, f"open({str(canary)!r}, 'w')"),
        lambda canary: Attack(builtins.open, str(canary), "w"),
        lambda canary: Attack(np.load, str(canary)),
        lambda canary: Attack(np.ndarray, (3,)),
        lambda canary: Attack(getattr, canary, "touch"),
    ],
)
def test_foreign_global_is_refused_and_nothing_is_executed(
    tmp_path: Path, attack, nested: bool, protocol: int
) -> None:
    canary = tmp_path / "canary"
    evil = attack(canary)
    data = pickle.dumps({"weight": evil} if nested else evil, protocol=protocol)
    with pytest.raises(UnsafePickleError, match="tensor00000_000"):
        scan_bytes(tmp_path, data)
    assert not canary.exists()


def test_foreign_global_inside_a_released_tensor_is_refused(
    tmp_path: Path, quantized_opcodes: bytes
) -> None:
    bfloat16 = b"\x8c\x09ml_dtypes\x94\x8c\x08bfloat16"
    data = edited(quantized_opcodes, bfloat16, b"\x8c\x05posix\x94\x8c\x06system")
    with pytest.raises(UnsafePickleError, match=r"'posix' 'system'"):
        scan_bytes(tmp_path, data)


NDARRAY = b"\x8c\x05numpy\x8c\x07ndarray\x93"
QUANTIZED = b"\x8c\x08__main__\x8c\x13QuantizedWeight8bit\x93"
DTYPE = b"\x8c\x05numpy\x8c\x05dtype\x93"
RECONSTRUCT = b"\x8c\x15numpy.core.multiarray\x8c\x0c_reconstruct\x93"


@pytest.mark.parametrize(
    "opcodes",
    [
        NDARRAY + b")R.",
        QUANTIZED + b")R.",
        NDARRAY + b")\x81.",
        DTYPE + b")\x81.",
        QUANTIZED + b"K\x01\x85\x81.",
        DTYPE + b"\x8c\x02f4\x85R.",
        DTYPE + b"\x8c\x02f4\x89\x89\x87R.",
        DTYPE + NDARRAY + b"\x89\x88\x87R.",
        RECONSTRUCT + DTYPE + b"K\x00\x85C\x01b\x87R.",
        RECONSTRUCT + NDARRAY + b"K\x05\x85C\x01b\x87R.",
        RECONSTRUCT + NDARRAY + b"K\x00\x85\x86R.",
        NDARRAY + b"}b.",
        b"}}b.",
        b"K\x01K\x02\x93.",
        b"\x8c\x05numpy)\x93.",
        b"i__main__\nQuantizedWeight8bit\n.",
        b"\x8c\x05posixQ.",
        b"\x82\x01.",
        b"0.",
        b"\x96\x01\x00\x00\x00\x00\x00\x00\x00a.",
    ],
)
def test_allowed_global_in_another_use_is_refused(tmp_path: Path, opcodes: bytes) -> None:
    with pytest.raises(UnsafePickleError):
        scan_bytes(tmp_path, framed(opcodes))


def test_protocol_five_is_refused(tmp_path: Path, plain_opcodes: bytes) -> None:
    with pytest.raises(UnsafePickleError, match="protocol 5"):
        scan_bytes(tmp_path, b"\x80\x05" + plain_opcodes)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b"\x8c\x01<", b"\x8c\x01>", "little-endian"),
        (b"\x8c\x02f4", b"\x8c\x02O8", "'O8' is not numeric"),
        (b"\x8c\x02f4", b"\x8c\x02V4", "'V4' is not numeric"),
        (b"\x8c\x02f4", b"\x8c\x02f8", "120 bytes, the file has 60"),
        (b"K\x03K\x05\x86", b"K\x04K\x05\x86", "80 bytes, the file has 60"),
        (b"K\x03K\x05\x86", b"J\xfd\xff\xff\xffJ\xfb\xff\xff\xff\x86", "negative"),
        (b"K\x03K\x05\x86", b"K\x03\x88\x86", "not a number"),
        (b"K\x03K\x05\x86", b"(" + b"J\xff\xff\xff\x7f" * 8 + b"t", "the file has 60"),
        (b"K\x03K\x05\x86", b"(" + b"K\x01" * 9 + b"t", "9 dimensions"),
        (b"K\x03K\x05\x86", b"N", "malformed"),
        (b"\x89C\x3c", b"\x88C\x3c", "Fortran"),
        (b"\x89C\x3c", b"\x89B\xff\xff\xff\x7f", "truncated"),
        (b"\x89C\x3c", b"\x89\x8e\xff\xff\xff\xff\xff\xff\xff\xff", "truncated"),
        (b"\x89C\x3c", b"\x89C\x3b", "not allowed|the file has 59"),
        (b"K\x03\x8c\x01<", b"K\x04\x8c\x01<", "unknown version"),
        (b"J\xff\xff\xff\xffK\x00t", b"J\xff\xff\xff\xffK\x3ft", "flags"),
        (b"(K\x03\x8c\x01<", b"0(K\x03\x8c\x01<", "0x30"),
        (b"h\x03", b"h\x63", "never stored"),
        (b"h\x03", b"j\xff\xff\xff\xff", "never stored"),
        (b"\x85\x94", b"\x85r\xff\xff\xff\xff", "memo index"),
        (b"\x8c\x02f4", b"X\xff\xff\xff\x7f", "a string has"),
        (b"\x8c\x02f4", b"\x8c\x02\xff\xfe", "UTF-8"),
    ],
)
def test_malformed_array_is_refused_with_its_reason(
    tmp_path: Path, plain_opcodes: bytes, old: bytes, new: bytes, reason: str
) -> None:
    with pytest.raises(CheckpointError, match=reason) as caught:
        scan_bytes(tmp_path, edited(plain_opcodes, old, new))
    assert caught.value.path.name == "tensor00000_000"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"\x8c\x06scales", b"\x8c\x06Scales"),
        (b"\x8c\x06scales", b"h\x05"),
        (b"\x8c\x06scales", b"N"),
        (b"ub.", b"sb."),
        (b"ub.", b"b."),
        (b"ub.", b"u."),
        (b"}\x94(", b"}\x94((("),
    ],
)
def test_malformed_quantized_weight_is_refused(
    tmp_path: Path, quantized_opcodes: bytes, old: bytes, new: bytes
) -> None:
    with pytest.raises(CheckpointError):
        scan_bytes(tmp_path, edited(quantized_opcodes, old, new))


@pytest.mark.parametrize("kind", ["plain_opcodes", "quantized_opcodes"])
def test_truncated_file_is_refused(
    tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    whole = framed(request.getfixturevalue(kind))
    for length in range(len(whole)):
        with pytest.raises(CorruptTensorError):
            scan_bytes(tmp_path, whole[:length])


def test_bytes_after_the_end_are_refused(tmp_path: Path, plain_opcodes: bytes) -> None:
    with pytest.raises(CorruptTensorError, match="1 bytes follow"):
        scan_bytes(tmp_path, framed(plain_opcodes) + b"\0")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY\x01\x00",
        b"\x80",
        b"\x80\x04.",
        b"\x80\x04N.",
        b"\x80\x04\x80\x04N.",
        b"\x80\x04NN.",
        b"\x80\x04(N.",
        b"\x80\x04t.",
        b"\x80\x04\x85.",
        b"\x80\x04\x94.",
        b"\x80\x04K\x01s.",
        b"\x80\x04NNNs.",
        b"\x80\x04}K\x01K\x01s.",
        b"\x80\x04}(K\x01u.",
        b"\x80\x04\x95" + struct.pack("<Q", 99) + b"N.",
        b"\x80\x04\x95" + struct.pack("<Q", 2) + b"K\x01.",
        b"\x80\x04\x95" + struct.pack("<Q", 1) + b"K\x01.",
        b"\x80\x04\x95" + struct.pack("<Q", 12) + b"\x95" + struct.pack("<Q", 1) + b"NN.",
        b"\x80\x04" + b"N" * 200 + b".",
        b"\x80\x04" + b"(" * 200 + b".",
        b"\x80\x04" + b"N\x85" * 2000,
        b"\x80\x04c" + b"a" * 1000,
    ],
)
def test_pickle_that_makes_no_sense_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(CorruptTensorError):
        scan_bytes(tmp_path, data)


NEW_ARRAY = RECONSTRUCT + NDARRAY + b"K\x00\x85C\x01b\x87R"
FLOAT32 = DTYPE + (
    b"\x8c\x02f4\x89\x88\x87R(K\x03\x8c\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
)
SHARED_PARTS = b"hZ"


@pytest.mark.parametrize(
    "use",
    [
        b"",
        SHARED_PARTS + b"R",
        SHARED_PARTS + b"b",
        DTYPE + SHARED_PARTS + b"R",
        DTYPE + SHARED_PARTS + b"\x89\x88\x87R",
        RECONSTRUCT + SHARED_PARTS + b"R",
        QUANTIZED + SHARED_PARTS + b"\x81",
        FLOAT32 + SHARED_PARTS + b"b",
        NEW_ARRAY + SHARED_PARTS + b"b",
        NEW_ARRAY + b"(K\x01" + SHARED_PARTS + FLOAT32 + b"\x89C\x04abcdtb",
        SHARED_PARTS * 2 + b"\x93",
        b"}" + SHARED_PARTS * 2 + b"s",
    ],
)
def test_tuples_that_share_their_parts_are_scanned_quickly(tmp_path: Path, use: bytes) -> None:
    # Each level holds the level before twice: a comparison would visit 2^90 items.
    levels = b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(90))
    with pytest.raises(CheckpointError):
        scan_bytes(tmp_path, b"\x80\x04)q\x00" + levels + use + b".")


def test_path_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "directory").mkdir()
    for name in ("pipe", "loop", "directory", "absent"):
        with pytest.raises(CheckpointError, match=name):
            scan(tmp_path / name)


@contextmanager
def ordinary_user() -> Iterator[None]:
    """Root may read every file, so root becomes another user for a while."""
    user = os.geteuid()
    os.seteuid(NOBODY if user == 0 else user)
    try:
        yield
    finally:
        os.seteuid(user)


def test_forbidden_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("readable", "forbidden"):
        write_plain(tmp_path / name, VALUES)
    (tmp_path / "forbidden").chmod(0)
    # The other user may not enter the folders above, which a relative path does not pass through.
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    with ordinary_user():
        scan(Path("readable"))
        with pytest.raises(CheckpointError, match=r"forbidden.*Permission"):
            scan(Path("forbidden"))


@pytest.mark.parametrize(
    "forbidden",
    [
        "import pickle",
        "from pickle",
        "pickle.load",
        "Unpickler",
        "allow_pickle=True",
        "import dill",
    ],
)
def test_model_never_unpickles(forbidden: str) -> None:
    sources = sorted((REPOSITORY / "model").rglob("*.py"))
    assert sources
    assert [path.name for path in sources if forbidden in path.read_text(encoding="utf-8")] == []
