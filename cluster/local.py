"""Composition root of a single process: a model directory in, a running engine out."""

import os
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from model.checkpoint import CHECKPOINT_DIR, Checkpoint
from model.decoder import Decoder
from model.demo import DEMO_DIR
from model.errors import CheckpointError
from model.params import ModelParams, load_model
from model.runner import CacheSize, ModelRunner, StepMode, make_runner
from model.tokenizer import Tokenizer
from router.engine import LocalEngine

DEMO_NAME = "demo"
TOKENIZER_FILE = "tokenizer.model"
DTYPES = {"float32": jnp.dtype("float32"), "bfloat16": jnp.dtype("bfloat16")}
BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalModel:
    """A model loaded into this process; `tokenizer` is None where the directory brings none."""

    decoder: Decoder
    params: ModelParams
    tokenizer: Tokenizer | None


def use_compile_cache(directory: Path) -> None:
    """Keeps compiled programs between runs, so that only the first one waits for the compiler."""
    settings = {
        "jax_compilation_cache_dir": str(directory),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }
    for name, value in settings.items():
        jax.config.update(name, value)  # pyright: ignore[reportUnknownMemberType]


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


def load_local_model(model_dir: Path, dtype: str) -> LocalModel:
    """Opens, checks and loads a model directory.

    Raises:
        ConfigError, CheckpointError, TokenizerError: what is wrong with which file.
    """
    with Checkpoint.open(model_dir) as checkpoint:
        tokenizer = load_tokenizer(model_dir, checkpoint.config.vocab_size)
        return LocalModel(
            decoder=Decoder(config=checkpoint.config, dtype=DTYPES[dtype]),
            params=load_model(checkpoint),
            tokenizer=tokenizer,
        )


def cache_size_for(num_sequences: int, num_tokens_each: int) -> CacheSize:
    """Room for a request, rounded up so that similar requests share compiled programs."""
    blocks_each = -(-num_tokens_each // BLOCK_SIZE)
    return CacheSize(
        num_blocks=_power_of_two(num_sequences * blocks_each, at_least=64),
        block_size=BLOCK_SIZE,
        max_slots=_power_of_two(num_sequences, at_least=8),
    )


def make_local_runner(model: LocalModel, cache_size: CacheSize) -> ModelRunner:
    """A runner of the whole model on this process's device.

    By halves, because one layer's program serves all layers: with the kernels in plain JAX the
    fused step takes the compiler longer with every layer, and both give the same bits.
    """
    return make_runner(model.decoder, model.params, cache_size, StepMode.HALVES)


def make_local_engine(model: LocalModel, cache_size: CacheSize) -> LocalEngine:
    """An engine that serves requests from this process alone."""
    return LocalEngine(make_local_runner(model, cache_size), model.tokenizer)


def _power_of_two(count: int, *, at_least: int) -> int:
    return max(at_least, 1 << (count - 1).bit_length())
