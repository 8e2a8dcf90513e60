"""Reads tensors into memory of our own, and knows them by their bytes.

    tensors = CheckedTensors(Checkpoint.open_lazily(model_dir), wanted=manifest)
    weight, scales = tensors.expert(0, TensorRole.EXPERT_LINEAR, 3)
    tensors.found            # the digests of all parts that were handed out

The digest of a part is computed from the same copy of the bytes that is handed out, while they are
in the processor's cache: there is no second read, and a file that changes meanwhile changes
nothing. A view of a mapped file could not promise that. Besides, a disk that fails, or a file that
is cut short, would kill the process that touches the view; here it is an error.

A part whose digest differs from the wanted one is not handed out.
"""

import os
import stat
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import xxhash

from milliways.model.checkpoint.byte_window import open_regular
from milliways.model.checkpoint.layout import TensorRole, TensorSpec
from milliways.model.checkpoint.reader import Checkpoint, slice_of
from milliways.model.checkpoint.records import (
    ArrayRecord,
    PlainArray,
    QuantizedArray,
    TensorRecord,
    describe_array,
)
from milliways.model.config import ModelConfig
from milliways.model.errors import (
    ChangeableFileError,
    CheckpointError,
    CorruptTensorError,
    OtherModelError,
)
from milliways.model.manifest import EMPTY_MANIFEST, Manifest

# The arrays of a part from somewhere else than its file; empty if nobody has them.
Elsewhere = Callable[[TensorSpec, int | None], list[np.ndarray]]

# The arrays of a part, and their digest.
Part = tuple[list[np.ndarray], str]

# Small enough for the processor's second cache: a piece is digested while it is there.
_PIECE_BYTES = 512 * 1024
_WRITABLE = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH


def part_name(spec: TensorSpec, expert_id: int | None = None) -> str:
    """The name of a tensor, or of one expert of it, in a manifest."""
    return spec.name if expert_id is None else f"{spec.name}[{expert_id}]"


