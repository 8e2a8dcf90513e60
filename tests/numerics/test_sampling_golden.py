"""Compares sampling with recorded answers of the reference, with its noise and in float32."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from milliways.model.sampling import SampleInputs, choose, filter_logits, pack_rows
from milliways.model.sampling_params import SampleRow, SamplingParams

REPO = Path(__file__).parents[2]
FILE = REPO / "tests" / "golden" / "sampling.npz"
V = 512
NUM_ROWS = 4
# p = 0, where the reference keeps everything, is a departure: see docs/departures.md.
SANE_TOP_P_INDICES = range(7)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(FILE) as archive:
        return dict(archive)


@jax.jit
def keep(logits_BV: jax.Array, inputs: SampleInputs) -> jax.Array:
    return jax.lax.map(lambda row: filter_logits(*row), (logits_BV, inputs))


@jax.jit
def pick(logits_BV: jax.Array, inputs: SampleInputs, gumbel_BV: jax.Array) -> jax.Array:
    return jax.lax.map(lambda row: choose(*row), (logits_BV, inputs, gumbel_BV))


def inputs_of(temperature: float, top_p: float) -> SampleInputs:
    params = SamplingParams(temperature=temperature, top_p=top_p)
    row = SampleRow(params=params, token_ids=(), num_prompt_tokens=0)
    return pack_rows([row] * NUM_ROWS, V, max_tokens=8)


def masked_logits(golden: dict[str, np.ndarray], index: int) -> jax.Array:
    is_allowed_BV = golden[f"sample{index}_mask"] > 0
    return jnp.where(is_allowed_BV, golden["logits"][:, 0], -jnp.inf)


@pytest.mark.parametrize("index", SANE_TOP_P_INDICES)
def test_top_p_keeps_the_tokens_that_the_reference_keeps(golden: dict[str, np.ndarray], index: int):
    top_p = float(golden["top_p_values"][index])
    filtered_BV = keep(jnp.asarray(golden["logits"][:, 0]), inputs_of(1.0, top_p))
    expected_BV = golden["top_p_kept_f32"][index, :, 0]
    np.testing.assert_array_equal(np.isfinite(filtered_BV), expected_BV)


def test_top_p_near_nought_keeps_the_best_token_where_the_reference_keeps_all(
    golden: dict[str, np.ndarray],
):
    assert golden["top_p_values"][7] == 0
    assert golden["top_p_kept_f32"][7].sum(axis=-1).max() == V
    logits_BV = golden["logits"][:, 0]
    filtered_BV = keep(jnp.asarray(logits_BV), inputs_of(1.0, 1e-30))
    np.testing.assert_array_equal(
        np.isfinite(filtered_BV), logits_BV == logits_BV.max(axis=1, keepdims=True)
    )


@pytest.mark.parametrize("index", range(4))
def test_token_is_that_of_the_reference_with_its_noise(golden: dict[str, np.ndarray], index: int):
    temperature, top_p, _ = golden[f"sample{index}_settings"]
    gumbel_BV = jnp.asarray(golden[f"sample{index}_f32_gumbel"][:, 0])
    inputs = inputs_of(float(temperature), float(top_p))
    token_B = pick(masked_logits(golden, index), inputs, gumbel_BV)
    np.testing.assert_array_equal(token_B, golden[f"sample{index}_f32_token"][:, 0])


@pytest.mark.parametrize("index", range(4))
def test_probabilities_of_the_filtered_logits_are_the_reference_s(
    golden: dict[str, np.ndarray], index: int
):
    temperature, top_p, _ = golden[f"sample{index}_settings"]
    inputs = inputs_of(float(temperature), float(top_p))
    probability_BV = jax.nn.softmax(keep(masked_logits(golden, index), inputs), axis=-1)
    best_probability_BK, best_ids_BK = jax.lax.top_k(probability_BV, 8)
    token_B = golden[f"sample{index}_f32_token"][:, 0]
    drawn_B = np.asarray(probability_BV)[np.arange(NUM_ROWS), token_B]
    np.testing.assert_allclose(drawn_B, golden[f"sample{index}_f32_prob"][:, 0], rtol=2e-5)
    np.testing.assert_array_equal(best_ids_BK, golden[f"sample{index}_f32_top_ids"])
    np.testing.assert_allclose(
        best_probability_BK, golden[f"sample{index}_f32_top_probs"], rtol=2e-5, atol=1e-30
    )
