"""Converts a released checkpoint to llama.cpp's format, so that both engines run the same weights.

llama.cpp stores matrices transposed ([out, in] where the release has [in, out]), in one encoding,
and norms and the gate in float32. Its Q8_0 differs from the release's int8: a scale belongs to 32
inputs, not to a column, so weights are rounded again.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from milliways.benchmarks.speed.gguf_file import (
    Q8_BLOCK,
    GgufTensor,
    GgufType,
    MetaValue,
    write_gguf,
)
from milliways.model.checkpoint import Checkpoint, TensorRole, TensorSpec
from milliways.model.config import ModelConfig
from milliways.model.quantise import dequantise

# Grok-1's constants, as in model/ops/pure.py. They are repeated here to avoid importing JAX.
_RMS_EPSILON = 1e-5
_LOGIT_CAP = 30.0
_ROPE_BASE = 10000.0

_PIECE_ROWS = 8192
# llama.cpp's numbers for "all matrices are of this type".
_FILE_TYPES = {GgufType.F32: 0, GgufType.F16: 1, GgufType.Q8_0: 7}
_NAMES = {
    TensorRole.EMBEDDING: "token_embd",
    TensorRole.FINAL_NORM: "output_norm",
    TensorRole.PRE_ATTENTION_NORM: "attn_norm",
    TensorRole.QUERY: "attn_q",
    TensorRole.KEY: "attn_k",
    TensorRole.VALUE: "attn_v",
    TensorRole.ATTENTION_OUT: "attn_output",
    TensorRole.POST_ATTENTION_NORM: "attn_output_norm",
    TensorRole.PRE_MOE_NORM: "ffn_norm",
    TensorRole.GATE: "ffn_gate_inp",
    TensorRole.EXPERT_LINEAR: "ffn_gate_exps",
    TensorRole.EXPERT_LINEAR_V: "ffn_up_exps",
    TensorRole.EXPERT_LINEAR_1: "ffn_down_exps",
    TensorRole.POST_MOE_NORM: "layer_output_norm",
}


class NotConvertibleError(Exception):
    """llama.cpp cannot represent a model of this shape; the message says why."""


def ensure_gguf(model_dir: Path, type: GgufType, cache_dir: Path) -> Path:
    """The model in llama.cpp's format, from the cache or written now.

    Raises:
        NotConvertibleError: llama.cpp cannot represent the model.
    """
    with Checkpoint.open(model_dir) as checkpoint:
        check_convertible(checkpoint.config, type)
        path = cache_dir / f"{_fingerprint(checkpoint)}-{type.name.lower()}.gguf"
        if not path.is_file():
            cache_dir.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_name(f".{path.name}.{os.getpid()}")
            try:
                write_model(unfinished, checkpoint, type)
                os.replace(unfinished, path)
            finally:
                unfinished.unlink(missing_ok=True)
    return path


def check_convertible(config: ModelConfig, type: GgufType) -> None:
    """Raises NotConvertibleError if llama.cpp's Grok cannot have these sizes."""
    if config.q_size != config.emb_size:
        raise NotConvertibleError(
            f"llama.cpp needs query heads whose total width is emb_size = {config.emb_size}; "
            f"here it is {config.q_size}"
        )
    if type is GgufType.Q8_0:
        for name in ("emb_size", "ffn_size"):
            if getattr(config, name) % Q8_BLOCK:
                raise NotConvertibleError(
                    f"Q8_0 needs {name} to be a multiple of {Q8_BLOCK}; "
                    f"here it is {getattr(config, name)}"
                )


def write_model(path: Path, checkpoint: Checkpoint, type: GgufType) -> None:
    """Writes all tensors; matrices are in the given encoding."""
    tensors = [_tensor(checkpoint, spec, type) for spec in checkpoint.specs]
    write_gguf(path, metadata_of(checkpoint.config, type), tensors)


def metadata_of(config: ModelConfig, type: GgufType) -> dict[str, MetaValue]:
    """The keys that llama.cpp's `grok` reads. There is no vocabulary: only token ids are used."""
    values: dict[str, MetaValue] = {
        "context_length": config.sequence_len,
        "embedding_length": config.emb_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.ffn_size,
        "vocab_size": config.vocab_size,
        "expert_count": config.num_experts,
        "expert_used_count": config.num_selected_experts,
        "attention.head_count": config.num_q_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.key_size,
        "attention.value_length": config.key_size,
        "attention.layer_norm_rms_epsilon": _RMS_EPSILON,
        "attention.output_scale": config.attn_output_multiplier,
        "attn_logit_softcapping": _LOGIT_CAP,
        "rope.dimension_count": config.key_size,
        "rope.freq_base": _ROPE_BASE,
        "embedding_scale": config.embedding_multiplier_scale,
        "logit_scale": config.output_multiplier_scale,
    }
    general: dict[str, MetaValue] = {
        "general.architecture": "grok",
        "general.file_type": _FILE_TYPES[type],
        "tokenizer.ggml.model": "no_vocab",
    }
    return general | {f"grok.{key}": value for key, value in values.items()}


def _tensor(checkpoint: Checkpoint, spec: TensorSpec, type: GgufType) -> GgufTensor:
    name = f"{_NAMES[spec.role]}.weight"
    if spec.layer is not None:
        name = f"blk.{spec.layer}.{name}"
    *stack, num_in, num_out = (1, *spec.shape)
    if spec.role is TensorRole.EMBEDDING:
        return GgufTensor(name, spec.shape, type, _plain_pieces(checkpoint, spec))
    if spec.role is TensorRole.GATE:
        shape, pieces = (num_out, num_in), (checkpoint.plain(spec).T,)
        return GgufTensor(name, shape, GgufType.F32, pieces)
    if not spec.quantized:
        return GgufTensor(name, spec.shape, GgufType.F32, (checkpoint.plain(spec),))
    shape = (*stack[1:], num_out, num_in)
    return GgufTensor(name, shape, type, _matrix_pieces(checkpoint, spec))


def _plain_pieces(checkpoint: Checkpoint, spec: TensorSpec) -> Iterator[np.ndarray]:
    rows = checkpoint.plain(spec)
    for start in range(0, len(rows), _PIECE_ROWS):
        yield rows[start : start + _PIECE_ROWS]


def _matrix_pieces(checkpoint: Checkpoint, spec: TensorSpec) -> Iterator[np.ndarray]:
    weight, scales = checkpoint.quantized(spec)
    if weight.ndim == 2:
        weight, scales = weight[None], scales[None]
    for matrix in map(dequantise, weight, scales):
        yield matrix.T


def _fingerprint(checkpoint: Checkpoint) -> str:
    """A digest that changes if a file of the checkpoint changes."""
    digest = hashlib.sha256(repr(checkpoint.config).encode())
    for spec in checkpoint.specs:
        path = checkpoint.ckpt_dir / spec.file_name
        status = path.stat()
        digest.update(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
