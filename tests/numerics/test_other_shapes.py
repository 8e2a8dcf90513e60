"""Compares models of other shapes than the golden ones with a forward pass in NumPy float64."""

from pathlib import Path

import numpy as np
import pytest

from milliways.model.checkpoint import Checkpoint, TensorRole
from milliways.model.config import ModelConfig
from tests.reference import NumpyGrok, small_config, write_random_model
from tests.runners import BACKENDS, load, logits_of, runner_of

# The shape, and the number of scale rows of the matrices that are quantised in row blocks.
SHAPES: dict[str, tuple[ModelConfig, dict[TensorRole, int]]] = {
    "five_experts_three_chosen": (small_config(), {TensorRole.EXPERT_LINEAR_1: 7}),
    "one_expert": (small_config(num_experts=1, num_selected_experts=1), {}),
    "all_experts_chosen": (small_config(num_experts=3, num_selected_experts=3), {}),
    "sixteen_experts_one_chosen": (
        small_config(num_experts=16, num_selected_experts=1),
        {TensorRole.ATTENTION_OUT: 12, TensorRole.EXPERT_LINEAR: 4, TensorRole.QUERY: 2},
    ),
    "one_kv_head_odd_sizes": (
        small_config(emb_size=45, num_kv_heads=1, vocab_size=151, ffn_size=37),
        {TensorRole.EXPERT_LINEAR_V: 9, TensorRole.VALUE: 3},
    ),
    "twelve_layers": (small_config(num_layers=12), {TensorRole.EXPERT_LINEAR_1: 8}),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SHAPES)
def test_logits_equal_the_numpy_reference(name: str, backend: str, tmp_path: Path) -> None:
    config, scale_rows = SHAPES[name]
    write_random_model(tmp_path, config, scale_rows)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, 40).tolist()
    # A pad token inside a prompt is never seen as a key.
    tokens[7] = config.pad_token
    with Checkpoint.open(tmp_path) as checkpoint:
        expected = NumpyGrok(checkpoint).logits(tokens)
    logits = logits_of(runner_of(load(tmp_path, backend=backend)), tokens, [5, 8, 3, 8, 8, 8])
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_pad_tokens_see_nothing_and_are_not_seen(backend: str, tmp_path: Path) -> None:
    config = small_config()
    write_random_model(tmp_path, config, {})
    tokens = [config.pad_token, config.pad_token, 5, 9, 11]
    with Checkpoint.open(tmp_path) as checkpoint:
        expected = NumpyGrok(checkpoint).logits(tokens)
    logits = logits_of(runner_of(load(tmp_path, backend=backend)), tokens, [1, 1, 3])
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-3)