class CheckedTensors:
    """A `TensorSource` that checks what it hands out. Several threads may use it.

    `wanted` may have digests of some parts, of all or of none; it may be replaced between calls.
    `elsewhere` is asked for a part that cannot be read from its file, if its digest is wanted.

    Invariant: `found` has the digest of each part that was handed out, and of no other one. A
    thread that changes `_found` or `_bytes_read` holds `_lock`.

    Invariant: `_coming` has the experts that were expected and are not read yet; `_ahead` is the
    one before them, which is being read. Only the thread that asks for experts uses both.
    """

    def __init__(self, checkpoint: Checkpoint, wanted: Manifest = EMPTY_MANIFEST) -> None:
        self.wanted = wanted
        self.elsewhere: Elsewhere | None = None
        # What was wrong with the files of parts that came from elsewhere.
        self.faults: list[str] = []
        self._checkpoint = checkpoint
        self._lock = threading.Lock()
        # Reads the next expert while the last one is packed.
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="reads-weights")
        self._coming: deque[tuple[TensorSpec, int]] = deque()
        self._ahead: tuple[TensorSpec, int, Future[Part]] | None = None
        self._found: dict[str, str] = {}
        self._bytes_read = 0

    @property
    def config(self) -> ModelConfig:
        return self._checkpoint.config

    @property
    def found(self) -> Manifest:
        with self._lock:
            return Manifest(dict(self._found))

    @property
    def bytes_read(self) -> int:
        """The bytes read so far, without those of headers. What is read twice counts twice."""
        return self._bytes_read

    def find(self, role: TensorRole, layer: int | None = None) -> TensorSpec:
        return self._checkpoint.find(role, layer)

    def plain(self, tensor: TensorSpec) -> np.ndarray:
        def read(record: TensorRecord) -> Part:
            assert isinstance(record, PlainArray), f"{tensor.name} is quantised"
            return self._read(tensor, part_name(tensor), record, [record.array])

        (array,) = self._or_elsewhere(tensor, None, lambda: self._from_file(tensor, read))
        return array

    def quantized(self, tensor: TensorSpec) -> tuple[np.ndarray, np.ndarray]:
        def read(record: TensorRecord) -> Part:
            assert isinstance(record, QuantizedArray), f"{tensor.name} is not quantised"
            return self._read(tensor, part_name(tensor), record, [record.weight, record.scales])

        weight, scales = self._or_elsewhere(tensor, None, lambda: self._from_file(tensor, read))
        return weight, scales

    def expect(self, layer: int, role: TensorRole, expert_ids: Sequence[int]) -> None:
        spec = self.find(role, layer)
        # Only advice. What is wrong with the file is said when it is read.
        with suppress(CheckpointError):
            self._advise(self._checkpoint.record(spec), expert_ids)
        self._coming = deque((spec, expert_id) for expert_id in expert_ids)
        self._ahead = None
        self._read_ahead()

    def _advise(self, record: TensorRecord, expert_ids: Sequence[int]) -> None:
        with open_regular(record.path) as (fd, _):
            for array in record.arrays:
                for expert_id in expert_ids:
                    one = slice_of(array, expert_id)
                    os.posix_fadvise(fd, one.offset, one.num_bytes, os.POSIX_FADV_WILLNEED)

    def expert(
        self, layer: int, role: TensorRole, expert_id: int, *, stays_mapped: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """One expert; see `TensorSource`.

        Raises:
            ChangeableFileError: it is to stay mapped, and somebody may write the file.
        """
        spec = self.find(role, layer)
        if stays_mapped:
            check_unchangeable(self._checkpoint.record(spec).path)
            arrays, digest = self._read_expert(spec, expert_id)
            self._note(part_name(spec, expert_id), digest, arrays)
            return self._checkpoint.expert(layer, role, expert_id, stays_mapped=True)
        ahead, self._ahead = self._ahead, None
        self._read_ahead()
        if ahead is not None and ahead[:2] == (spec, expert_id):
            weight, scales = self._or_elsewhere(spec, expert_id, ahead[2].result)
        else:
            weight, scales = self._or_elsewhere(
                spec, expert_id, lambda: self._read_expert(spec, expert_id)
            )
        return weight, scales

    def _read_ahead(self) -> None:
        """Begins to read the next expert that is expected."""
        if self._coming:
            spec, expert_id = self._coming.popleft()
            reading = self._reader.submit(self._read_expert, spec, expert_id)
            self._ahead = (spec, expert_id, reading)

    def _read_expert(self, spec: TensorSpec, expert_id: int) -> Part:
        def read(record: TensorRecord) -> Part:
            assert isinstance(record, QuantizedArray), f"{spec.name} is not quantised"
            places = [slice_of(array, expert_id) for array in (record.weight, record.scales)]
            return self._read(spec, part_name(spec, expert_id), record, places)

        return self._from_file(spec, read)

    def release_maps(self) -> None:
        self._checkpoint.release_maps()

    def _or_elsewhere(
        self, spec: TensorSpec, expert_id: int | None, read: Callable[[], Part]
    ) -> list[np.ndarray]:
        """The arrays of a part. If nobody else has them either, the file's error is raised."""
        part = part_name(spec, expert_id)
        try:
            arrays, digest = read()
            self._note(part, digest, arrays)
            return arrays
        except CheckpointError as error:
            wanted = self.wanted.digests.get(part)
            if wanted is None or self.elsewhere is None:
                raise
            arrays = self.elsewhere(spec, expert_id)
            if not arrays or digest_of(arrays) != wanted:
                raise
            self._note(part, wanted, arrays)
            self.faults.append(str(error))
            return arrays

    def _from_file(self, spec: TensorSpec, read: Callable[[TensorRecord], Part]) -> Part:
        """Reads from the places that the scan found. After an error, the next call scans again."""
        try:
            return read(self._checkpoint.record(spec))
        except CheckpointError:
            # The file may be another one by the next time.
            self._checkpoint.forget(spec)
            raise

    def _read(
        self, spec: TensorSpec, part: str, record: TensorRecord, places: Sequence[ArrayRecord]
    ) -> Part:
        """Copies of arrays of a file, whose digest is as wanted."""
        hasher = xxhash.xxh3_128()
        with open_regular(record.path) as (fd, num_bytes):
            if num_bytes != record.num_file_bytes:
                was = f"had {record.num_file_bytes} bytes when it was scanned"
                raise CorruptTensorError(record.path, f"{was}, now {num_bytes}")
            arrays = [_read_array(record.path, fd, place, hasher.update) for place in places]
        digest = hasher.hexdigest()
        wanted = self.wanted.digests.get(part, digest)
        if digest != wanted:
            raise OtherModelError(record.path, part, digest, wanted)
        return arrays, digest

    def _note(self, part: str, digest: str, arrays: Sequence[np.ndarray]) -> None:
        """A part is handed out. One that was only read ahead is not noted."""
        with self._lock:
            self._found[part] = digest
            self._bytes_read += sum(array.nbytes for array in arrays)

    def close(self) -> None:
        """Ends the thread that reads ahead."""
        self._coming.clear()
        self._reader.shutdown()


def digest_of(arrays: Sequence[np.ndarray]) -> str:
    """The digest of a part, from its arrays in the order of its file."""
    hasher = xxhash.xxh3_128()
    for array in arrays:
        hasher.update(describe_array(array.dtype, array.shape).encode())
        hasher.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return hasher.hexdigest()


def digest_model(checkpoint: Checkpoint) -> Manifest:
    """The digests of all tensors of a checkpoint: reads every byte, and keeps none.

    Raises:
        CheckpointError: a file cannot be read.
    """
    tensors = CheckedTensors(checkpoint)
    for spec in checkpoint.specs:
        if not spec.role.is_expert:
            _ = tensors.quantized(spec) if spec.quantized else tensors.plain(spec)
            continue
        assert spec.layer is not None
        for expert_id in range(checkpoint.config.num_experts):
            tensors.expert(spec.layer, spec.role, expert_id)
    return tensors.found


def part_names(checkpoint: Checkpoint) -> list[str]:
    """The names of all parts of a model's tensors."""
    experts = range(checkpoint.config.num_experts)
    return [
        name
        for spec in checkpoint.specs
        for name in (
            [part_name(spec, expert_id) for expert_id in experts]
            if spec.role.is_expert
            else [part_name(spec)]
        )
    ]


def _read_array(
    path: Path, fd: int, place: ArrayRecord, digest: Callable[[memoryview], None]
) -> np.ndarray:
    digest(memoryview(place.describe().encode()))
    array = np.empty(place.shape, place.dtype)
    into = memoryview(array.reshape(-1).view(np.uint8).data)
    done = 0
    while done < place.num_bytes:
        piece = into[done : done + _PIECE_BYTES]
        try:
            num_bytes = os.preadv(fd, [piece], place.offset + done)
        except OSError as error:
            at = place.offset + done
            raise CheckpointError(path, f"cannot be read at byte {at}: {error.strerror}") from error
        if not num_bytes:
            raise CorruptTensorError(path, f"was cut short at byte {place.offset + done}")
        digest(piece[:num_bytes])
        done += num_bytes
    return array


def check_unchangeable(path: Path) -> None:
    """Checks that nobody can write a file while it is mapped.

    Raises:
        ChangeableFileError: it has a write permission, and its file system is writable.
        CheckpointError: it cannot be examined.
    """
    try:
        is_writable = path.stat().st_mode & _WRITABLE
        is_read_only = os.statvfs(path).f_flag & os.ST_RDONLY
    except OSError as error:
        raise CheckpointError(path, f"cannot be examined: {error.strerror}") from error
    if is_writable and not is_read_only:
        raise ChangeableFileError(
            path,
            "stays mapped while it is served, but it may be written, which would change tokens:"
            " take all write permissions away (chmod a-w), mount it read-only, or load experts"
            " into memory",
        )
