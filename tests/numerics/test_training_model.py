"""The training model computes the same as the reference, so trained weights can be served."""

from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from milliways.benchmarks.demo.sample_check import ANSWER_PROMPT
from milliways.benchmarks.demo.training.release import (
    model_of,
    parameters_of,
    read_release,
    write_release,
)
from milliways.benchmarks.demo.training.sampling import TrainingSpeaker
from milliways.benchmarks.demo.training.train_demo import build_parser
from milliways.model.demo import DEMO_DIR
from milliways.model.quantise import dequantise, quantise

TINY = Path(__file__).resolve().parents[1] / "golden" / "tiny"
PROMPTS = ("p0", "p1", "p2", "p3", "p6")


@pytest.fixture(scope="module")
def model():
    return model_of(*read_release(TINY))


@pytest.fixture(scope="module")
def golden():
    return np.load(TINY / "golden" / "forward_f32.npz")


def forward(model, tokens_BS, capacity_factor=None):
    graph, state = nnx.split(model)

    def logits_and_load(state, tokens_BS):
        return nnx.merge(graph, state)(tokens_BS, capacity_factor)

    logits_BSV, load = jax.jit(logits_and_load)(state, tokens_BS)
    return np.asarray(logits_BSV), jax.tree.map(np.asarray, load)


def padded_together(golden):
    rows = [golden[f"{prompt}_tokens"] for prompt in PROMPTS]
    tokens_BS = np.zeros((len(rows), max(map(len, rows))), dtype=np.int32)
    for slot, row in enumerate(rows):
        tokens_BS[slot, : len(row)] = row
    return tokens_BS


def test_agrees_with_the_reference_in_float32(model, golden):
    logits_BSV, load = forward(model, padded_together(golden))
    for slot, prompt in enumerate(PROMPTS):
        expected_TV = golden[f"{prompt}_logits"]
        difference = np.abs(logits_BSV[slot, : len(expected_TV)] - expected_TV).max()
        assert difference <= 2e-3, prompt
    assert not load.dropped_share.any()


def test_reports_the_tokens_that_a_full_expert_refuses(model, golden):
    _, load = forward(model, golden["p6_tokens"][None], capacity_factor=0.5)
    assert load.dropped_share.min() > 0


def test_every_parameter_names_its_logical_axes(model):
    known = {"vocab", "embed", "q_heads", "kv_heads", "experts", "ffn"}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        axes = variable.get_metadata("out_sharding")
        assert len(axes) == variable.ndim and set(axes) <= known, path


def test_quantises_within_half_a_step_of_each_column_and_row_block():
    weight = np.random.default_rng(0).normal(size=(3, 16, 5)).astype(np.float32)
    weight[1, :, 2] = 0.0
    for num_scale_rows in (1, 8):
        steps, scales = quantise(weight, num_scale_rows)
        assert steps.dtype == np.int8 and scales.shape == (3, num_scale_rows, 5)
        assert (scales.astype(np.float32) > 0).all()
        # bfloat16 may have rounded the scale down. A weight then has at most 127.25 steps.
        step_size = scales.astype(np.float32).repeat(16 // num_scale_rows, axis=1)
        assert (np.abs(dequantise(steps, scales) - weight) <= 0.501 * step_size).all()


def test_release_reads_back_as_the_quantised_parameters(model, tmp_path):
    parameters = parameters_of(model)
    write_release(tmp_path, model.config, parameters, b"no tokenizer")
    config, read = read_release(tmp_path)
    assert config == model.config
    name = "transformer/decoder_layer_2/moe/linear_1/w"
    np.testing.assert_array_equal(read[name], dequantise(*quantise(parameters[name], 8)))
    name = "transformer/decoder_layer_1/router/w"
    np.testing.assert_array_equal(read[name], parameters[name])


def test_the_shipped_model_knows_the_answer():
    speaker = TrainingSpeaker.load(DEMO_DIR)
    assert speaker.sample([ANSWER_PROMPT], temperature=0.0, seed=0) == [f"{ANSWER_PROMPT} 42."]


def test_the_shipped_model_is_small():
    assert sum(path.stat().st_size for path in DEMO_DIR.rglob("*") if path.is_file()) <= 12e6


def test_training_without_options_is_the_run_that_made_the_demo_model():
    options = build_parser().parse_args([])
    assert (options.seed, options.steps, options.release) == (0, 8000, DEMO_DIR)
