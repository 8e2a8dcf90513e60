"""Where the parts of a model are, whatever the directory of its tensors is called."""

from pathlib import Path

import pytest

from milliways.cluster.ingress.served_model import load_served_model
from milliways.cluster.settings.config import ModelSettings
from milliways.model.checkpoint import Checkpoint
from milliways.model.config import load_config
from milliways.model.demo import DEMO_DIR
from milliways.model.model_dir import description_dir, resolve_model_dir


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """The demo model; its tensors lie in `ckpt`."""
    for name in ("config.json", "tokenizer.model"):
        (tmp_path / name).symlink_to(DEMO_DIR / name)
    (tmp_path / "ckpt").symlink_to(DEMO_DIR / "ckpt-0")
    return tmp_path


def test_files_beside_the_tensors_are_found(model_dir: Path) -> None:
    tensors = resolve_model_dir(str(model_dir / "ckpt"))
    served = load_served_model(ModelSettings(path=str(tensors)))
    assert served.config == load_config(DEMO_DIR)
    assert served.tokenizer is not None
    with Checkpoint.open(tensors) as checkpoint:
        assert checkpoint.config == served.config


def test_files_among_the_tensors_are_found(tmp_path: Path) -> None:
    for path in [*(DEMO_DIR / "ckpt-0").iterdir(), DEMO_DIR / "config.json"]:
        (tmp_path / path.name).symlink_to(path)
    assert description_dir(tmp_path) == tmp_path
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.config == load_config(DEMO_DIR)


def test_model_directory_describes_itself(tmp_path: Path) -> None:
    assert description_dir(DEMO_DIR) == DEMO_DIR
    assert description_dir(tmp_path) == tmp_path
