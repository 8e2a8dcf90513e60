"""Reading checkpoints in place: the views, the counted bytes, and what is refused."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from milliways.model.checkpoint import (
    Checkpoint,
    TensorRole,
    write_checkpoint,
    write_plain,
    write_quantized,
)
from milliways.model.checkpoint.records import BFLOAT16
from milliways.model.errors import (
    CheckpointError,
    CorruptTensorError,
    ModelConfigError,
    TensorLayoutError,
    TensorValueError,
    UnsafePickleError,
)

GOLDEN = Path(__file__).parents[1] / "golden"
TINY, MINI8 = GOLDEN / "tiny", GOLDEN / "mini8"


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A copy of the first two layers of mini8, for tests to damage."""
    model_dir = tmp_path / "model"
    with Checkpoint.open(MINI8) as mini8:
        config = replace(mini8.config, num_layers=2)
        write_checkpoint(
            model_dir / "ckpt-0",
            config,
            lambda spec: (mini8.quantized if spec.quantized else mini8.plain)(spec.name),
        )
    (model_dir / "config.json").write_text(json.dumps(asdict(config)), encoding="utf-8")
    return model_dir


def raw_values(path: Path, record, dtype: np.dtype) -> np.ndarray:
    data = path.read_bytes()[record.offset : record.offset + record.num_bytes]
    return np.frombuffer(data, dtype).reshape(record.shape)


@pytest.mark.parametrize("path", [MINI8, MINI8 / "ckpt-0"])
def test_model_directory_and_its_checkpoint_open_alike(path: Path) -> None:
    with Checkpoint.open(path) as checkpoint:
        assert checkpoint.config.num_layers == 12
        assert checkpoint.ckpt_dir == MINI8 / "ckpt-0"
        assert len(checkpoint.specs) == 146


def test_relative_checkpoint_path_finds_its_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(MINI8 / "ckpt-0")
    with Checkpoint.open(Path()) as checkpoint:
        assert checkpoint.config.num_layers == 12


def test_linked_checkpoint_keeps_the_config_beside_the_link(tmp_path: Path) -> None:
    (tmp_path / "ckpt-0").symlink_to(TINY / "ckpt-0")
    shutil.copyfile(TINY / "config.json", tmp_path / "config.json")
    with Checkpoint.open(tmp_path / "ckpt-0") as checkpoint:
        assert checkpoint.config.num_layers == 3


def test_views_are_the_bytes_of_the_files() -> None:
    with Checkpoint.open(MINI8) as checkpoint:
        for spec in checkpoint.specs:
            record = checkpoint.records[spec.index]
            if spec.quantized:
                weight, scales = checkpoint.quantized(spec)
                assert np.array_equal(weight, raw_values(record.path, record.weight, np.int8))
                expected = raw_values(record.path, record.scales, np.uint16)
                assert np.array_equal(scales.view(np.uint16), expected)
            else:
                array = checkpoint.plain(spec.name)
                assert np.array_equal(array, raw_values(record.path, record.array, np.float32))


def test_bfloat16_scales_compute_although_they_are_not_aligned() -> None:
    with Checkpoint.open(TINY) as checkpoint:
        _, scales = checkpoint.quantized("transformer/decoder_layer_0/moe/linear/w")
        assert scales.dtype == BFLOAT16
        bits = np.ascontiguousarray(scales).view(np.uint16).astype(np.uint32) << 16
        assert np.array_equal(scales.astype(np.float32), bits.view(np.float32))


def test_views_are_read_only_and_not_copies() -> None:
    with Checkpoint.open(TINY) as checkpoint:
        embedding = checkpoint.plain(checkpoint.find(TensorRole.EMBEDDING))
        assert not embedding.flags.writeable and not embedding.flags.owndata
        again = checkpoint.plain("language_model/in_out_embed/embeddings")
        assert np.shares_memory(embedding, again)


def test_one_expert_is_a_slice_of_the_whole() -> None:
    with Checkpoint.open(MINI8) as checkpoint:
        spec = checkpoint.find(TensorRole.EXPERT_LINEAR_1, layer=10)
        assert spec.name == "transformer/decoder_layer_10/moe/linear_1/w"
        weight, scales = checkpoint.quantized(spec)
        for expert_id in range(8):
            one, its_scales = checkpoint.expert(10, TensorRole.EXPERT_LINEAR_1, expert_id)
            assert one.shape == (48, 32) and its_scales.shape == (8, 32)
            assert np.array_equal(one, weight[expert_id])
            assert np.array_equal(its_scales, scales[expert_id])


