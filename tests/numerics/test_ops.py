"""Rules for kernels that a test of the whole forward pass would not check."""

import jax
import jax.numpy as jnp
import numpy as np

from milliways.model.ops import PureOps
from milliways.model.params import ExpertParams, QuantizedMatrix

OPS = PureOps()


def make_experts(num_experts: int, width: int = 16, hidden: int = 24) -> ExpertParams:
    rng = np.random.default_rng(0)

    def matrix(num_in: int, num_out: int) -> QuantizedMatrix:
        weight = rng.integers(-127, 128, (num_experts, num_in, num_out), dtype=np.int8)
        scales = rng.uniform(0.01, 0.02, (num_experts, 1, num_out))
        return QuantizedMatrix(weight=jnp.asarray(weight), scales=jnp.asarray(scales, jnp.bfloat16))

    return ExpertParams(
        gate_proj=matrix(width, hidden),
        up_proj=matrix(width, hidden),
        down_proj=matrix(hidden, width),
    )


def poison(experts: ExpertParams, expert_ids: list[int]) -> ExpertParams:
    """The same experts, but some give NaN if they are computed."""

    def spoil(matrix: QuantizedMatrix) -> QuantizedMatrix:
        scales = matrix.scales.at[jnp.asarray(expert_ids)].set(jnp.nan)
        return QuantizedMatrix(weight=matrix.weight, scales=scales)

    return ExpertParams(
        gate_proj=spoil(experts.gate_proj),
        up_proj=spoil(experts.up_proj),
        down_proj=spoil(experts.down_proj),
    )


def test_only_chosen_experts_are_computed() -> None:
    experts = make_experts(8)
    hidden_TD = jnp.asarray(np.random.default_rng(1).standard_normal((11, 16)), jnp.float32)
    expert_ids_TA = jnp.asarray([[1, 6]] * 11, jnp.int32)
    outputs = OPS.expert_ffn(hidden_TD, expert_ids_TA, experts)
    poisoned = OPS.expert_ffn(hidden_TD, expert_ids_TA, poison(experts, [0, 2, 3, 4, 5, 7]))
    np.testing.assert_array_equal(outputs, poisoned)


def test_loop_over_tiles_does_not_run_for_idle_experts() -> None:
    """The loop over an expert's tiles runs once for each tile, and never for an idle expert."""
    experts = make_experts(8)
    hidden_TD = jnp.ones((3, 16), jnp.float32)
    expert_ids_TA = jnp.asarray([[2], [2], [5]], jnp.int32)
    jaxpr = jax.make_jaxpr(OPS.expert_ffn)(hidden_TD, expert_ids_TA, experts)
    assert "cond[" in str(jaxpr), "the weights of idle experts must stand behind a branch"


def test_experts_of_other_shards_yield_zeros() -> None:
    experts = make_experts(2)
    hidden_TD = jnp.ones((3, 16), jnp.float32)
    outputs = OPS.expert_ffn(hidden_TD, jnp.asarray([[0, 2], [-1, 1], [7, -3]]), experts)
    assert not np.asarray(outputs)[[0, 1, 2, 2], [1, 0, 0, 1]].any()
    assert np.asarray(outputs)[[0, 1], [0, 1]].any(axis=-1).all()


def test_gate_takes_the_lower_expert_of_a_tie_and_does_not_renormalise() -> None:
    gate_DE = jnp.zeros((4, 6), jnp.float32).at[:, 3].set(1.0)
    expert_ids_TA, gate_weights_TA = OPS.gate(jnp.ones((1, 4), jnp.float32), gate_DE, 3)
    assert expert_ids_TA.tolist() == [[3, 0, 1]]
    assert float(gate_weights_TA.sum()) < 1.0 - 1e-3


def test_blocked_scales_are_exact() -> None:
    rng = np.random.default_rng(2)
    weight = rng.integers(-127, 128, (24, 10), dtype=np.int8)
    scales = jnp.asarray(rng.uniform(0.01, 0.5, (6, 10)), jnp.bfloat16)
    rows_TK = rng.standard_normal((5, 24)).astype(np.float32)
    matrix = QuantizedMatrix(weight=jnp.asarray(weight), scales=scales)
    full = weight * np.repeat(np.asarray(scales, np.float64), 4, axis=0)
    result = OPS.linear(jnp.asarray(rows_TK), matrix)
    np.testing.assert_allclose(result, rows_TK @ full, rtol=2e-5, atol=2e-4)


def test_old_contents_of_a_block_are_never_seen() -> None:
    """Positions after the sequence, and invisible ones, may hold any value, even NaN."""
    rng = np.random.default_rng(3)
    keys, values = rng.standard_normal((2, 6, 16, 2, 8)).astype(np.float32)
    query_THK = jnp.asarray(rng.standard_normal((3, 4, 8)), jnp.float32)
    visible = np.ones((6, 16), bool)
    visible[2, 3] = False
    tables = jnp.asarray([[2, 4, 0], [2, 4, 0], [5, 0, 0]], jnp.int32)
    positions = jnp.asarray([20, 2, -1], jnp.int32)

    def attend(fill: float) -> np.ndarray:
        stale = np.ones((6, 16), bool)
        stale[2] = ~visible[2]
        stale[4, :5] = False
        blocks = [np.where(stale[:, :, None, None], fill, array) for array in (keys, values)]
        return np.asarray(
            OPS.attention(
                query_THK,
                *(jnp.asarray(array, jnp.float32) for array in blocks),
                jnp.asarray(visible),
                tables,
                positions,
                0.3,
            )
        )

    clean, dirty = attend(0.0), attend(float("nan"))
    np.testing.assert_array_equal(clean, dirty)
    assert clean[:2].any() and not clean[2].any()
