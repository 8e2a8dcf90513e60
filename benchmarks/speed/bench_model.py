"""The models that speed is measured with: Grok-1's shape, random weights.

`bench` has a billion parameters, so it shows what the arithmetic costs. `deep` has as many layers
as Grok-1 and is narrow, so it shows what is done between the layers.

Random weights are as fast as trained ones if the gate spreads tokens over all experts. The scales
below keep every activation near 1, and make the gate's choices as clear as in a trained model.
"""

import dataclasses
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import ml_dtypes
import numpy as np

from milliways.model.checkpoint import (
    CHECKPOINT_DIR,
    Checkpoint,
    TensorRole,
    TensorSpec,
    write_checkpoint,
)
from milliways.model.config import CONFIG_FILE, ModelConfig

BENCH_NAME = "bench"
BENCH_CONFIG = ModelConfig(
    emb_size=768,
    key_size=128,
    num_q_heads=6,
    num_kv_heads=2,
    num_layers=12,
    vocab_size=131072,
    ffn_size=4096,
    num_experts=8,
    num_selected_experts=2,
    sequence_len=8192,
    embedding_multiplier_scale=768**0.5,
    output_multiplier_scale=3**-0.5,
    attn_output_multiplier=128**-0.5,
)
DEEP_NAME = "deep"
DEEP_CONFIG = dataclasses.replace(
    BENCH_CONFIG,
    emb_size=256,
    key_size=64,
    num_q_heads=4,
    num_layers=64,
    vocab_size=2048,
    ffn_size=512,
    sequence_len=1024,
    embedding_multiplier_scale=16.0,
)
SEED, _DEEP_SEED = 42, 7

# If the weights change, these folders' names must change too. Otherwise old copies would still be
# used.
_MODELS = {
    BENCH_NAME: ("bench-1", BENCH_CONFIG, SEED),
    DEEP_NAME: ("deep-1", DEEP_CONFIG, _DEEP_SEED),
}
MODEL_NAMES = tuple(_MODELS)
# The number of scale rows of the matrices that the release quantised in row blocks.
_NUM_SCALE_ROWS = {TensorRole.EXPERT_LINEAR_1: 8, TensorRole.ATTENTION_OUT: 8}
_NORM_SCALE = {TensorRole.POST_ATTENTION_NORM: 0.5, TensorRole.POST_MOE_NORM: 0.4}
_GATE_LOGIT_STD = 2.4
_INT8_MAX = 127
# The standard deviation of uniform whole numbers in -127..127.
_INT8_STD = (((2 * _INT8_MAX + 1) ** 2 - 1) / 12) ** 0.5


def ensure_bench_model(cache_dir: Path, name: str = BENCH_NAME) -> Path:
    """A model's directory. The model (`bench`: 1.3 GB) is made if the cache does not have it."""
    folder, config, seed = _MODELS[name]
    model_dir = cache_dir / folder
    if not model_dir.is_dir():
        write_random_model(model_dir, config, seed)
    return model_dir


def write_random_model(model_dir: Path, config: ModelConfig, seed: int) -> None:
    """Writes a model directory in the released form. It gets its name when it is complete."""
    unfinished = model_dir.with_name(f".{model_dir.name}.{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
        write_checkpoint(
            unfinished / CHECKPOINT_DIR, config, lambda spec: random_tensor(spec, config, seed)
        )
        config_json = json.dumps(asdict(config), indent=2) + "\n"
        (unfinished / CONFIG_FILE).write_text(config_json, encoding="utf-8")
        Checkpoint.open(unfinished).close()
        os.replace(unfinished, model_dir)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def random_tensor(
    spec: TensorSpec, config: ModelConfig, seed: int
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """One tensor. It depends on the seed and its index alone, not on the order of calls."""
    rng = np.random.default_rng([seed, spec.index])
    if spec.quantized:
        return _random_matrix(spec, rng)
    if spec.role is TensorRole.EMBEDDING:
        return rng.standard_normal(spec.shape, np.float32) / np.float32(config.emb_size**0.5)
    if spec.role is TensorRole.GATE:
        std = np.float32(_GATE_LOGIT_STD / config.emb_size**0.5)
        return rng.standard_normal(spec.shape, np.float32) * std
    return np.full(spec.shape, _NORM_SCALE.get(spec.role, 1.0), np.float32)


def _random_matrix(spec: TensorSpec, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """int8 weights whose products with inputs of variance 1 have variance 1."""
    # Drawing whole bytes is fast. The release has no weight of -128, so it becomes -127.
    weight = rng.integers(0, 256, spec.shape, np.uint8).view(np.int8)
    np.maximum(weight, -_INT8_MAX, out=weight)
    *stack, num_in, num_out = spec.shape
    num_scale_rows = _NUM_SCALE_ROWS.get(spec.role, 1)
    if num_in % num_scale_rows:
        num_scale_rows = 1
    scale = num_in**-0.5 / _INT8_STD
    # Columns differ by a few percent, so that a kernel that mixes up their scales gives an error.
    spread = rng.uniform(0.95, 1.05, (*stack, num_scale_rows, num_out))
    return weight, (scale * spread).astype(ml_dtypes.bfloat16)
