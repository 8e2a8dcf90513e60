"""Reads a released checkpoint in place: arrays are views of mapped files.

1. `Checkpoint.open` finds the configuration, scans every tensor file (a few hundred bytes of each),
   and compares names, shapes and dtypes with the layout. `Checkpoint.open_lazily` scans each file
   when it is asked for, so that a process needs only the files of which it holds a part.
2. `plain`, `quantized` and `expert` map a file on its first use, and return read-only views. The
   kernel reads the bytes when they are used. `bytes_read` counts the bytes of returned views.
3. `close` releases the maps. A view that was returned before keeps its own map alive.

It does not compute, copy or convert.
"""

import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
from jaxtyping import BFloat16, Float32, Int8

from milliways.model.checkpoint.byte_window import open_regular
from milliways.model.checkpoint.file_map import FileMap
from milliways.model.checkpoint.layout import (
    LAYER_ROLES,
    NUM_SHARED_TENSORS,
    TENSOR_PREFIX,
    TensorRole,
    TensorSpec,
    check_tensor,
    tensor_specs,
)
from milliways.model.checkpoint.pickle_scan import scan
from milliways.model.checkpoint.records import (
    BFLOAT16,
    FLOAT32,
    ArrayRecord,
    PlainArray,
    QuantizedArray,
    TensorRecord,
)
from milliways.model.config import CONFIG_FILE, ModelConfig, load_config
from milliways.model.errors import (
    CheckpointError,
    CorruptTensorError,
    TensorLayoutError,
    TensorValueError,
)

CHECKPOINT_DIR = "ckpt-0"
_VERIFY_CHUNK_BYTES = 4 * 1024 * 1024


