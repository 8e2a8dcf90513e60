"""Composition root of a single process: makes a running engine of a model directory."""

from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp

from milliways.model.activations import Activations
from milliways.model.checkpoint import Checkpoint
from milliways.model.decoder import Decoder
from milliways.model.errors import InvalidRequestError
from milliways.model.model_dir import load_tokenizer
from milliways.model.ops.select import KernelChoice, Residence, select_ops
from milliways.model.params import Loader, ModelParams, load_model
from milliways.model.runner import CacheSize, ModelRunner, StepMode, make_runner
from milliways.model.tokenizer import Tokenizer
from milliways.router.engine import LocalEngine

DTYPES = {"float32": jnp.dtype("float32"), "bfloat16": jnp.dtype("bfloat16")}
BLOCK_SIZE = 16
MAX_THREADS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalModel:
    """A model loaded into this process; `tokenizer` is None if the directory has none."""

    decoder: Decoder
    params: ModelParams
    tokenizer: Tokenizer | None
    # Mapped experts stay valid as long as their loader exists.
    loader: Loader


def wanted_kernels(options: Namespace) -> KernelChoice:
    """What the model options of a command line ask of the kernels.

    Raises:
        InvalidRequestError: the number of threads is out of range.
    """
    return kernel_choice(
        activations=options.activations,
        experts=options.experts,
        deterministic=options.deterministic,
        threads=options.threads,
    )


def kernel_choice(
    *, activations: str, experts: str, deterministic: bool, threads: int | None
) -> KernelChoice:
    """What named options ask of the kernels.

    Raises:
        InvalidRequestError: an option has no such value; names option, value and limit.
    """
    for name, value, kind in (
        ("activations", activations, Activations),
        ("experts", experts, Residence),
    ):
        _check_one_of(name, value, [member.value for member in kind])
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise InvalidRequestError("threads", threads, f"between 1 and {MAX_THREADS}")
    return KernelChoice(
        activations=Activations(activations),
        residence=Residence(experts),
        deterministic=deterministic,
        num_threads=threads,
    )


def load_local_model(
    model_dir: Path, dtype: str, kernels: KernelChoice | None = None
) -> LocalModel:
    """Opens, checks and loads a model directory, for the best kernels of this machine.

    Raises:
        InvalidRequestError: there is no such dtype.
        ModelConfigError, CheckpointError, TokenizerError: what is wrong with which file.
        KernelsMissingError: no kernels of this machine can do what is asked for.
    """
    _check_one_of("dtype", dtype, DTYPES)
    ops, loader = select_ops(kernels or KernelChoice())
    with Checkpoint.open(model_dir) as checkpoint:
        tokenizer = load_tokenizer(model_dir, checkpoint.config.vocab_size)
        return LocalModel(
            decoder=Decoder(config=checkpoint.config, dtype=DTYPES[dtype], ops=ops),
            params=load_model(checkpoint, loader),
            tokenizer=tokenizer,
            loader=loader,
        )


def cache_size_for(num_sequences: int, num_tokens_each: int) -> CacheSize:
    """Room for a request, rounded up so that similar requests share compiled programs."""
    blocks_each = -(-num_tokens_each // BLOCK_SIZE)
    return CacheSize(
        num_blocks=_round_up(num_sequences * blocks_each),
        block_size=BLOCK_SIZE,
        max_slots=_power_of_two(num_sequences, at_least=8),
    )


def make_local_runner(model: LocalModel, cache_size: CacheSize) -> ModelRunner:
    """A runner of the whole model on this process's device.

    With the kernels in plain JAX a step runs by halves, because one layer's program then serves all
    layers. A fused program takes longer to compile with every layer. Both give the same bits.
    """
    mode = StepMode.FUSED if model.decoder.ops.fuses_steps else StepMode.HALVES
    return make_runner(model.decoder, model.params, cache_size, mode, owner=model.loader)


def make_local_engine(model: LocalModel, cache_size: CacheSize) -> LocalEngine:
    """An engine that serves requests from this process alone."""
    return LocalEngine(make_local_runner(model, cache_size), model.tokenizer)


def _check_one_of(name: str, value: str, allowed: Iterable[str]) -> None:
    names = tuple(allowed)
    if value not in names:
        raise InvalidRequestError(name, value, f"one of {', '.join(names)}")


def _round_up(num_blocks: int) -> int:
    """Few different sizes, so that few programs are compiled.

    For 256 blocks and more, the result is at most a quarter too much.
    """
    step = max(64, _power_of_two(num_blocks, at_least=1) // 8)
    return -(-num_blocks // step) * step


def _power_of_two(count: int, *, at_least: int) -> int:
    return max(at_least, 1 << (count - 1).bit_length())
