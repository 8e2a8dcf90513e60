"""A worker whose configuration and tokenizer are gone goes by what other workers have read."""

import json
import pickle
import shutil
from pathlib import Path

import pytest

from milliways.cluster.host.model_files import ModelFiles
from milliways.cluster.ingress.served_model import load_served_model
from milliways.cluster.settings.config import ModelSettings
from milliways.model.demo import DEMO_DIR
from milliways.model.errors import CheckpointError, ModelConfigError, OtherModelError
from milliways.model.manifest import ABSENT, digest_small_files
from milliways.model.small_files import SmallFiles


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO_DIR, tmp_path / "model"))


def change_config(model_dir: Path) -> None:
    path = model_dir / "config.json"
    tree = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(tree | {"num_layers": 2}), "utf-8")


def test_they_survive_a_way_to_another_process(model_dir: Path) -> None:
    files = SmallFiles.read(model_dir)
    sent = pickle.loads(pickle.dumps(files))
    shutil.rmtree(model_dir)
    assert sent == files
    assert sent.manifest == digest_small_files(DEMO_DIR)
    config = sent.config()
    tokenizer = sent.tokenizer(config.vocab_size)
    assert tokenizer is not None and tokenizer.vocab_size == config.vocab_size
    with sent.checkpoint() as checkpoint:
        assert checkpoint.config == config
        assert checkpoint.ckpt_dir == model_dir / "ckpt-0"


def test_a_model_may_have_none_of_them(model_dir: Path) -> None:
    for name in ("config.json", "tokenizer.model", "chat_template.jinja"):
        (model_dir / name).unlink()
    files = SmallFiles.read(model_dir)
    assert set(files.manifest.digests.values()) == {ABSENT}
    assert files.config().num_layers == 64
    assert files.tokenizer(files.config().vocab_size) is None


def test_they_are_found_beside_a_directory_of_tensors_of_any_name(model_dir: Path) -> None:
    (model_dir / "ckpt-0").rename(model_dir / "weights")
    files = SmallFiles.read(model_dir / "weights")
    assert files.manifest == digest_small_files(model_dir)
    assert files.ckpt_dir == model_dir / "weights"


@pytest.mark.parametrize("what", ["the directory", "what is in it", "the right configuration"])
def test_what_is_gone_or_changed_comes_from_others(model_dir: Path, what: str) -> None:
    known = SmallFiles.read(model_dir)
    if what == "the right configuration":
        change_config(model_dir)
    else:
        shutil.rmtree(model_dir)
    if what == "what is in it":
        model_dir.mkdir()
    files = ModelFiles(str(model_dir), known)
    assert files.loaded == known.manifest
    assert files.config == known.config() and files.tokenizer is not None
    (fault,) = files.faults
    assert str(model_dir) in fault
    names_file = "config.json" in fault or "chat_template.jinja" in fault
    assert names_file == (what != "the directory")
    # They are not refused afterwards.
    files.expect(known.manifest)
    # What it hands on is the same.
    assert files.small_files.contents == known.contents
    files.close()


@pytest.mark.parametrize("name", [".", "ckpt-0"])
def test_ingress_knows_the_model_from_what_workers_have_read(model_dir: Path, name: str) -> None:
    template = {"roles": {"user": {"prefix": "Human: "}}, "stop": ["Human:"]}
    (model_dir / "chat_template.json").write_text(json.dumps(template), "utf-8")
    settings = ModelSettings(path=str(model_dir / name))
    own, known = load_served_model(settings), SmallFiles.read(model_dir)
    shutil.rmtree(model_dir)
    with pytest.raises(CheckpointError, match="no such model directory"):
        load_served_model(settings)
    served = load_served_model(settings, known=known)
    assert (served.name, served.fingerprint) == (own.name, own.fingerprint)
    assert (served.config, served.chat_template) == (own.config, own.chat_template)
    assert served.encode("Welcome to") == own.encode("Welcome to")


def test_without_others_a_worker_reads_its_own_or_says_what_is_wrong(model_dir: Path) -> None:
    files = ModelFiles(str(model_dir))
    assert files.faults == [] and files.loaded == digest_small_files(model_dir)
    files.close()
    known = SmallFiles.read(model_dir)
    change_config(model_dir)
    other = ModelFiles(str(model_dir))
    with pytest.raises(OtherModelError, match=r"config\.json"):
        other.expect(known.manifest)
    other.close()
    (model_dir / "config.json").write_text("{", "utf-8")
    with pytest.raises(ModelConfigError, match="is not JSON"):
        ModelFiles(str(model_dir))
    shutil.rmtree(model_dir)
    with pytest.raises(CheckpointError, match="no such model directory"):
        ModelFiles(str(model_dir))
