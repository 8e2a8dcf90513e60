"""Written files equal those of Python's pickler, and the reference can load them."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from milliways.model.checkpoint import (
    Checkpoint,
    QuantizedArray,
    TensorSpec,
    scan,
    write_checkpoint,
    write_plain,
    write_quantized,
)
from milliways.model.checkpoint.records import BFLOAT16, FLOAT32
from milliways.model.checkpoint.writer import _Form, _plain_pieces, _write
from milliways.model.errors import CheckpointError, TensorLayoutError

GOLDEN = Path(__file__).parents[1] / "golden"

# Loads our files as the reference does, with the class defined in __main__, compares them with the
# expected arrays, and pickles them again as numpy 1.26 would. The bytes must be equal.
REFERENCE_LOADER = """
import dataclasses, pathlib, pickle, sys
import ml_dtypes, numpy as np
from numpy._core import multiarray

@dataclasses.dataclass
class QuantizedWeight8bit:
    weight: object
    scales: object

multiarray._reconstruct.__module__ = "numpy.core.multiarray"
folder = pathlib.Path(sys.argv[1])
meant = np.load(folder / "meant.npz")
num_loaded = 0
for path in sorted(folder.glob("tensor*")):
    data = path.read_bytes()
    loaded = pickle.loads(data)
    if isinstance(loaded, QuantizedWeight8bit):
        assert loaded.scales.dtype == ml_dtypes.bfloat16, path
        assert np.array_equal(loaded.weight, meant[path.name + ".weight"]), path
        assert np.array_equal(loaded.scales.view(np.uint16), meant[path.name + ".scales"]), path
    else:
        assert loaded.dtype == np.float32, path
        assert np.array_equal(loaded, meant[path.name]), path
    assert pickle.dumps(loaded, protocol=4) == data, path
    num_loaded += 1
