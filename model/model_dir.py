"""Finds the parts of a model directory. Imports no JAX, so that `inspect` answers at once."""

import os
from pathlib import Path

from milliways.model.checkpoint import CHECKPOINT_DIR
from milliways.model.demo import DEMO_DIR
from milliways.model.errors import CheckpointError
from milliways.model.tokenizer import TOKENIZER_FILE, Tokenizer

DEMO_NAME = "demo"


def resolve_model_dir(name: str) -> Path:
    """The directory of a model named on the command line; `demo` is the one we ship.

    Naming its ckpt-0 names the model.

    Raises:
        CheckpointError: there is no such directory.
    """
    path = DEMO_DIR if name == DEMO_NAME else Path(name).expanduser()
    if not path.is_dir():
        raise CheckpointError(path, "no such model directory")
    # Not resolved: what a ckpt-0 that is a link belongs to lies beside the link.
    path = Path(os.path.abspath(path))
    names_tensors = path.name == CHECKPOINT_DIR and not (path / CHECKPOINT_DIR).is_dir()
    return path.parent if names_tensors else path


def load_tokenizer(model_dir: Path, vocab_size: int) -> Tokenizer | None:
    """The model's tokenizer, if it brings one.

    Raises:
        TokenizerError: it is unreadable, or of another vocabulary than the model.
    """
    path = model_dir / TOKENIZER_FILE
    return Tokenizer.load(path, vocab_size) if path.is_file() else None
