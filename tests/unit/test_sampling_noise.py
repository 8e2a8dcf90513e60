"""The noise of sampling: a function of seed, sample and position, and of nothing else."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from milliways.model.sampling import SampleInputs, gumbel_noise, noise_key, pack_rows
from milliways.model.sampling_params import SampleRow, SamplingParams

V = 1200
MAX_TOKENS = 320


def row_of(params: SamplingParams, token_ids: tuple[int, ...] = (), prompt: int = 0) -> SampleRow:
    return SampleRow(params=params, token_ids=token_ids, num_prompt_tokens=prompt)


def inputs_of(row: SampleRow, vocab_size: int = V) -> SampleInputs:
    """The inputs of one row, without the axis of rows."""
    packed = pack_rows([row], vocab_size, MAX_TOKENS)
    return SampleInputs(*(jnp.asarray(field)[0] for field in packed))


def noise_of(row: SampleRow) -> np.ndarray:
    return np.asarray(gumbel_noise(noise_key(inputs_of(row)), V))


def test_noise_of_a_key_has_these_values_for_ever():
    row = SampleRow(
        params=SamplingParams(seed=2**40 + 12345),
        token_ids=range(77),
        num_prompt_tokens=7,
        sample_index=3,
    )
    expected = [-0.782133639, 1.01656854, 0.0193953104, 1.1693424, -0.815599322, -0.225702226]
    np.testing.assert_allclose(noise_of(row)[:6], expected, rtol=1e-6)


@pytest.mark.parametrize("is_partitionable", [False, True])
def test_noise_does_not_depend_on_the_process_wide_setting(is_partitionable: bool):
    row = row_of(SamplingParams(seed=7), (1, 2))
    expected = noise_of(row)
    with jax.threefry_partitionable(is_partitionable):
        assert noise_of(row).tobytes() == expected.tobytes()


def test_noise_of_a_token_does_not_depend_on_the_size_of_the_vocabulary():
    inputs = inputs_of(row_of(SamplingParams(seed=7)))
    few_V, many_V = gumbel_noise(noise_key(inputs), 100), gumbel_noise(noise_key(inputs), V)
    assert np.asarray(few_V).tobytes() == np.asarray(many_V[:100]).tobytes()


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1])
def test_key_is_that_of_jax_for_seeds_of_32_bits(seed: int):
    words_2 = np.asarray(inputs_of(row_of(SamplingParams(seed=seed))).seed_2)
    expected = jax.random.key(np.uint32(seed), impl="threefry2x32")
    assert words_2.tolist() == jax.random.key_data(expected).tolist()


@pytest.mark.parametrize("seed", [2**32, 2**40 + 3, 2**63 - 1])
def test_key_is_that_of_jax_for_seeds_of_64_bits(seed: int):
    words_2 = np.asarray(inputs_of(row_of(SamplingParams(seed=seed))).seed_2)
    with jax.enable_x64(True):
        expected = jax.random.key_data(jax.random.key(seed, impl="threefry2x32"))
    assert words_2.tolist() == expected.tolist()


def test_seed_sample_index_and_position_each_change_the_noise():
    base = row_of(SamplingParams(seed=7), (1, 2))
    others = [
        base,
        replace(base, params=SamplingParams(seed=8)),
        replace(base, params=SamplingParams(seed=7 + 2**32)),
        replace(base, sample_index=1),
        replace(base, token_ids=(1, 2, 3)),
        replace(base, sample_index=2, token_ids=()),
    ]
    assert len({noise_of(row).tobytes() for row in others}) == len(others)


def test_noise_depends_on_the_number_of_tokens_and_not_on_the_prompt_boundary():
    params = SamplingParams(seed=7)
    assert (
        noise_of(row_of(params, (1, 2), 1)).tobytes() == noise_of(row_of(params, (8, 9))).tobytes()
    )


@pytest.mark.parametrize(("bits", "highest"), [(0, 22.9), (2**32 - 1, -2.8)])
def test_noise_is_finite_at_both_ends_of_the_bits(
    monkeypatch: pytest.MonkeyPatch, bits: int, highest: float
):
    monkeypatch.setattr(jax.random, "bits", lambda key, shape, dtype: jnp.full(shape, bits, dtype))
    noise_V = np.asarray(gumbel_noise(noise_key(inputs_of(row_of(SamplingParams()), 4)), 4))
    np.testing.assert_allclose(noise_V, highest, atol=0.1)