def test_bytes_read_counts_the_returned_views_only() -> None:
    with Checkpoint.open(TINY) as checkpoint:
        assert checkpoint.bytes_read == 0
        checkpoint.expert(2, TensorRole.EXPERT_LINEAR, 7)
        assert checkpoint.bytes_read == 128 * 688 + 2 * 688
        checkpoint.plain(checkpoint.find(TensorRole.FINAL_NORM))
        assert checkpoint.bytes_read == 128 * 688 + 2 * 688 + 4 * 128


def test_opening_reads_a_small_part_of_the_files() -> None:
    with Checkpoint.open(TINY) as checkpoint:
        assert checkpoint.bytes_scanned < 38 * 2048


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_maps_hold_no_file_descriptors() -> None:
    num_open = len(os.listdir("/proc/self/fd"))
    with Checkpoint.open(MINI8) as checkpoint:
        views = [checkpoint.quantized(spec) for spec in checkpoint.specs if spec.quantized]
        assert len(views) == 7 * 12
        assert len(os.listdir("/proc/self/fd")) == num_open


def num_maps_of(path: Path) -> int:
    return Path("/proc/self/maps").read_text(encoding="utf-8").count(str(path))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_file_is_mapped_on_first_use_and_unmapped_with_its_last_view(model_dir: Path) -> None:
    checkpoint = Checkpoint.open(model_dir)
    path = checkpoint.records[1].path
    assert num_maps_of(path) == 0
    norm = checkpoint.plain("language_model/rms_norm/scale")
    row = norm[3:5]
    checkpoint.close()
    del norm
    assert num_maps_of(path) == 1
    assert np.isfinite(row).all()
    del row
    assert num_maps_of(path) == 0


def test_closed_checkpoint_returns_no_view() -> None:
    checkpoint = Checkpoint.open(TINY)
    checkpoint.close()
    with pytest.raises(AssertionError, match="closed"):
        checkpoint.plain("language_model/rms_norm/scale")


def test_file_that_changed_size_after_the_scan_is_not_mapped(model_dir: Path) -> None:
    with Checkpoint.open(model_dir) as checkpoint:
        os.truncate(checkpoint.records[0].path, 100)
        with pytest.raises(CorruptTensorError, match=r"tensor00000_000.*now 100"):
            checkpoint.plain("language_model/in_out_embed/embeddings")


def remove(path: Path) -> None:
    path.unlink()


def cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def make_foreign(path: Path) -> None:
    path.write_bytes(b"\x80\x04cposix\nsystem\n\x8c\x02id\x85R.")


@pytest.mark.parametrize(
    ("damage", "error", "reason"),
    [
        (remove, TensorLayoutError, "missing: expected 26 tensor files, found 25"),
        (cut_off, CorruptTensorError, "truncated"),
        (make_foreign, UnsafePickleError, "'posix' 'system'"),
    ],
)
def test_damaged_file_is_named(
    model_dir: Path, damage: Callable[[Path], None], error: type[CheckpointError], reason: str
) -> None:
    path = model_dir / "ckpt-0" / "tensor00007_000"
    damage(path)
    with pytest.raises(error, match=reason) as caught:
        Checkpoint.open(model_dir)
    assert caught.value.path == path


@pytest.mark.parametrize("name", ["tensor00026_000", "tensor00003_001", "tensor00003_000.old"])
def test_extra_tensor_file_is_named(model_dir: Path, name: str) -> None:
    shutil.copyfile(model_dir / "ckpt-0" / "tensor00003_000", model_dir / "ckpt-0" / name)
    with pytest.raises(TensorLayoutError, match=f"{name}: does not belong to the model"):
        Checkpoint.open(model_dir)


def test_other_files_beside_the_tensors_do_not_matter(model_dir: Path) -> None:
    (model_dir / "ckpt-0" / "README").write_text("the release has one", encoding="utf-8")
    (model_dir / "ckpt-0" / ".tensor00000_000.123").write_bytes(b"left by a dead writer")
    Checkpoint.open(model_dir).close()


def int8(*shape: int) -> np.ndarray:
    return np.ones(shape, np.int8)


def bfloat16(*shape: int) -> np.ndarray:
    return np.ones(shape, BFLOAT16)


