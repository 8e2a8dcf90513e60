"""Compares each compiled kernel with plain JAX, at sizes that are no multiple of a vector."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from milliways.model.activations import Activations, quantise_head
from milliways.model.checkpoint import Checkpoint
from milliways.model.ops import NativeOps, PureOps
from milliways.model.ops.native import EXACT_INT16, MappedLoader, NativeLoader
from milliways.model.params import (
    DeviceLoader,
    ExpertParams,
    Loader,
    MappedMatrix,
    PackedMatrix,
    load_experts,
)
from milliways.model.runner import StepMode
from tests.runners import in_eights, load, logits_of, runner_of

NATIVE = NativeOps()
# rows, inputs, outputs, scale rows
SIZES = [(1, 8, 1, 1), (3, 37, 33, 1), (5, 45, 64, 9), (8, 70, 31, 7), (13, 96, 100, 3)]


def random_matrix(
    rng: np.random.Generator, num_in: int, num_out: int, num_groups: int
) -> tuple[np.ndarray, np.ndarray]:
    """Random int8 weights, with -128, which symmetric quantisers never produce."""
    weight = rng.integers(-128, 128, (num_in, num_out), dtype=np.int8)
    scales = rng.uniform(0.001, 0.02, (num_groups, num_out)).astype(jnp.bfloat16)
    return weight, scales


def loaders(activations: Activations) -> tuple[Loader, Loader]:
    return NativeLoader(activations), DeviceLoader(activations=activations)


@pytest.mark.parametrize("activations", Activations)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_linear_equals_the_plain_kernels(
    size: tuple[int, int, int, int], activations: Activations
) -> None:
    num_rows, num_in, num_out, num_groups = size
    rng = np.random.default_rng(num_in)
    matrix = random_matrix(rng, num_in, num_out, num_groups)
    rows_TK = jnp.asarray(rng.standard_normal((num_rows, num_in)), jnp.float32)
    native, plain = (loader.matrix(*matrix) for loader in loaders(activations))
    expected = PureOps(activations).linear(rows_TK, plain)
    np.testing.assert_allclose(NATIVE.linear(rows_TK, native), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("activations", Activations)
@pytest.mark.parametrize("groups", [(1, 1, 1), (5, 3, 11)], ids=str)
@pytest.mark.parametrize("num_rows", [1, 7, 29])
def test_experts_equal_the_plain_kernels(
    num_rows: int, groups: tuple[int, int, int], activations: Activations
) -> None:
    rng = np.random.default_rng(num_rows)
    width, hidden, num_experts = 45, 77, 3

    def experts_of(loader: Loader, seed: int) -> ExpertParams:
        rng = np.random.default_rng(seed)

        def stack(num_in: int, num_out: int, num_groups: int):
            parts = [random_matrix(rng, num_in, num_out, num_groups) for _ in range(num_experts)]
            return loader.stack(parts, num_experts)

        return ExpertParams(
            gate_proj=stack(width, hidden, groups[0]),
            up_proj=stack(width, hidden, groups[1] * 3),
            down_proj=stack(hidden, width, groups[2]),
        )

    rows_TD = jnp.asarray(rng.standard_normal((num_rows, width)), jnp.float32)
    # Ids outside the stack belong to other shards.
    ids_TA = jnp.asarray(rng.integers(-1, num_experts + 2, (num_rows, 2)), jnp.int32)
    native, plain = (experts_of(loader, 5) for loader in loaders(activations))
    expected = PureOps(activations).expert_ffn(rows_TD, ids_TA, plain)
    result = np.asarray(NATIVE.expert_ffn(rows_TD, ids_TA, native))
    # If hidden values differ in the last bit, they may be rounded to different int8 values.
    tolerance = (1e-6 if activations is Activations.EXACT else 2e-2) * np.abs(expected).max()
    np.testing.assert_allclose(result, expected, rtol=0, atol=tolerance)
    held = (np.asarray(ids_TA) >= 0) & (np.asarray(ids_TA) < num_experts)
    assert not result[~held].any() and result[held].any(axis=-1).all()


@pytest.mark.parametrize("num_experts", [1, 5, 8, 19])
def test_gate_equals_the_plain_kernels(num_experts: int) -> None:
    rng = np.random.default_rng(num_experts)
    rows_TD = jnp.asarray(rng.standard_normal((9, 37)), jnp.float32)
    gate_DE = jnp.asarray(rng.standard_normal((37, num_experts)), jnp.float32)
    num_selected = min(3, num_experts)
    ids_TA, weights_TA = NATIVE.gate(rows_TD, gate_DE, num_selected)
    expected_ids_TA, expected_TA = PureOps().gate(rows_TD, gate_DE, num_selected)
    np.testing.assert_array_equal(ids_TA, expected_ids_TA)
    np.testing.assert_allclose(weights_TA, expected_TA, rtol=1e-5)


def test_gate_takes_the_lower_expert_of_a_tie() -> None:
    gate_DE = jnp.zeros((4, 6), jnp.float32).at[:, 3].set(1.0)
    ids_TA, _ = NATIVE.gate(jnp.ones((1, 4), jnp.float32), gate_DE, 3)
    assert ids_TA.tolist() == [[3, 0, 1]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("key_size", [6, 8, 20, 64])
def test_attention_equals_the_plain_kernels(key_size: int, dtype: str) -> None:
    rng = np.random.default_rng(key_size)
    shape = (9, 5, 2, key_size)
    keys, values = (jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(2))
    visible = jnp.asarray(rng.random((9, 5)) < 0.9)
    query_THK = jnp.asarray(rng.standard_normal((4, 6, key_size)) * 3, dtype)
    tables = jnp.asarray([[2, 4, 0, 7], [2, 4, 0, 7], [5, 1, 0, 0], [3, 3, 3, 3]], jnp.int32)
    positions = jnp.asarray([19, 2, 6, -1], jnp.int32)
    arguments = (query_THK, keys, values, visible, tables, positions, 0.3)
    expected = PureOps().attention(*arguments)
    result = NATIVE.attention(*arguments)
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=2e-5)
    assert not np.asarray(result)[3].any()


def test_old_contents_of_a_block_are_never_seen() -> None:
    keys = np.full((3, 4, 1, 8), np.nan, np.float32)
    keys[1, :2] = 1.0
    visible = np.ones((3, 4), bool)
    visible[1, 1] = False
    keys[1, 1] = np.nan
    result = NATIVE.attention(
        jnp.ones((1, 2, 8), jnp.float32),
        jnp.asarray(keys),
        jnp.asarray(keys),
        jnp.asarray(visible),
        jnp.asarray([[1, 0]], jnp.int32),
        jnp.asarray([1], jnp.int32),
        0.5,
    )
    np.testing.assert_array_equal(result, np.ones((1, 2, 8)))


@pytest.mark.parametrize("key_size", [2, 32, 128])
def test_rope_equals_the_plain_kernels_far_into_the_context(key_size: int) -> None:
    rng = np.random.default_rng(key_size)
    heads_THK = jnp.asarray(rng.standard_normal((6, 3, key_size)), jnp.float32)
    positions_T = jnp.asarray([-1, 0, 1, 77, 8191, 131071], jnp.int32)
    expected = PureOps().rope(heads_THK, positions_T)
    np.testing.assert_allclose(NATIVE.rope(heads_THK, positions_T), expected, atol=2e-6)


def test_weighing_and_norms_equal_the_plain_kernels() -> None:
    rng = np.random.default_rng(0)
    outputs_TAD = jnp.asarray(rng.standard_normal((5, 3, 37)), jnp.float32)
    weights_TA = jnp.asarray(rng.random((5, 3)), jnp.float32)
    expected = PureOps().weigh(outputs_TAD, weights_TA)
    np.testing.assert_allclose(NATIVE.weigh(outputs_TAD, weights_TA), expected, atol=1e-6)
    scale_D = jnp.asarray(rng.standard_normal(37), jnp.float32)
    expected = PureOps().rms_norm(outputs_TAD[:, 0], scale_D)
    np.testing.assert_allclose(NATIVE.rms_norm(outputs_TAD[:, 0], scale_D), expected, atol=1e-6)


@pytest.mark.parametrize("activations", Activations)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity_are_never_lost(bad: float, activations: Activations) -> None:
    """A NaN or an infinity must reach the logits, where it fails its sequence, and no other row."""
    rng = np.random.default_rng(0)
    matrix = NativeLoader(activations).matrix(*random_matrix(rng, 70, 40, 1))
    rows = rng.standard_normal((3, 70)).astype(np.float32)
    rows[1, 50] = bad
    result = np.asarray(NATIVE.linear(jnp.asarray(rows), matrix))
    assert not np.isfinite(result[1]).any()
    assert np.isfinite(result[[0, 2]]).all()


@pytest.mark.parametrize("largest", [1e-37, 1e-31, 1e-29])
def test_block_of_tiny_numbers_gives_no_nan(largest: float) -> None:
    """127 / largest would be infinite, and infinity times zero is NaN."""
    matrix = random_matrix(np.random.default_rng(0), 64, 40, 1)
    rows = np.zeros((2, 64), np.float32)
    rows[:, 3] = largest
    rows[1, 40] = 1.0
    native, plain = (loader.matrix(*matrix) for loader in loaders(Activations.INT8))
    result = np.asarray(NATIVE.linear(jnp.asarray(rows), native))
    expected = np.asarray(PureOps(Activations.INT8).linear(jnp.asarray(rows), plain))
    assert np.isfinite(result).all() and result[1].any()
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-36)


def test_arrays_that_do_not_fit_are_an_error_of_the_call() -> None:
    rng = np.random.default_rng(0)
    matrix = NativeLoader().matrix(*random_matrix(rng, 16, 40, 1))
    with pytest.raises(jax.errors.JaxRuntimeError, match="rows do not fit the matrix"):
        jax.block_until_ready(NATIVE.linear(jnp.zeros((2, 15), jnp.float32), matrix))
    assert isinstance(matrix, PackedMatrix)
    wrong = dataclasses.replace(matrix, panels=matrix.panels[:1])
    with pytest.raises(jax.errors.JaxRuntimeError, match="panels or scales of another size"):
        jax.block_until_ready(NATIVE.linear(jnp.zeros((2, 16), jnp.float32), wrong))


def test_packed_matrices_are_not_copied_again() -> None:
    loader = NativeLoader()
    weight, scales = random_matrix(np.random.default_rng(0), 64, 64, 1)
    matrix = loader.matrix(weight, scales)
    assert isinstance(matrix, PackedMatrix)
    assert matrix.panels.nbytes == weight.nbytes
    np.testing.assert_array_equal(
        np.asarray(matrix.panels).view(np.int8)[0].reshape(64, 32), weight[:, :32]
    )


@pytest.mark.parametrize("activations", Activations)
@pytest.mark.parametrize("name", ["tiny", "mini8"])
def test_mapped_experts_give_the_same_bits(
    golden_dir: Path, name: str, activations: Activations
) -> None:
    """Widths that do not fill a panel, with one and with eight scale rows."""
    loader = MappedLoader(activations)
    with Checkpoint.open(golden_dir / name) as checkpoint:
        loaded = load_experts(checkpoint, 2, NativeLoader(activations), [5, 0, 3])
        mapped = load_experts(checkpoint, 2, loader, [5, 0, 3])
    width = checkpoint.config.emb_size
    rows_TD = jnp.asarray(np.random.default_rng(0).standard_normal((9, width)), jnp.float32)
    ids_TA = jnp.asarray([[0, 1], [2, -1], [3, 2]] * 3, jnp.int32)
    expected = NATIVE.expert_ffn(rows_TD, ids_TA, loaded)
    np.testing.assert_array_equal(NATIVE.expert_ffn(rows_TD, ids_TA, mapped), expected)


def test_mapped_experts_with_another_dtype_are_an_error(golden_dir: Path) -> None:
    """If a region were read as int16, the kernel would read twice its length."""
    loader = MappedLoader()
    with Checkpoint.open(golden_dir / "tiny") as checkpoint:
        experts = load_experts(checkpoint, 0, loader)
    wrong = jax.tree.map(
        lambda matrix: dataclasses.replace(matrix, kind=EXACT_INT16),
        experts,
        is_leaf=lambda node: isinstance(node, MappedMatrix),
    )
    rows_TD, ids_TA = jnp.zeros((1, 128), jnp.float32), jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(jax.errors.JaxRuntimeError, match="of another size"):
        jax.block_until_ready(NATIVE.expert_ffn(rows_TD, ids_TA, wrong))


def test_unmapped_experts_are_an_error_of_the_call(golden_dir: Path) -> None:
    loader = MappedLoader()
    with Checkpoint.open(golden_dir / "tiny") as checkpoint:
        experts = load_experts(checkpoint, 0, loader)
    del loader
    rows_TD, ids_TA = jnp.zeros((1, 128), jnp.float32), jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(jax.errors.JaxRuntimeError, match="not mapped any more"):
        jax.block_until_ready(NATIVE.expert_ffn(rows_TD, ids_TA, experts))


@pytest.mark.parametrize("activations", Activations)
@pytest.mark.parametrize("width", [64, 45])
def test_head_keeps_the_embedding(activations: Activations, width: int) -> None:
    embedding_VD = np.random.default_rng(0).standard_normal((50, width)).astype(np.float32)
    embedding_VD[7] = 0
    weight_DV, scales_GV = quantise_head(embedding_VD, activations)
    full_DV = weight_DV * np.repeat(scales_GV, width // len(scales_GV), axis=0)
    largest = 32767 if activations is Activations.EXACT else 127
    assert np.abs(full_DV - embedding_VD.T).max() <= np.abs(embedding_VD).max() / largest * 0.51


@pytest.mark.parametrize("backend", ["native", "pure"])
def test_int8_activations_stay_near_the_reference(golden_dir: Path, backend: str) -> None:
    """With the limits of tests/golden for bfloat16: median differences, and equal best tokens."""
    differences, agreements = [], []
    for name in ("tiny", "mini8"):
        model = load(golden_dir / name, backend=backend, activations=Activations.INT8)
        runner = runner_of(model, StepMode.HALVES)
        with np.load(golden_dir / name / "golden" / "forward_f32.npz") as recorded:
            for prompt in ("p0", "p2", "p4"):
                tokens = recorded[f"{prompt}_tokens"].tolist()
                logits = logits_of(runner, tokens, in_eights(len(tokens)))
                expected = recorded[f"{prompt}_logits"]
                differences.append(np.abs(logits - expected).ravel())
                agreements.append(logits.argmax(1) == expected.argmax(1))
    assert np.median(np.concatenate(differences)) <= 0.2
    assert np.concatenate(agreements).mean() >= 0.8


@pytest.mark.parametrize("key", [(0, 0), (1, 2), (2**32 - 1, 305419896)], ids=str)
def test_noise_equals_the_plain_kernels_to_the_last_digits(key: tuple[int, int]) -> None:
    key_2 = jnp.asarray(np.asarray(key, np.uint32))
    for num_places in (1, 7, 131072):
        noise_V = NATIVE.gumbel(key_2, num_places)
        expected_V = PureOps().gumbel(key_2, num_places)
        np.testing.assert_allclose(noise_V, expected_V, rtol=0, atol=2e-6)


@pytest.mark.parametrize("width", [1, 5, 8, 131072])
def test_summary_of_a_row_equals_the_plain_kernels(width: int) -> None:
    logits = np.random.default_rng(width).standard_normal((5, width)).astype(np.float32) * 5
    logits[1, 0] = -np.inf if width > 1 else 0.0
    logits[2, width // 2] = np.nan
    logits[3, width - 1] = np.inf
    logits[4] = logits[4, 0]
    summary = NATIVE.summarize_rows(jnp.asarray(logits))
    expected = PureOps().summarize_rows(jnp.asarray(logits))
    np.testing.assert_array_equal(summary.top, expected.top)
    sound = [0, 1, 4]
    np.testing.assert_array_equal(
        np.asarray(summary.best_id)[sound], np.asarray(expected.best_id)[sound]
    )
    np.testing.assert_allclose(
        np.asarray(summary.log_total)[sound], np.asarray(expected.log_total)[sound], atol=1e-5
    )