class Checkpoint:
    """A released checkpoint. `Checkpoint.open` opens one. Several threads may read from it.

    Invariant: `_records[i]` describes the tensor of `specs[i]`, and fits it.

    Invariant: `_maps` has the maps in use, by index of the tensor. It is empty after `close`.

    Invariant: a thread that changes `_records`, `_maps`, `_bytes_read` or `_closed` holds `_lock`.
    """

    def __init__(self, ckpt_dir: Path, config: ModelConfig, hint: str = "") -> None:
        self.ckpt_dir = ckpt_dir
        self.config = config
        self.specs = specs = tensor_specs(config)
        # What to add to an error about the layout.
        self._hint = hint
        self._records: dict[int, TensorRecord] = {}
        self._by_name = MappingProxyType({spec.name: spec for spec in specs})
        self._by_role = MappingProxyType({(spec.role, spec.layer): spec for spec in specs})
        self._lock = threading.Lock()
        self._maps: dict[int, FileMap] = {}
        self._bytes_read = 0
        self._closed = False

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """Opens a model directory, or its ckpt-0 directly. It reads no payload.

        Raises:
            ModelConfigError: config.json is invalid.
            UnsafePickleError, CorruptTensorError: a file is not a tensor file.
            TensorLayoutError: a tensor is missing or extra, or has another shape or dtype.
            CheckpointError: a directory or file cannot be read.
        """
        checkpoint = cls.open_lazily(path)
        _check_files(checkpoint.ckpt_dir, checkpoint.specs, checkpoint._hint)
        for spec in checkpoint.specs:
            checkpoint.record(spec)
        return checkpoint

    @classmethod
    def open_lazily(cls, path: Path) -> "Checkpoint":
        """Opens a model directory; each tensor file is scanned when it is first asked for.

        Raises:
            ModelConfigError: config.json is invalid.
            CheckpointError: there is no such directory.
        """
        ckpt_dir, config_dir = find_directories(path)
        config = load_config(config_dir)
        has_config = (config_dir / CONFIG_FILE).is_file()
        return cls(ckpt_dir, config, "" if has_config else missing_config_hint(config_dir))

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Releases all maps. Arrays that were returned before stay valid: they keep their maps."""
        with self._lock:
            self._maps.clear()
            self._closed = True

    def release_maps(self) -> None:
        """Releases the maps that no array needs. Later requests map the files again.

        The pages of a map count as memory of this process. So code that copies a model should
        release the maps as it proceeds. Otherwise the process needs twice the size of the model.
        """
        with self._lock:
            self._maps.clear()

    @property
    def records(self) -> tuple[TensorRecord, ...]:
        """The places of the arrays of every tensor, in the order of `specs`."""
        return tuple(self.record(spec) for spec in self.specs)

    def record(self, spec: TensorSpec) -> TensorRecord:
        """The places of a tensor's arrays. Its file is scanned if it was not yet.

        Raises:
            CheckpointError: the file cannot be read, or is not that of this tensor.
        """
        with self._lock:
            if spec.index not in self._records:
                self._records[spec.index] = _scan_tensor(self.ckpt_dir, spec, self._hint)
            return self._records[spec.index]

    def forget(self, spec: TensorSpec) -> None:
        """Scans and maps the file of a tensor again when it is next asked for."""
        with self._lock:
            self._records.pop(spec.index, None)
            self._maps.pop(spec.index, None)

    @property
    def bytes_read(self) -> int:
        """The bytes of all views returned so far. Bytes that are returned twice count twice."""
        return self._bytes_read

    @property
    def bytes_scanned(self) -> int:
        """The bytes that the scans read so far."""
        return sum(record.num_scanned_bytes for record in self._records.values())

    def find(self, role: TensorRole, layer: int | None = None) -> TensorSpec:
        """The tensor of a role. All roles but the embedding and the final norm need a `layer`."""
        return self._by_role[role, layer]

    def plain(self, tensor: str | TensorSpec) -> Float32[np.ndarray, "..."]:
        """A whole float32 tensor."""
        spec = self._spec(tensor)
        record = self.record(spec)
        assert isinstance(record, PlainArray), f"{spec.name} is quantised"
        return self._hand_out(self._map(spec), record.array)

    def quantized(
        self, tensor: str | TensorSpec
    ) -> tuple[Int8[np.ndarray, "... K N"], BFloat16[np.ndarray, "... G N"]]:
        """The whole weights and scales of a tensor; those of all experts if it has experts."""
        spec, record = self._quantized_record(tensor)
        file_map = self._map(spec)
        file_map.expect_all()
        return self._hand_out(file_map, record.weight), self._hand_out(file_map, record.scales)

    def expect(self, layer: int, role: TensorRole, expert_ids: Sequence[int]) -> None:
        """Tells the kernel to read these experts in the background."""
        spec, record = self._quantized_record(self.find(role, layer))
        file_map = self._map(spec)
        for array in (record.weight, record.scales):
            for expert_id in expert_ids:
                one = slice_of(array, expert_id)
                file_map.fetch(one.offset, one.num_bytes)

    def expert(
        self, layer: int, role: TensorRole, expert_id: int, *, stays_mapped: bool = False
    ) -> tuple[Int8[np.ndarray, "K N"], BFloat16[np.ndarray, "G N"]]:
        """The weights and scales of one expert of one layer. No other bytes are read.

        The kernel begins to read them now; with `stays_mapped`, it reads them when they are used.
        """
        assert role.is_expert and 0 <= expert_id < self.config.num_experts
        spec, record = self._quantized_record(self.find(role, layer))
        file_map = self._map(spec)
        arrays = (record.weight, record.scales)
        slices = [slice_of(array, expert_id) for array in arrays]
        if not stays_mapped:
            for one in slices:
                file_map.fetch(one.offset, one.num_bytes)
        weight, scales = (self._hand_out(file_map, one) for one in slices)
        return weight, scales

    def verify(self) -> int:
        """Reads every byte of every array, in chunks; returns their number.

        Raises:
            TensorValueError: a float is NaN or infinite, or a scale is not above 0.
            CheckpointError: a file cannot be read.
        """
        return sum(_verify_tensor(record) for record in self.records)

    def _spec(self, tensor: str | TensorSpec) -> TensorSpec:
        return self._by_name[tensor] if isinstance(tensor, str) else tensor

    def _quantized_record(self, tensor: str | TensorSpec) -> tuple[TensorSpec, QuantizedArray]:
        spec = self._spec(tensor)
        record = self.record(spec)
        assert isinstance(record, QuantizedArray), f"{spec.name} is not quantised"
        return spec, record

    def _map(self, spec: TensorSpec) -> FileMap:
        record = self.record(spec)
        with self._lock:
            assert not self._closed, "the checkpoint is closed"
            if spec.index not in self._maps:
                file_map = FileMap(record.path, record.num_file_bytes)
                if spec.role.is_expert:
                    file_map.expect_slices()
                self._maps[spec.index] = file_map
            return self._maps[spec.index]

    def _hand_out(self, file_map: FileMap, record: ArrayRecord) -> np.ndarray:
        with self._lock:
            self._bytes_read += record.num_bytes
        return file_map.view(record.dtype, record.shape, record.offset)


def slice_of(record: ArrayRecord, expert_id: int) -> ArrayRecord:
    """The place of one expert of a stack."""
    num_bytes = record.num_bytes // record.shape[0]
    offset = record.offset + expert_id * num_bytes
    return ArrayRecord(record.dtype, record.shape[1:], offset, num_bytes)


def missing_config_hint(config_dir: Path) -> str:
    """What to add to an error about the layout of a model without a configuration."""
    return f" (no {CONFIG_FILE} in {config_dir}, so Grok-1's sizes are expected)"


def find_directories(path: Path) -> tuple[Path, Path]:
    """The directory of the tensors, and that of the configuration and the model's other files.

    A path without `ckpt-0` is the directory of the tensors, whatever its name. The other files are
    in it if config.json is, otherwise beside it.
    """
    # Links are not resolved: if ckpt-0 is a link, config.json is beside the link.
    path = Path(os.path.abspath(path))
    if not path.is_dir():
        raise CheckpointError(path, "is not a directory")
    if (path / CHECKPOINT_DIR).is_dir():
        return path / CHECKPOINT_DIR, path
    return path, path if (path / CONFIG_FILE).is_file() else path.parent


def _check_files(ckpt_dir: Path, specs: tuple[TensorSpec, ...], hint: str) -> None:
    try:
        found = {name for name in os.listdir(ckpt_dir) if name.startswith(TENSOR_PREFIX)}
    except OSError as error:
        raise CheckpointError(ckpt_dir, f"cannot be listed: {error.strerror}") from error
    expected = {spec.file_name for spec in specs}
    if found == expected:
        return
    if not found:
        raise TensorLayoutError(ckpt_dir, f"holds no {TENSOR_PREFIX}* file")
    if missing := expected - found:
        name, problem = min(missing), "is missing"
    else:
        name, problem = min(found - expected), "does not belong to the model"
    counts = f"expected {len(expected)} tensor files, found {len(found)}"
    raise TensorLayoutError(ckpt_dir / name, f"{problem}: {counts}{_layers_of(found)}{hint}")


def _layers_of(found: set[str]) -> str:
    """Says for which number of layers the number of files would be right, if there is one."""
    num_layers, rest = divmod(len(found) - NUM_SHARED_TENSORS, len(LAYER_ROLES))
    return f", which is right for {num_layers} layers" if num_layers > 0 and not rest else ""


def _scan_tensor(ckpt_dir: Path, spec: TensorSpec, hint: str) -> TensorRecord:
    record = scan(ckpt_dir / spec.file_name)
    check_tensor(spec, record, hint)
    return record


def _verify_tensor(record: TensorRecord) -> int:
    # Read, not mapped: a disk failure then raises an error instead of killing the process.
    with open_regular(record.path) as (fd, _):
        for array in record.arrays:
            for chunk in _chunks(record.path, fd, array):
                _verify_values(record.path, chunk)
    return sum(array.num_bytes for array in record.arrays)


def _chunks(path: Path, fd: int, array: ArrayRecord) -> Iterator[np.ndarray]:
    position, end = array.offset, array.offset + array.num_bytes
    while position < end:
        num_bytes = min(_VERIFY_CHUNK_BYTES, end - position)
        try:
            chunk = os.pread(fd, num_bytes, position)
        except OSError as error:
            raise CheckpointError(path, f"cannot be read: {error.strerror}") from error
        usable = len(chunk) - len(chunk) % array.dtype.itemsize
        if not usable:
            raise CorruptTensorError(path, f"was truncated at byte {position} after it was scanned")
        yield np.frombuffer(chunk[:usable], dtype=array.dtype)
        position += usable


def _verify_values(path: Path, values: np.ndarray) -> None:
    """Checks float32 (a plain tensor) and bfloat16 (scales). Every value of int8 is valid."""
    if values.dtype == FLOAT32 and not np.isfinite(values).all():
        raise TensorValueError(path, "holds a value that is NaN or infinite")
    if values.dtype == BFLOAT16:
        scales = values.astype(np.float32)
        if not (np.isfinite(scales) & (scales > 0)).all():
            raise TensorValueError(path, "holds a scale that is NaN, infinite or not above 0")