print(num_loaded)
"""

PLAIN_SHAPES = [
    (1,),
    (63,),  # 252 bytes: a short byte string
    (64,),  # 256 bytes: no longer
    (16383,),  # the last payload inside a frame
    (16384,),  # the first one outside
    (255, 2),
    (256, 2),
    (65536, 1),  # a size that needs four bytes
    (2, 3, 4),
]
# Weights and scales: each inside or outside of a frame.
QUANTIZED_SHAPES = [
    ((1, 1), (1, 1)),
    ((4, 6), (2, 6)),
    ((8, 16, 300), (8, 4, 300)),
    ((65, 1000), (1, 1000)),
    ((1, 65535), (1, 65535)),
    ((2, 32768), (1, 32768)),
    ((3, 40000), (3, 40000)),
    ((3, 32000), (1, 32000)),
]
# Sizes with which the frame becomes full at each of the objects between weights and scales.
QUANTIZED_SHAPES += [((1, size), (1, size)) for size in range(65280, 65350, 3)]
QUANTIZED_SHAPES += [((size, 1), (1, 1)) for size in range(65230, 65350, 7)]


def test_reference_loader_reads_our_files_and_would_write_the_same_bytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    meant = {}
    for index, shape in enumerate(PLAIN_SHAPES):
        array = rng.standard_normal(shape, dtype=np.float32)
        write_plain(tmp_path / f"tensor{index}", array)
        meant[f"tensor{index}"] = array
    for index, (shape, scales_shape) in enumerate(QUANTIZED_SHAPES, start=100):
        weight = rng.integers(-127, 128, shape, dtype=np.int8)
        scales = rng.random(scales_shape).astype(BFLOAT16)
        write_quantized(tmp_path / f"tensor{index}", weight, scales)
        meant[f"tensor{index}.weight"] = weight
        meant[f"tensor{index}.scales"] = scales.view(np.uint16)
    np.savez(tmp_path / "meant.npz", **meant)
    # numpy 2 warns of the module name. The release uses it, so we must use it too.
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", REFERENCE_LOADER]
    done = subprocess.run([*command, tmp_path], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.strip() == str(len(PLAIN_SHAPES) + len(QUANTIZED_SHAPES))


@pytest.mark.parametrize("name", ["tiny", "mini8"])
def test_rewritten_checkpoint_has_the_same_bytes(tmp_path: Path, name: str) -> None:
    with Checkpoint.open(GOLDEN / name) as checkpoint:
        num_bytes = write_checkpoint(
            tmp_path / "ckpt-0",
            checkpoint.config,
            lambda spec: (checkpoint.quantized if spec.quantized else checkpoint.plain)(spec),
        )
        assert num_bytes == sum(record.num_file_bytes for record in checkpoint.records)
        for record in checkpoint.records:
            written = tmp_path / "ckpt-0" / record.path.name
            assert written.read_bytes() == record.path.read_bytes(), record.path.name


def test_array_that_is_not_in_c_order_is_written_in_c_order(tmp_path: Path) -> None:
    array = np.arange(35, dtype=np.float32).reshape(5, 7)
    write_plain(tmp_path / "a", array)
    write_plain(tmp_path / "b", np.asfortranarray(array))
    write_plain(tmp_path / "c", np.repeat(array, 2, axis=1)[:, ::2])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() == (tmp_path / "c").read_bytes()


@pytest.mark.parametrize(
    "array",
    [
        np.ones(3),
        np.ones(3, ">f4"),
        np.ones(3, np.int8),
        np.ones(3, BFLOAT16),
        np.float32(1) * np.ones((), np.float32),
        np.ones((0, 3), np.float32),
        np.ones((1, 1, 1, 1), np.float32),
    ],
)
def test_plain_tensor_of_another_dtype_or_rank_is_not_written(
    tmp_path: Path, array: np.ndarray
) -> None:
    with pytest.raises(TensorLayoutError, match="tensor"):
        write_plain(tmp_path / "tensor", np.asarray(array))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("weight", "scales"),
    [
        (np.ones((4, 6), np.uint8), np.ones((1, 6), BFLOAT16)),
        (np.ones((4, 6), np.int8), np.ones((1, 6), np.float32)),
        (np.ones((4, 6), np.int8), np.ones((3, 6), BFLOAT16)),
        (np.ones((4, 6), np.int8), np.ones((1, 5), BFLOAT16)),
        (np.ones((4, 6), np.int8), np.ones((6,), BFLOAT16)),
        (np.ones((6,), np.int8), np.ones((6,), BFLOAT16)),
    ],
)
def test_scales_that_do_not_fit_are_not_written(
    tmp_path: Path, weight: np.ndarray, scales: np.ndarray
) -> None:
    with pytest.raises(TensorLayoutError, match="tensor"):
        write_quantized(tmp_path / "tensor", weight, scales)
    assert list(tmp_path.iterdir()) == []


def test_tensor_that_does_not_fit_its_place_is_not_written(tmp_path: Path) -> None:
    with Checkpoint.open(GOLDEN / "mini8") as checkpoint:
        config = checkpoint.config
    with pytest.raises(TensorLayoutError, match=r"in_out_embed.*\[256, 32\].*got float32 \[3\]"):
        write_checkpoint(tmp_path, config, lambda spec: np.ones(3, np.float32))
    plain = {0: np.ones((256, 32), np.float32), 1: np.ones(32, np.float32)}
    with pytest.raises(TensorLayoutError, match="expected quantised"):
        write_checkpoint(
            tmp_path,
            config,
            lambda spec: plain.get(spec.index, np.ones(spec.shape, np.float32)),
        )


def test_directory_with_tensors_of_a_larger_model_is_refused(tmp_path: Path) -> None:
    with Checkpoint.open(GOLDEN / "mini8") as mini8:
        config = replace(mini8.config, num_layers=1)
        (tmp_path / "tensor00014_000").write_bytes(b"of the second layer")
        with pytest.raises(
            TensorLayoutError, match="tensor00014_000: does not belong to the model"
        ):
            write_checkpoint(
                tmp_path,
                config,
                lambda spec: (mini8.quantized if spec.quantized else mini8.plain)(spec.name),
            )
    assert os.listdir(tmp_path) == ["tensor00014_000"]


def test_cut_off_writer_leaves_no_file_and_the_old_one_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tensor"
    write_plain(path, np.zeros(3, np.float32))
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("milliways.model.checkpoint.writer._write_piece", fail)
    with pytest.raises(CheckpointError, match="tensor: cannot be written: No space left"):
        write_plain(path, np.ones(3, np.float32))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["tensor"]


def test_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_plain(tmp_path / "file" / "tensor", np.ones(3, np.float32))
    with Checkpoint.open(GOLDEN / "tiny") as tiny, pytest.raises(CheckpointError, match="written"):
        write_checkpoint(tmp_path / "file", tiny.config, tiny.plain)


def test_payload_over_four_gibibytes_gets_a_long_length(tmp_path: Path) -> None:
    path = tmp_path / "tensor"
    form = _Form(FLOAT32, (1 << 17, 1 << 14))
    assert _write(path, _plain_pieces(form), None) > 1 << 33
    record = scan(path)
    assert not isinstance(record, QuantizedArray)
    assert record.array.num_bytes == 1 << 33
    assert path.stat().st_blocks * 512 < 1 << 20


def test_tensors_are_asked_for_in_the_order_of_the_files(tmp_path: Path) -> None:
    given: list[TensorSpec] = []
    with Checkpoint.open(GOLDEN / "tiny") as tiny:

        def record_spec(spec: TensorSpec) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
            given.append(spec)
            return tiny.quantized(spec) if spec.quantized else tiny.plain(spec)

        write_checkpoint(tmp_path, tiny.config, record_spec)
        assert tuple(given) == tiny.specs
