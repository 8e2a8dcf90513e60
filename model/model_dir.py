"""Finds the parts of a model directory. It imports no JAX, so that `inspect` starts quickly."""

import os
from pathlib import Path

from milliways.model.checkpoint import CHECKPOINT_DIR, find_directories
from milliways.model.checkpoint.layout import TENSOR_PREFIX
from milliways.model.config import CONFIG_FILE
from milliways.model.demo import DEMO_DIR
from milliways.model.errors import CheckpointError
from milliways.model.tokenizer import TOKENIZER_FILE, Tokenizer

DEMO_NAME = "demo"


def resolve_model_dir(name: str) -> Path:
    """The directory of a model that the command line names; `demo` is the model that we ship.

    The path of its ckpt-0 also names a model.

    Raises:
        CheckpointError: there is no such directory.
    """
    path = DEMO_DIR if name == DEMO_NAME else Path(name).expanduser()
    if not path.is_dir():
        raise CheckpointError(path, "no such model directory")
    return named_model_dir(name)


def named_model_dir(name: str) -> Path:
    """As `resolve_model_dir`, whether the directory is there or not."""
    path = DEMO_DIR if name == DEMO_NAME else Path(name).expanduser()
    # Links are not resolved: if ckpt-0 is a link, the model's other files are beside the link.
    path = Path(os.path.abspath(path))
    names_tensors = path.name == CHECKPOINT_DIR and not (path / CHECKPOINT_DIR).is_dir()
    return path.parent if names_tensors else path


def description_dir(model_dir: Path) -> Path:
    """Where a model's config.json, tokenizer.model and chat template are.

    That is `model_dir`, or the directory around it if `model_dir` holds the tensors themselves.
    """
    if any((model_dir / name).is_file() for name in (CONFIG_FILE, TOKENIZER_FILE)):
        return model_dir
    holds_tensors = any(model_dir.glob(f"{TENSOR_PREFIX}*"))
    return find_directories(model_dir)[1] if holds_tensors else model_dir


def load_tokenizer(model_dir: Path, vocab_size: int) -> Tokenizer | None:
    """The model's tokenizer; None if it has none.

    Raises:
        TokenizerError: it is unreadable, or its number of pieces is not `vocab_size`.
    """
    path = description_dir(model_dir) / TOKENIZER_FILE
    return Tokenizer.load(path, vocab_size) if path.is_file() else None
