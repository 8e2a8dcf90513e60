"""The GPU's kernels, interpreted on the CPU: right in any shape, the same bits in any batch.

What only a GPU can show (its own arithmetic, its speed) is not tested here. That a GPU's compiler
is given something it takes is, as far as lowering goes.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from milliways.model.config import GROK_1
from milliways.model.decoder import Decoder
from milliways.model.kv_cache import StepBatch, make_kv_cache
from milliways.model.ops import PureOps
from milliways.model.ops.gpu import GpuOps
from milliways.model.ops.gpu_experts import group_by_expert, max_num_tiles
from milliways.model.params import ExpertParams, QuantizedMatrix
from tests.runners import in_eights, load, logits_of, runner_of

PURE = PureOps()
FAST, FIXED = GpuOps(), GpuOps(deterministic=True)
MODES = pytest.mark.parametrize("ops", [FAST, FIXED], ids=["default", "deterministic"])
# Under float32 both modes run products in the same tile.
PRODUCTS = pytest.mark.parametrize(
    ("ops", "dtype"),
    [(FAST, jnp.float32), (FAST, jnp.bfloat16), (FIXED, jnp.bfloat16)],
    ids=["f32", "bf16", "bf16-deterministic"],
)
DTYPES = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])


def run(method, *arguments, **constants):
    """Calls a method under jit. Without jit, each operation would be compiled on its own."""
    return jax.jit(partial(method, **constants))(*arguments)


def rows(num_rows: int, width: int, dtype: jnp.dtype = jnp.float32, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((num_rows, width)), dtype)


def quantized(
    shape: tuple[int, ...], num_groups: int = 1, dtype: type = np.int8, seed: int = 1
) -> QuantizedMatrix:
    rng = np.random.default_rng(seed)
    limits = np.iinfo(dtype)
    weight = rng.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True)
    scales = rng.uniform(0.5, 1.5, (*shape[:-2], num_groups, shape[-1])) / limits.max
    return QuantizedMatrix(weight=jnp.asarray(weight), scales=jnp.asarray(scales, jnp.bfloat16))


def dequantized(matrix: QuantizedMatrix) -> np.ndarray:
    repeats = matrix.weight.shape[-2] // matrix.num_scale_rows
    scales = np.asarray(matrix.scales, np.float64)
    return np.asarray(matrix.weight, np.float64) * np.repeat(scales, repeats, axis=-2)


def experts_of(num_experts: int, width: int, hidden: int, down_groups: int = 1) -> ExpertParams:
    return ExpertParams(
        gate_proj=quantized((num_experts, width, hidden), seed=1),
        up_proj=quantized((num_experts, width, hidden), seed=2),
        down_proj=quantized((num_experts, hidden, width), down_groups, seed=3),
    )


@PRODUCTS
@pytest.mark.parametrize(
    ("shape", "num_groups", "weight_dtype"),
    [((1, 45, 151), 1, np.int8), ((40, 45, 37), 3, np.int16), ((130, 256, 64), 8, np.int8)],
)
def test_linear_in_any_shape(
    ops: GpuOps,
    dtype: jnp.dtype,
    shape: tuple[int, int, int],
    num_groups: int,
    weight_dtype: type,
) -> None:
    num_rows, num_in, num_out = shape
    matrix = quantized((num_in, num_out), num_groups, weight_dtype)
    rows_TK = rows(num_rows, num_in, dtype)
    expected = np.asarray(rows_TK, np.float64) @ dequantized(matrix)
    # Sums are float32 under bfloat16 activations too, and int16 weights are not rounded.
    np.testing.assert_allclose(run(ops.linear, rows_TK, matrix), expected, rtol=1e-5, atol=1e-4)


@PRODUCTS
@pytest.mark.parametrize("num_rows", [1, 40])
def test_experts_agree_with_pure_jax(ops: GpuOps, dtype: jnp.dtype, num_rows: int) -> None:
    experts = experts_of(5, 45, 37)
    rng = np.random.default_rng(3)
    # Some assignments are padding, some belong to another shard.
    expert_ids_TA = jnp.asarray(rng.integers(-1, 7, (num_rows, 3)), jnp.int32)
    hidden_TD = rows(num_rows, 45, dtype)
    expected = np.asarray(run(PURE.expert_ffn, hidden_TD, expert_ids_TA, experts))
    outputs = np.asarray(run(ops.expert_ffn, hidden_TD, expert_ids_TA, experts))
    tolerance = 1e-4 if dtype == jnp.float32 else 0.02 * np.abs(expected).max()
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=tolerance)
    is_elsewhere = (np.asarray(expert_ids_TA) < 0) | (np.asarray(expert_ids_TA) >= 5)
    assert not outputs[is_elsewhere].any()
    assert outputs[~is_elsewhere].any(axis=-1).all()


def test_experts_with_blocked_scales_agree_with_pure_jax() -> None:
    experts = experts_of(3, 32, 80, down_groups=8)
    expert_ids_TA = jnp.asarray([[0, 2], [2, 1], [1, 0]], jnp.int32)
    hidden_TD = rows(3, 32)
    np.testing.assert_allclose(
        run(FIXED.expert_ffn, hidden_TD, expert_ids_TA, experts),
        run(PURE.expert_ffn, hidden_TD, expert_ids_TA, experts),
        rtol=1e-5,
        atol=1e-4,
    )


@MODES
def test_idle_experts_are_not_computed(ops: GpuOps) -> None:
    experts, idle = experts_of(4, 16, 24), jnp.asarray([0, 3])

    def spoil(matrix: QuantizedMatrix) -> QuantizedMatrix:
        return matrix.replace(scales=matrix.scales.at[idle].set(jnp.nan))

    poisoned = ExpertParams(
        gate_proj=spoil(experts.gate_proj),
        up_proj=spoil(experts.up_proj),
        down_proj=spoil(experts.down_proj),
    )
    expert_ids_TA = jnp.asarray([[1, 2]] * 20, jnp.int32)
    hidden_TD = rows(20, 16)
    outputs = run(ops.expert_ffn, hidden_TD, expert_ids_TA, experts)
    np.testing.assert_array_equal(run(ops.expert_ffn, hidden_TD, expert_ids_TA, poisoned), outputs)


@pytest.mark.parametrize("seed", range(6))
def test_grouping_gives_each_assignment_a_row_in_a_tile_of_its_expert(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_tokens, num_experts, tile_rows = int(rng.integers(1, 50)), int(rng.integers(1, 9)), 4
    ids_TA = rng.integers(-2, num_experts + 2, (num_tokens, 2))
    grouping = run(
        group_by_expert,
        jnp.asarray(ids_TA, jnp.int32),
        num_experts=num_experts,
        tile_rows=tile_rows,
    )
    grouping = jax.tree.map(np.asarray, grouping)
    tile_experts = np.asarray(grouping.tile_experts_I)
    places, taken = np.asarray(grouping.places_TA), set()
    for (token, rank), expert in np.ndenumerate(ids_TA):
        if not 0 <= expert < num_experts:
            assert not grouping.is_held_TA[token, rank]
            continue
        place = int(places[token, rank])
        assert tile_experts[place // tile_rows] == expert
        assert grouping.tokens_C[place] == token
        taken.add(place)
    assert len(taken) == int(np.asarray(grouping.is_held_TA).sum())
    assert set(tile_experts) - {-1} == set(ids_TA[(ids_TA >= 0) & (ids_TA < num_experts)])


def test_number_of_tiles_is_the_least_that_holds_any_choice() -> None:
    assert max_num_tiles(2, 8, 16) == 2
    assert max_num_tiles(16, 8, 16) == 8
    assert max_num_tiles(512, 8, 32) == 16 + 7


@MODES
def test_norm_agrees_with_pure_jax(ops: GpuOps) -> None:
    for width in (45, 1100):
        hidden_TD, scale_D = rows(3, width), rows(1, width)[0]
        np.testing.assert_allclose(
            run(ops.rms_norm, hidden_TD, scale_D),
            run(PURE.rms_norm, hidden_TD, scale_D),
            rtol=1e-5,
        )


@MODES
def test_gate_agrees_with_pure_jax(ops: GpuOps) -> None:
    hidden_TD, gate_DE = rows(7, 300), rows(300, 5, seed=2)
    expert_ids_TA, gate_weights_TA = run(ops.gate, hidden_TD, gate_DE, num_selected=3)
    expected_ids_TA, expected_weights_TA = run(PURE.gate, hidden_TD, gate_DE, num_selected=3)
    np.testing.assert_array_equal(expert_ids_TA, expected_ids_TA)
    np.testing.assert_allclose(gate_weights_TA, expected_weights_TA, rtol=2e-5, atol=1e-7)


@MODES
def test_gate_takes_the_lower_expert_of_a_tie_and_does_not_renormalise(ops: GpuOps) -> None:
    gate_DE = jnp.zeros((4, 6), jnp.float32).at[:, 3].set(1.0)
    expert_ids_TA, gate_weights_TA = run(
        ops.gate, jnp.ones((1, 4), jnp.float32), gate_DE, num_selected=3
    )
    assert expert_ids_TA.tolist() == [[3, 0, 1]]
    assert float(gate_weights_TA.sum()) < 1.0 - 1e-3


def test_rope_and_weigh_agree_with_pure_jax() -> None:
    heads_THK = jnp.asarray(np.random.default_rng(6).standard_normal((5, 3, 10)), jnp.float32)
    positions_T = jnp.asarray([0, 7, 100, -1, 8000], jnp.int32)
    np.testing.assert_allclose(
        run(FAST.rope, heads_THK, positions_T), run(PURE.rope, heads_THK, positions_T), atol=1e-5
    )
    weights_TA = rows(5, 3)
    np.testing.assert_allclose(
        run(FAST.weigh, heads_THK, weights_TA), run(PURE.weigh, heads_THK, weights_TA), atol=1e-5
    )


class Attention:
    """Five rows of three sequences, one of them padding, over a cache of unusual sizes."""

    def __init__(self, dtype: jnp.dtype, fill: float = 0.0) -> None:
        rng = np.random.default_rng(5)
        self.tables_TM = np.asarray([[7, 2, 9, 4], [7, 2, 9, 4], [1, 0, 0, 0], [3, 5, 8, 6]] * 2)[
            :5
        ]
        self.positions_T = np.asarray([150, 20, 3, -1, 64])
        visible = rng.random((10, 40)) < 0.9
        visible[1] = False
        # Positions that no row may see hold arbitrary values.
        stale = ~visible[:, :, None, None]
        stale[4, 31:] = True
        self.query_THK = jnp.asarray(rng.standard_normal((5, 6, 10)), dtype)
        keys, values = rng.standard_normal((2, 10, 40, 2, 10))
        self.cache = [
            *(jnp.asarray(np.where(stale, fill, blocks), dtype) for blocks in (keys, values)),
            jnp.asarray(visible),
        ]

    def by(self, ops: GpuOps | PureOps, chosen: list[int] | None = None) -> np.ndarray:
        some = slice(None) if chosen is None else chosen
        return np.asarray(
            run(
                ops.attention,
                self.query_THK[jnp.asarray(np.arange(5)[some])],
                *self.cache,
                jnp.asarray(self.tables_TM[some], jnp.int32),
                jnp.asarray(self.positions_T[some], jnp.int32),
                logit_scale=0.7,
            )
        )


@DTYPES
def test_attention_agrees_with_pure_jax(dtype: jnp.dtype) -> None:
    attention = Attention(dtype)
    outputs = attention.by(FAST)
    tolerance = 1e-5 if dtype == jnp.float32 else 0.02
    np.testing.assert_allclose(outputs, attention.by(PURE), rtol=1e-5, atol=tolerance)
    assert not outputs[[2, 3]].any() and outputs[[0, 1, 4]].any()


def test_attention_never_reads_old_contents_of_a_block() -> None:
    dirty = Attention(jnp.float32, fill=float("nan")).by(FAST)
    np.testing.assert_array_equal(dirty, Attention(jnp.float32).by(FAST))


def test_attention_gives_a_row_the_same_bits_beside_any_other() -> None:
    attention = Attention(jnp.bfloat16)
    whole = attention.by(FAST)
    for chosen in ([4], [0]):
        np.testing.assert_array_equal(attention.by(FAST, chosen), whole[chosen])


@pytest.mark.parametrize(("dtype", "sizes"), [(jnp.float32, [33]), (jnp.bfloat16, [1, 33])])
def test_deterministic_products_keep_a_row_s_bits_in_any_batch(
    dtype: jnp.dtype, sizes: list[int]
) -> None:
    matrix, experts = quantized((64, 70), 2), experts_of(4, 64, 96)
    gate_DE, scale_D = rows(64, 4, seed=2), rows(1, 64)[0]
    rng = np.random.default_rng(7)
    hidden_TD = rows(70, 64, dtype)
    expert_ids_TA = jnp.asarray(rng.integers(-1, 4, (70, 2)), jnp.int32)

    @jax.jit
    def compute(
        matrix: QuantizedMatrix,
        experts: ExpertParams,
        hidden_TD: jax.Array,
        expert_ids_TA: jax.Array,
    ) -> tuple[jax.Array, ...]:
        return (
            FIXED.linear(hidden_TD, matrix),
            FIXED.expert_ffn(hidden_TD, expert_ids_TA, experts),
            FIXED.rms_norm(hidden_TD, scale_D),
            *FIXED.gate(hidden_TD, gate_DE, 2),
        )

    whole = compute(matrix, experts, hidden_TD, expert_ids_TA)
    for num_rows in sizes:
        for _ in range(5):
            some = rng.permutation(70)[:num_rows]
            results = compute(matrix, experts, hidden_TD[some], expert_ids_TA[some])
            for result, expected in zip(results, whole, strict=True):
                np.testing.assert_array_equal(result, np.asarray(expected)[some])


@pytest.mark.parametrize(("ops", "prompt"), [(FAST, "p4"), (FIXED, "p0")])
def test_answers_equal_the_reference(ops: GpuOps, prompt: str, golden_dir: Path) -> None:
    decoder, params = load(golden_dir / "tiny", backend="pure")
    runner = runner_of((Decoder(config=decoder.config, dtype=decoder.dtype, ops=ops), params))
    with np.load(golden_dir / "tiny" / "golden" / "forward_f32.npz") as forward:
        tokens, expected = forward[f"{prompt}_tokens"].tolist(), forward[f"{prompt}_logits"]
    logits = logits_of(runner, tokens, in_eights(len(tokens)))
    assert np.abs(logits - expected).max() <= 2e-3


@MODES
@pytest.mark.parametrize(
    ("dtype", "num_rows"), [(jnp.bfloat16, 1), (jnp.bfloat16, 2048), (jnp.float32, 2048)]
)
def test_kernels_lower_for_a_gpu_at_full_width(
    ops: GpuOps, dtype: jnp.dtype, num_rows: int
) -> None:
    """Lowers the kernels, which needs no GPU. No weight may be converted outside of them."""
    ops = GpuOps(deterministic=ops.deterministic, interpret=False)
    width, ffn, kv_heads, key_size = 6144, 32768, GROK_1.num_kv_heads, GROK_1.key_size

    def matrix(*shape: int, num_groups: int = 1) -> QuantizedMatrix:
        scales = jax.ShapeDtypeStruct((*shape[:-2], num_groups, shape[-1]), jnp.bfloat16)
        return QuantizedMatrix(weight=jax.ShapeDtypeStruct(shape, jnp.int8), scales=scales)

    experts = ExpertParams(
        gate_proj=matrix(8, width, ffn),
        up_proj=matrix(8, width, ffn),
        down_proj=matrix(8, ffn, width, num_groups=8),
    )
    hidden_TD = jax.ShapeDtypeStruct((num_rows, width), dtype)
    blocks_NPRK = jax.ShapeDtypeStruct((512, 16, kv_heads, key_size), dtype)
    calls = {
        "linear": (ops.linear, hidden_TD, matrix(width, width, num_groups=8)),
        "expert_ffn": (
            ops.expert_ffn,
            hidden_TD,
            jax.ShapeDtypeStruct((num_rows, 2), jnp.int32),
            experts,
        ),
        "attention": (
            lambda *arrays: ops.attention(*arrays, 0.1),
            jax.ShapeDtypeStruct((num_rows, 48, key_size), dtype),
            blocks_NPRK,
            blocks_NPRK,
            jax.ShapeDtypeStruct((512, 16), jnp.bool),
            jax.ShapeDtypeStruct((num_rows, 512), jnp.int32),
            jax.ShapeDtypeStruct((num_rows,), jnp.int32),
        ),
        "rms_norm": (ops.rms_norm, hidden_TD, jax.ShapeDtypeStruct((width,), jnp.float32)),
        "gate": (
            lambda hidden_TD, gate_DE: ops.gate(hidden_TD, gate_DE, 2),
            hidden_TD,
            jax.ShapeDtypeStruct((width, 8), jnp.float32),
        ),
    }
    for name, (function, *arguments) in calls.items():
        text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
        uses_kernel = ops.deterministic or name not in ("rms_norm", "gate")
        assert ("xla.gpu.triton" in text) == uses_kernel, name
        for size in (f"{width}x{width}", f"{width}x{ffn}", f"{ffn}x{width}"):
            assert f"{size}xbf16>" not in text and f"{size}xf32>" not in text, name


def test_every_rounding_of_a_layer_is_a_reduce_precision(golden_dir: Path) -> None:
    """XLA removes other roundings, if the same program converts back to float32."""
    loaded, params = load(golden_dir / "tiny", "bfloat16", "pure")
    decoder = Decoder(config=loaded.config, dtype=loaded.dtype, ops=FIXED)
    row = jnp.zeros(2, jnp.int32)
    batch = StepBatch(row, row, row, jnp.zeros((2, 4), jnp.int32), row)
    cache = make_kv_cache(decoder.config, decoder.config.num_layers, 4, 16, decoder.dtype)
    traced = jax.make_jaxpr(decoder.step)(params, batch, cache)
    made_by = list(makers_of_roundings(traced.jaxpr))
    # Attention's input, query, key, value, what attention mixed, the experts' input and outputs.
    assert len(made_by) == 7 * decoder.config.num_layers + 1
    assert set(made_by) == {"reduce_precision"}


def makers_of_roundings(jaxpr: Any) -> Iterator[str]:
    """The names of the operations whose results are converted from float32 to bfloat16."""
    makers = {var: eqn.primitive.name for eqn in jaxpr.eqns for var in eqn.outvars}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            # A kernel writes what it rounds, so XLA cannot remove the rounding.
            continue
        if eqn.primitive.name == "convert_element_type":
            (value,) = eqn.invars
            pair = (value.aval.dtype, eqn.outvars[0].aval.dtype)
            if pair == (jnp.float32, jnp.bfloat16):
                yield makers.get(value, "an argument")
        for inner in jaxprs_in_params(eqn.params):
            yield from makers_of_roundings(inner)
