"""What is loaded is known by its bytes: other bytes, or none, are never handed out."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from milliways.cluster.host.model_checks import check_manifest, check_mapped
from milliways.model.checkpoint import (
    CheckedTensors,
    Checkpoint,
    TensorRole,
    digest_model,
    part_names,
)
from milliways.model.demo import DEMO_DIR
from milliways.model.errors import (
    ChangeableFileError,
    CheckpointError,
    CorruptTensorError,
    ManifestError,
    OtherModelError,
)
from milliways.model.manifest import (
    ABSENT,
    EMPTY_MANIFEST,
    Manifest,
    digest_small_files,
    read_manifest,
)

ROLE, LAYER, EXPERT = TensorRole.EXPERT_LINEAR_V, 1, 5
PART = "transformer/decoder_layer_1/moe/linear_v/w[5]"


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO_DIR, tmp_path / "model"))


def tensors_of(model_dir: Path, wanted: Manifest = EMPTY_MANIFEST) -> CheckedTensors:
    return CheckedTensors(Checkpoint.open_lazily(model_dir), wanted)


def path_of(model_dir: Path) -> Path:
    with Checkpoint.open(model_dir) as checkpoint:
        return checkpoint.record(checkpoint.find(ROLE, LAYER)).path


def flip_bit(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def offset_of_expert(model_dir: Path) -> int:
    with Checkpoint.open(model_dir) as checkpoint:
        weight = checkpoint.record(checkpoint.find(ROLE, LAYER)).arrays[0]
        return weight.offset + EXPERT * weight.num_bytes // weight.shape[0]


def test_the_arrays_are_those_of_the_files(model_dir: Path) -> None:
    tensors = tensors_of(model_dir)
    with Checkpoint.open(model_dir) as checkpoint:
        for ours, theirs in zip(
            tensors.expert(LAYER, ROLE, EXPERT),
            checkpoint.expert(LAYER, ROLE, EXPERT),
            strict=True,
        ):
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)
        gate = checkpoint.find(TensorRole.GATE, LAYER)
        np.testing.assert_array_equal(tensors.plain(gate), checkpoint.plain(gate))
        query = checkpoint.find(TensorRole.QUERY, LAYER)
        for ours, theirs in zip(tensors.quantized(query), checkpoint.quantized(query), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert tensors.found.digests.keys() == {PART, gate.name, query.name}
        assert tensors.bytes_read == checkpoint.bytes_read


def test_a_copy_of_a_model_has_its_digests_and_every_part_has_one(model_dir: Path) -> None:
    with Checkpoint.open(model_dir) as copy, Checkpoint.open(DEMO_DIR) as demo:
        manifest = digest_model(demo)
        assert digest_model(copy) == manifest
        assert sorted(manifest.digests) == sorted(part_names(demo))
    assert len(set(manifest.digests.values())) == len(manifest)


def test_one_bit_of_an_expert_is_another_model(model_dir: Path) -> None:
    first = tensors_of(model_dir)
    first.expert(LAYER, ROLE, EXPERT)
    at = offset_of_expert(model_dir)
    flip_bit(path_of(model_dir), at + 77)
    tensors = tensors_of(model_dir, first.found)
    with pytest.raises(OtherModelError) as caught:
        tensors.expert(LAYER, ROLE, EXPERT)
    assert caught.value.path == path_of(model_dir)
    assert PART in str(caught.value)
    assert not tensors.found.digests
    # Its neighbours are right, and so is the expert when the bit is.
    tensors.expert(LAYER, ROLE, EXPERT - 1)
    flip_bit(path_of(model_dir), at + 77)
    tensors.expert(LAYER, ROLE, EXPERT)
    assert tensors.found.digests[PART] == first.found.digests[PART]


def test_a_bit_that_flips_after_the_copy_changes_nothing(model_dir: Path) -> None:
    weight, _ = tensors_of(model_dir).expert(LAYER, ROLE, EXPERT)
    before = weight.copy()
    flip_bit(path_of(model_dir), offset_of_expert(model_dir))
    np.testing.assert_array_equal(weight, before)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def remove(path: Path) -> None:
    path.unlink()


def replace_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def overwrite_header(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"no pickle")


@pytest.mark.parametrize("damage", [cut, remove, replace_by_a_folder, overwrite_header])
@pytest.mark.parametrize("is_scanned", [True, False], ids=["after the scan", "before the scan"])
def test_a_file_that_comes_back_is_read(
    model_dir: Path, damage: Callable[[Path], None], is_scanned: bool
) -> None:
    path = path_of(model_dir)
    tensors = tensors_of(model_dir)
    if is_scanned:
        tensors.expert(LAYER, ROLE, EXPERT - 1)
    kept = path.read_bytes()
    damage(path)
    if damage is not overwrite_header or not is_scanned:
        with pytest.raises(CheckpointError, match=path.name):
            tensors.expert(LAYER, ROLE, EXPERT)
    if path.is_dir():
        path.rmdir()
    path.write_bytes(kept)
    tensors.expert(LAYER, ROLE, EXPERT)


def test_a_file_that_is_cut_while_it_is_read_is_an_error_and_kills_nobody(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, size = path_of(model_dir), path_of(model_dir).stat().st_size
    tensors = tensors_of(model_dir)
    read = os.preadv

    def read_after_cut(fd: int, buffers: list[memoryview], offset: int) -> int:
        os.truncate(path, offset)
        return read(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", read_after_cut)
    with pytest.raises(CorruptTensorError, match="was cut short at byte"):
        tensors.expert(LAYER, ROLE, EXPERT)
    assert path.stat().st_size < size


def test_only_files_that_are_needed_must_be_there(model_dir: Path) -> None:
    with Checkpoint.open(model_dir) as checkpoint:
        other = checkpoint.record(checkpoint.find(ROLE, LAYER + 1)).path
    other.unlink()
    tensors_of(model_dir).expert(LAYER, ROLE, EXPERT)


def test_an_expert_stays_mapped_only_where_nobody_may_write(model_dir: Path) -> None:
    path = path_of(model_dir)
    tensors = tensors_of(model_dir)
    path.chmod(0o644)
    with pytest.raises(ChangeableFileError, match=r"chmod a-w"):
        tensors.expert(LAYER, ROLE, EXPERT, stays_mapped=True)
    path.chmod(0o444)
    weight, _ = tensors.expert(LAYER, ROLE, EXPERT, stays_mapped=True)
    assert not weight.flags.writeable
    assert PART in tensors.found.digests


def test_mapped_experts_are_refused_before_anything_starts(model_dir: Path) -> None:
    paths = sorted((model_dir / "ckpt-0").iterdir())
    for path in paths:
        path.chmod(0o444)
    with Checkpoint.open(model_dir) as checkpoint:
        check_mapped(checkpoint)
        path_of(model_dir).chmod(0o464)
        with pytest.raises(ChangeableFileError, match=path_of(model_dir).name):
            check_mapped(checkpoint)


def test_small_files_belong_to_the_model(model_dir: Path) -> None:
    before = digest_small_files(model_dir)
    assert before.digests["tokenizer_config.json"] == ABSENT
    (model_dir / "config.json").write_text((model_dir / "config.json").read_text() + "\n")
    (model_dir / "tokenizer.model").unlink()
    assert before.differing(digest_small_files(model_dir)) == ["config.json", "tokenizer.model"]


def test_a_manifest_file_is_read_back(tmp_path: Path) -> None:
    manifest = Manifest({"a": "0" * 31 + "1", "b[3]": "f" * 32})
    path = tmp_path / "manifest.json"
    path.write_text(manifest.to_json())
    assert read_manifest(path) == manifest
    assert Manifest(dict(reversed(manifest.digests.items()))).identity == manifest.identity
    assert manifest.missing_of(["b[3]", "c", "a", "b[4]"]) == ["b[4]", "c"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is not JSON"),
        ("[]", "has no field format"),
        ('{"format": "milliways-manifest-1"}', "has no field digests"),
        ('{"format": "milliways-manifest-1", "digests": {"a": "XY"}}', "must be 32 hex digits"),
        (Manifest({"a": "0" * 32}).to_json().replace("0", "1", 1), "was changed"),
    ],
)
def test_a_file_that_is_no_manifest_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(text)
    with pytest.raises(ManifestError, match=reason):
        read_manifest(path)


def test_a_manifest_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="No such file"):
        read_manifest(tmp_path / "none.json")


def test_a_manifest_of_another_model_is_refused_before_anything_starts(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    with Checkpoint.open(DEMO_DIR) as checkpoint:
        whole = digest_model(checkpoint)
        path.write_text(whole.to_json())
        check_manifest(path, checkpoint)
        rest = Manifest({name: digest for name, digest in whole.digests.items() if name != PART})
        path.write_text(rest.to_json())
        with pytest.raises(ManifestError, match=r"has no digest of .*linear_v/w\[5\]"):
            check_manifest(path, checkpoint)


def test_a_part_that_was_only_read_ahead_is_not_said_to_be_loaded(model_dir: Path) -> None:
    tensors = tensors_of(model_dir)
    tensors.expect(LAYER, ROLE, [2, EXPERT])
    tensors.expert(LAYER, ROLE, 2)
    tensors.close()
    assert list(tensors.found.digests) == [PART.replace("[5]", "[2]")]
