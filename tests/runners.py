"""Runs a model over one sequence, in chunks of chosen lengths."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from milliways.model.activations import Activations
from milliways.model.checkpoint import Checkpoint
from milliways.model.decoder import Decoder
from milliways.model.ops import Ops, PureOps
from milliways.model.ops.gpu import GpuOps
from milliways.model.ops.native import NativeLoader, NativeOps
from milliways.model.params import DeviceLoader, Loader, ModelParams, load_model
from milliways.model.runner import CacheSize, ModelRunner, ScheduledTokens, StepMode, make_runner

CACHE_SIZE = CacheSize(num_blocks=16, block_size=16, max_slots=8)
BACKENDS = ("native", "pure")
# Tests on a GPU (MILLIWAYS_TEST_PLATFORMS) test the GPU's kernels.
ON_GPU = jax.default_backend() == "gpu"
BACKEND = "gpu" if ON_GPU else "native"

Model = tuple[Decoder, ModelParams]


def kernels_of(backend: str, activations: Activations = Activations.EXACT) -> tuple[Ops, Loader]:
    """The kernels of a backend, and the loader of their matrices."""
    if backend == "native":
        return NativeOps(), NativeLoader(activations)
    if backend == "gpu":
        return GpuOps(deterministic=True), DeviceLoader()
    return PureOps(activations), DeviceLoader(activations=activations)


def load(
    model_dir: Path,
    dtype: str = "float32",
    backend: str = BACKEND,
    activations: Activations = Activations.EXACT,
) -> Model:
    """Decoder and parameters of a model directory."""
    ops, loader = kernels_of(backend, activations)
    with Checkpoint.open(model_dir) as checkpoint:
        decoder = Decoder(config=checkpoint.config, dtype=jnp.dtype(dtype), ops=ops)
        return decoder, load_model(checkpoint, loader)


def runner_of(
    model: Model,
    mode: StepMode = StepMode.HALVES,
    cache_size: CacheSize = CACHE_SIZE,
) -> ModelRunner:
    """A runner with an empty cache."""
    return make_runner(*model, cache_size, mode)


def in_eights(num_tokens: int) -> list[int]:
    """Chunk lengths of 8, a bucket of its own, so that few programs serve all prompts."""
    return [8] * (num_tokens // 8) + [num_tokens % 8] * (num_tokens % 8 > 0)


def logits_of(
    runner: ModelRunner,
    token_ids: Sequence[int],
    chunks: Sequence[int] | None = None,
    first_block: int = 0,
) -> np.ndarray:
    """Logits [T, V] of one sequence, prefilled in chunks of the given lengths (default: one)."""
    num_blocks = -(-len(token_ids) // runner.cache_size.block_size)
    block_table = range(first_block, first_block + num_blocks)
    parts, start = [], 0
    for length in chunks or [len(token_ids)]:
        tokens = list(token_ids[start : start + length])
        scheduled = ScheduledTokens(
            token_ids=tokens,
            start_position=start,
            block_table=block_table,
            num_logits=len(tokens),
        )
        parts.append(runner.compute_logits([scheduled]))
        start += length
    return np.concatenate(parts)
