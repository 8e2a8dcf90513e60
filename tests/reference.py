"""Grok-1's forward pass once more, in NumPy float64, straight from the formulas: slow, and on
purpose sharing no line with `model`. Also makes random models in any shape the format allows.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import ml_dtypes
import numpy as np

from milliways.model.checkpoint import Checkpoint, TensorRole, TensorSpec, write_checkpoint
from milliways.model.config import ModelConfig


def small_config(**changes: float) -> ModelConfig:
    """A shape that shares no size with the golden ones; every field can be changed."""
    fields: dict[str, float] = {
        "emb_size": 48,
        "key_size": 8,
        "num_q_heads": 6,
        "num_kv_heads": 3,
        "num_layers": 2,
        "vocab_size": 160,
        "ffn_size": 56,
        "num_experts": 5,
        "num_selected_experts": 3,
        "sequence_len": 96,
        "embedding_multiplier_scale": 6.5,
        "output_multiplier_scale": 0.7,
        "attn_output_multiplier": 0.4,
    }
    return ModelConfig(**(fields | changes))  # pyright: ignore[reportArgumentType]


def write_random_model(
    model_dir: Path, config: ModelConfig, scale_rows: dict[TensorRole, int], seed: int = 0
) -> None:
    """A model directory of random weights; roles not in `scale_rows` have one scale row."""
    rng = np.random.default_rng(seed)

    def tensor(spec: TensorSpec):
        if not spec.quantized:
            spread = 1.0 if len(spec.shape) > 1 else 0.3
            offset = 0.0 if len(spec.shape) > 1 else 1.0
            return (offset + spread * rng.standard_normal(spec.shape)).astype(np.float32)
        *lead, num_rows, num_columns = spec.shape
        weight = rng.integers(-127, 128, spec.shape, dtype=np.int8)
        num_groups = scale_rows.get(spec.role, 1)
        scales = rng.uniform(0.5, 1.5, (*lead, num_groups, num_columns)) / (73 * num_rows**0.5)
        return weight, scales.astype(ml_dtypes.bfloat16)

    write_checkpoint(model_dir / "ckpt-0", config, tensor)
    (model_dir / "config.json").write_text(json.dumps(asdict(config)), encoding="utf-8")


class NumpyGrok:
    """The reference of the tests: all positions of one sequence at once, no cache."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.config = checkpoint.config
        self._checkpoint = checkpoint

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Logits [T, V] in float64."""
        tokens = np.asarray(token_ids)
        embedding = self._plain(TensorRole.EMBEDDING)
        hidden = embedding[tokens] * self.config.embedding_multiplier_scale
        for layer in range(self.config.num_layers):
            hidden = self._layer(layer, hidden, tokens)
        hidden = _norm(hidden, self._plain(TensorRole.FINAL_NORM))
        return hidden @ embedding.T * self.config.output_multiplier_scale

    def _layer(self, layer: int, hidden: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        def norm(x: np.ndarray, role: TensorRole) -> np.ndarray:
            return _norm(x, self._plain(role, layer))

        attended = self._attend(layer, norm(hidden, TensorRole.PRE_ATTENTION_NORM), tokens)
        hidden = hidden + norm(attended, TensorRole.POST_ATTENTION_NORM)
        mixed = self._experts(layer, norm(hidden, TensorRole.PRE_MOE_NORM))
        return hidden + norm(mixed, TensorRole.POST_MOE_NORM)

    def _attend(self, layer: int, x: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        config, count = self.config, len(tokens)
        heads = config.num_q_heads // config.num_kv_heads
        query, key, value = (
            (x @ self._matrix(role, layer)).reshape(count, -1, config.key_size)
            for role in (TensorRole.QUERY, TensorRole.KEY, TensorRole.VALUE)
        )
        query, key = _rotate(query), _rotate(key)
        seen = np.tril(np.ones((count, count), bool)) & (tokens != config.pad_token)[None, :]
        mixed = np.zeros_like(query)
        for head in range(config.num_q_heads):
            scores = query[:, head] @ key[:, head // heads].T * config.attn_output_multiplier
            weights = np.where(seen, np.exp(30 * np.tanh(scores / 30)), 0)
            total = weights.sum(1, keepdims=True)
            mixed[:, head] = weights @ value[:, head // heads] / np.where(total > 0, total, 1)
        return mixed.reshape(count, -1) @ self._matrix(TensorRole.ATTENTION_OUT, layer)

    def _experts(self, layer: int, x: np.ndarray) -> np.ndarray:
        scores = x @ self._plain(TensorRole.GATE, layer)
        gates = np.exp(scores - scores.max(1, keepdims=True))
        gates /= gates.sum(1, keepdims=True)
        linear, down, up = (
            self._matrix(role, layer)
            for role in (
                TensorRole.EXPERT_LINEAR,
                TensorRole.EXPERT_LINEAR_1,
                TensorRole.EXPERT_LINEAR_V,
            )
        )
        mixed = np.zeros_like(x)
        for row, token in enumerate(x):
            chosen = np.argsort(-gates[row], kind="stable")[: self.config.num_selected_experts]
            for expert in chosen:
                inner = _gelu(token @ linear[expert]) * (token @ up[expert])
                mixed[row] += gates[row, expert] * (inner @ down[expert])
        return mixed

    def _plain(self, role: TensorRole, layer: int | None = None) -> np.ndarray:
        return self._checkpoint.plain(self._checkpoint.find(role, layer)).astype(np.float64)

    def _matrix(self, role: TensorRole, layer: int) -> np.ndarray:
        weight, scales = self._checkpoint.quantized(self._checkpoint.find(role, layer))
        repeats = weight.shape[-2] // scales.shape[-2]
        return weight.astype(np.float64) * np.repeat(scales.astype(np.float64), repeats, axis=-2)


def _norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale


def _rotate(heads: np.ndarray) -> np.ndarray:
    count, _, width = heads.shape
    angles = np.outer(np.arange(count), 10000.0 ** (-np.arange(0, width, 2) / width))
    turn = np.exp(1j * angles)[:, None, :]
    turned = (heads[..., : width // 2] + 1j * heads[..., width // 2 :]) * turn
    return np.concatenate([turned.real, turned.imag], axis=-1)


def _gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
