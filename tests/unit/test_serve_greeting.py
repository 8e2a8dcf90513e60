"""What `milliways serve` says once it serves."""

import json
import re
from pathlib import Path
from typing import Any

from milliways.cluster.cli.messages import greeting
from milliways.cluster.settings.config import config_from_tree
from milliways.model.demo import DEMO_DIR


def body_to_try(model_dir: Path) -> dict[str, Any]:
    said = greeting(config_from_tree({"model": {"path": str(model_dir)}}))
    found = re.search(r"-d '(.*)'", said)
    assert found is not None
    return json.loads(found[1])


def test_line_to_try_is_one_that_the_model_can_answer(tmp_path: Path) -> None:
    assert body_to_try(DEMO_DIR)["prompt"] == "Welcome to"
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((DEMO_DIR / "config.json").read_bytes())
    (bare / "ckpt-0").symlink_to(DEMO_DIR / "ckpt-0")
    tried = body_to_try(bare)
    assert (tried["model"], tried["prompt"]) == ("bare", [1, 2, 3])
