"""Converts between the parameters of the training model and the released form on disk.

Parameters are a mapping from the released name of a tensor to a float32 array.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
from flax import nnx

from milliways.benchmarks.demo.training.grok_flax import Grok
from milliways.model.checkpoint import (
    Checkpoint,
    TensorRole,
    TensorSpec,
    tensor_specs,
    write_checkpoint,
)
from milliways.model.checkpoint.reader import CHECKPOINT_DIR
from milliways.model.config import CONFIG_FILE, ModelConfig
from milliways.model.quantise import dequantise, quantise
from milliways.model.tokenizer import TOKENIZER_FILE

Parameters = dict[str, np.ndarray]
# The number of scale rows of the matrices that the release quantised in row blocks.
NUM_ROW_BLOCKS = 8


def parameters_of(model: Grok) -> Parameters:
    """The model's parameters by released name."""
    flat = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    return {
        spec.name: np.asarray(flat[_flax_path(spec)][...]) for spec in tensor_specs(model.config)
    }


def model_of(config: ModelConfig, parameters: Mapping[str, np.ndarray]) -> Grok:
    """A training model with the given parameters."""
    model = Grok(config, nnx.Rngs(0))
    flat = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    for spec in tensor_specs(config):
        variable = flat[_flax_path(spec)]
        assert variable.shape == spec.shape, spec
        variable[...] = parameters[spec.name]
    return model


def write_release(
    model_dir: Path, config: ModelConfig, parameters: Mapping[str, np.ndarray], tokenizer: bytes
) -> int:
    """Quantises the parameters and writes a model directory; returns the bytes of all its files."""
    model_dir.mkdir(parents=True, exist_ok=True)

    def tensor_of(spec: TensorSpec) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        weight = parameters[spec.name]
        return quantise(weight, _num_scale_rows(spec)) if spec.quantized else weight

    num_bytes = write_checkpoint(model_dir / CHECKPOINT_DIR, config, tensor_of)
    config_json = json.dumps(asdict(config), indent=2) + "\n"
    (model_dir / CONFIG_FILE).write_text(config_json, encoding="utf-8")
    (model_dir / TOKENIZER_FILE).write_bytes(tokenizer)
    return num_bytes + len(config_json) + len(tokenizer)


def read_release(model_dir: Path) -> tuple[ModelConfig, Parameters]:
    """The parameters of a model directory, dequantised to float32."""
    with Checkpoint.open(model_dir) as checkpoint:
        parameters = {spec.name: _read(checkpoint, spec) for spec in checkpoint.specs}
        return checkpoint.config, parameters


def _read(checkpoint: Checkpoint, spec: TensorSpec) -> np.ndarray:
    if not spec.quantized:
        return np.array(checkpoint.plain(spec))
    return dequantise(*checkpoint.quantized(spec))


def _num_scale_rows(spec: TensorSpec) -> int:
    by_rows = spec.role in (TensorRole.EXPERT_LINEAR_1, TensorRole.ATTENTION_OUT)
    return NUM_ROW_BLOCKS if by_rows else 1


def _flax_path(spec: TensorSpec) -> tuple[str | int, ...]:
    if spec.role is TensorRole.EMBEDDING:
        return ("in_out_embed",)
    if spec.role is TensorRole.FINAL_NORM:
        return ("rms_norm", "scale")
    if spec.role is TensorRole.GATE:
        return ("layers", spec.layer, "moe", "router")
    return ("layers", spec.layer, *spec.role.value.removesuffix("/w").split("/"))
