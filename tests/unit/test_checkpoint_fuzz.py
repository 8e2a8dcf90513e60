"""With any bytes in a file, the scan ends with a record or with a CheckpointError."""

import os
import pickle
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from milliways.model.checkpoint import PlainArray, QuantizedArray, scan
from milliways.model.checkpoint.opcodes import Op
from milliways.model.errors import CheckpointError

MINI8 = Path(__file__).parents[1] / "golden" / "mini8" / "ckpt-0"
# Small files only: a plain vector, a plain matrix, quantised matrices of two and three dimensions.
SEEDS = tuple((MINI8 / f"tensor{index:05d}_000").read_bytes() for index in (1, 13, 5, 6, 2))
FUZZ = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# Edits are made near the opcodes; an edit inside a payload changes nothing.
POSITIONS = st.one_of(st.integers(0, 300), st.integers(-300, -1), st.integers(0, 20_000))
GLOBALS = (
    b"\x8c\x15numpy.core.multiarray\x8c\x0c_reconstruct\x93",
    b"\x8c\x05numpy\x8c\x07ndarray\x93",
    b"\x8c\x05numpy\x8c\x05dtype\x93",
    b"\x8c\x09ml_dtypes\x8c\x08bfloat16\x93",
    b"\x8c\x08__main__\x8c\x13QuantizedWeight8bit\x93",
    b"cnumpy\ndtype\n",
)
# Parts of a released file, so that random sequences of them pass the first check.
FRAGMENTS = st.one_of(
    st.sampled_from([bytes([op]) for op in Op]),
    st.sampled_from(GLOBALS),
    st.sampled_from(
        [
            b"\x8c\x02f4",
            b"\x8c\x02i1",
            b"\x8c\x01<",
            b"\x8c\x01|",
            b"\x8c\x06weight",
            b"\x8c\x06scales",
        ]
    ),
    st.sampled_from(
        [
            b"K\x00\x85C\x01b\x87R",
            b"\x89\x88\x87R",
            b"(K\x03\x8c\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb",
            b"(K\x01K\x01\x85",
            b"\x89C\x04abcdtb",
        ]
    ),
    st.binary(min_size=1, max_size=9),
    st.builds(lambda index: b"h%c" % index, st.integers(0, 20)),
    st.builds(lambda size: b"B" + size.to_bytes(4, "little"), st.integers(0, 2**32 - 1)),
    st.builds(lambda size: b"\x8e" + size.to_bytes(8, "little"), st.integers(0, 2**64 - 1)),
    st.builds(lambda size: b"\x95" + size.to_bytes(8, "little"), st.integers(0, 2**64 - 1)),
    st.builds(lambda value: b"J" + value.to_bytes(4, "little"), st.integers(0, 2**32 - 1)),
)


def scan_bytes(path: Path, data: bytes) -> PlainArray | QuantizedArray:
    # A new file each time: some file systems flush one that is overwritten to disk at once.
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    return scan(path)


def check(path: Path, data: bytes) -> None:
    try:
        record = scan_bytes(path, data)
    except CheckpointError as error:
        assert error.path == path
        assert len(str(error)) < 1000 + len(str(path))
        return
    assert isinstance(record, PlainArray | QuantizedArray)
    for array in record.arrays:
        assert 0 <= array.offset <= array.offset + array.num_bytes <= len(data)


@FUZZ
@given(data=st.binary(max_size=600), header=st.sampled_from([b"", b"\x80\x04", b"\x80\x03"]))
def test_random_bytes_never_escape_the_error_tree(
    tmp_path: Path, data: bytes, header: bytes
) -> None:
    check(tmp_path / "tensor", header + data)


@FUZZ
@given(fragments=st.lists(FRAGMENTS, max_size=60))
def test_random_opcodes_never_escape_the_error_tree(tmp_path: Path, fragments: list[bytes]) -> None:
    check(tmp_path / "tensor", b"\x80\x04" + b"".join(fragments) + b".")


@FUZZ
@given(
    seed=st.sampled_from(SEEDS),
    edits=st.lists(st.tuples(POSITIONS, st.integers(0, 255)), min_size=1, max_size=6),
)
def test_flipped_bytes_never_escape_the_error_tree(
    tmp_path: Path, seed: bytes, edits: list[tuple[int, int]]
) -> None:
    data = bytearray(seed)
    for position, value in edits:
        data[position % len(data)] = value
    check(tmp_path / "tensor", bytes(data))


@FUZZ
@given(
    head=st.sampled_from(SEEDS),
    tail=st.sampled_from(SEEDS),
    cut=POSITIONS,
    resume=POSITIONS,
    between=st.lists(FRAGMENTS, max_size=3),
)
def test_spliced_files_never_escape_the_error_tree(
    tmp_path: Path, head: bytes, tail: bytes, cut: int, resume: int, between: list[bytes]
) -> None:
    check(
        tmp_path / "tensor",
        head[: cut % len(head)] + b"".join(between) + tail[resume % len(tail) :],
    )


@FUZZ
@given(seed=st.sampled_from(SEEDS), length=POSITIONS)
def test_truncated_files_are_always_refused(tmp_path: Path, seed: bytes, length: int) -> None:
    with pytest.raises(CheckpointError):
        scan_bytes(tmp_path / "tensor", seed[: length % len(seed)])


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


@FUZZ
@given(seed=st.sampled_from(SEEDS), position=POSITIONS, protocol=st.integers(2, 4))
def test_attack_hidden_anywhere_in_a_tensor_is_not_executed(
    tmp_path: Path, seed: bytes, position: int, protocol: int
) -> None:
    canary = tmp_path / "canary"
    attack = pickle.dumps(Touch(str(canary)), protocol=protocol)[2:-1]
    at = position % len(seed)
    check(tmp_path / "tensor", seed[:at] + attack + seed[at:])
    assert not canary.exists()