@pytest.mark.parametrize(
    ("index", "write", "expected", "found"),
    [
        (1, lambda path: write_plain(path, np.ones(31, np.float32)), "[32]", "[31]"),
        (
            5,
            lambda path: write_quantized(path, int8(64, 32), bfloat16(1, 32)),
            "int8 [32, 64]",
            "int8 [64, 32]",
        ),
        (
            5,
            lambda path: write_plain(path, np.ones((32, 64), np.float32)),
            "quantised int8 [32, 64]",
            "plain float32 [32, 64]",
        ),
        (
            1,
            lambda path: write_quantized(path, int8(32, 1), bfloat16(1, 1)),
            "plain float32 [32]",
            "quantised int8 [32, 1]",
        ),
    ],
)
def test_tensor_of_another_shape_or_kind_is_named_with_both(
    model_dir: Path, index: int, write, expected: str, found: str
) -> None:
    write(model_dir / "ckpt-0" / f"tensor{index:05d}_000")
    with pytest.raises(TensorLayoutError, match=f"tensor{index:05d}_000") as caught:
        Checkpoint.open(model_dir)
    assert expected in caught.value.reason.partition("found")[0]
    assert found in caught.value.reason.partition("found")[2]


def test_tensor_of_another_dtype_is_named_with_both(model_dir: Path) -> None:
    path = model_dir / "ckpt-0" / "tensor00005_000"
    data = path.read_bytes()
    assert data.count(b"\x8c\x02i1") == 1
    path.write_bytes(data.replace(b"\x8c\x02i1", b"\x8c\x02u1"))
    with pytest.raises(TensorLayoutError, match=r"expected quantised int8.*found quantised uint8"):
        Checkpoint.open(model_dir)


def test_swapped_files_of_different_shape_are_found(model_dir: Path) -> None:
    gate, down = (model_dir / "ckpt-0" / f"tensor0000{index}_000" for index in (2, 3))
    gate.rename(model_dir / "other")
    down.rename(gate)
    (model_dir / "other").rename(down)
    with pytest.raises(TensorLayoutError, match="tensor00002_000"):
        Checkpoint.open(model_dir)


def test_missing_config_is_said_to_be_the_likely_cause(model_dir: Path) -> None:
    (model_dir / "config.json").unlink()
    with pytest.raises(TensorLayoutError, match="right for 2 layers") as caught:
        Checkpoint.open(model_dir)
    assert "no config.json" in caught.value.reason and "Grok-1" in caught.value.reason


def test_broken_config_is_a_config_error(model_dir: Path) -> None:
    (model_dir / "config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ModelConfigError):
        Checkpoint.open(model_dir)


def test_path_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: is not a directory"):
        Checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(TensorLayoutError, match=r"holds no tensor\* file"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("path", [TINY, MINI8])
def test_verify_reads_every_array_of_a_sound_checkpoint(path: Path) -> None:
    with Checkpoint.open(path) as checkpoint:
        arrays = [array for record in checkpoint.records for array in record.arrays]
        assert checkpoint.verify() == sum(array.num_bytes for array in arrays)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_verify_names_a_plain_tensor_with_a_value_that_is_not_finite(
    model_dir: Path, value: float
) -> None:
    values = np.ones(32, np.float32)
    values[-1] = value
    write_plain(model_dir / "ckpt-0" / "tensor00001_000", values)
    with (
        Checkpoint.open(model_dir) as checkpoint,
        pytest.raises(TensorValueError, match="tensor00001_000: holds a value that is NaN"),
    ):
        checkpoint.verify()


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, -0.0, -0.5])
def test_verify_names_a_tensor_with_an_impossible_scale(model_dir: Path, value: float) -> None:
    scales = bfloat16(1, 64)
    scales[0, 63] = value
    write_quantized(model_dir / "ckpt-0" / "tensor00005_000", int8(32, 64), scales)
    with (
        Checkpoint.open(model_dir) as checkpoint,
        pytest.raises(TensorValueError, match="tensor00005_000: holds a scale"),
    ):
        checkpoint.verify()


@pytest.mark.parametrize("position", [0, 254, 255, 256, 8190, 8191])
def test_verify_finds_a_bad_value_in_any_chunk(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, position: int
) -> None:
    # Not a multiple of the item size, so that chunks end inside a value.
    monkeypatch.setattr("milliways.model.checkpoint.reader._VERIFY_CHUNK_BYTES", 1021)
    values = np.ones(256 * 32, np.float32)
    values[position] = np.nan
    write_plain(model_dir / "ckpt-0" / "tensor00000_000", values.reshape(256, 32))
    with Checkpoint.open(model_dir) as checkpoint, pytest.raises(TensorValueError):
        checkpoint.verify()


def test_verify_names_a_file_that_was_truncated_after_the_scan(model_dir: Path) -> None:
    with Checkpoint.open(model_dir) as checkpoint:
        os.truncate(checkpoint.records[-1].path, 300)
        with pytest.raises(CorruptTensorError, match=checkpoint.specs[-1].file_name):
            checkpoint.verify()
