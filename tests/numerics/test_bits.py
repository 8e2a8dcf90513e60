"""A token has the same bits in any batch, with any chunks, threads and instruction set."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from milliways.model.activations import Activations
from milliways.model.ops import NativeOps, native
from milliways.model.runner import CacheSize, ModelRunner, ScheduledTokens, StepMode
from tests.runners import ON_GPU, Model, load, logits_of, runner_of

NUM_TOKENS = 60

VARIANTS = [
    ("native", "float32", Activations.EXACT),
    ("native", "bfloat16", Activations.EXACT),
    ("native", "float32", Activations.INT8),
    ("native", "bfloat16", Activations.INT8),
    ("pure", "float32", Activations.EXACT),
    ("pure", "bfloat16", Activations.EXACT),
    ("pure", "float32", Activations.INT8),
    ("pure", "bfloat16", Activations.INT8),
]
if ON_GPU:
    VARIANTS = [("gpu", dtype, Activations.EXACT) for dtype in ("float32", "bfloat16")]
for_cpus = pytest.mark.skipif(ON_GPU, reason="about the kernels for CPUs")


@pytest.fixture(
    scope="module",
    params=VARIANTS,
    ids=lambda variant: f"{variant[0]}-{variant[1]}-{variant[2].value}",
)
def model(request: pytest.FixtureRequest, golden_dir: Path) -> Model:
    backend, dtype, activations = request.param
    return load(golden_dir / "tiny", dtype, backend, activations)


@pytest.fixture(scope="module")
def runner(model: Model) -> ModelRunner:
    return runner_of(model, cache_size=CacheSize(num_blocks=64, max_slots=16))


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return np.random.default_rng(5).integers(1, 512, NUM_TOKENS).tolist()


@pytest.fixture(scope="module")
def whole(runner: ModelRunner, tokens: list[int]) -> np.ndarray:
    return logits_of(runner, tokens)


def random_chunks(seed: int) -> list[int]:
    """Random lengths of chunks, so that steps of every size occur."""
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.choice(np.arange(1, NUM_TOKENS), rng.integers(1, 12), replace=False))
    return np.diff([0, *cuts, NUM_TOKENS]).tolist()


@pytest.mark.parametrize(
    "chunks",
    [[30, 30], [7, 1, 1, 1, 50], [33, 27], [1] * NUM_TOKENS, *map(random_chunks, range(3))],
    ids=str,
)
def test_any_chunking_gives_the_same_bits(
    runner: ModelRunner, tokens: list[int], whole: np.ndarray, chunks: list[int]
) -> None:
    np.testing.assert_array_equal(logits_of(runner, tokens, chunks), whole)


def test_choice_of_the_blocks_does_not_matter(
    runner: ModelRunner, tokens: list[int], whole: np.ndarray
) -> None:
    np.testing.assert_array_equal(logits_of(runner, tokens, first_block=17), whole)


@pytest.mark.parametrize("seed", range(4))
def test_other_sequences_of_the_batch_do_not_matter(
    runner: ModelRunner, tokens: list[int], whole: np.ndarray, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    num_mates = int(rng.integers(1, 9))
    position = int(rng.integers(0, num_mates + 1))
    batch, start = [], 0
    for slot in range(num_mates + 1):
        is_ours = slot == position
        length = NUM_TOKENS if is_ours else int(rng.integers(1, 40))
        num_blocks = -(-length // 16)
        batch.append(
            ScheduledTokens(
                token_ids=tokens if is_ours else rng.integers(0, 512, length).tolist(),
                start_position=0,
                block_table=range(start, start + num_blocks),
                num_logits=length if is_ours else 1,
            )
        )
        start += num_blocks
    logits = runner.compute_logits(batch)
    np.testing.assert_array_equal(logits[position : position + NUM_TOKENS], whole)


def test_prefill_and_decode_mixed_in_one_step_keep_their_bits(
    runner: ModelRunner, tokens: list[int], whole: np.ndarray
) -> None:
    logits_of(runner, tokens[:-1])
    decode = ScheduledTokens(
        token_ids=tokens[-1:], start_position=NUM_TOKENS - 1, block_table=range(4)
    )
    prefill = ScheduledTokens(
        token_ids=tokens[:50], start_position=0, block_table=range(8, 12), num_logits=50
    )
    logits = runner.compute_logits([prefill, decode])
    np.testing.assert_array_equal(logits[50], whole[-1])
    np.testing.assert_array_equal(logits[:50], whole[:50])


def test_fused_step_keeps_the_bits(model: Model, tokens: list[int], whole: np.ndarray) -> None:
    fused = runner_of(model, StepMode.FUSED)
    np.testing.assert_array_equal(logits_of(fused, tokens, [59, 1]), whole)


@for_cpus
@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize("activations", Activations)
def test_number_of_threads_does_not_matter(
    golden_dir: Path, tokens: list[int], num_threads: int, activations: Activations
) -> None:
    runner = runner_of(load(golden_dir / "mini8", activations=activations))
    mini_tokens = [token % 256 for token in tokens]
    expected = logits_of(runner, mini_tokens)
    usual = native.num_threads()
    native.set_num_threads(num_threads)
    try:
        np.testing.assert_array_equal(logits_of(runner, mini_tokens), expected)
    finally:
        native.set_num_threads(usual)


@for_cpus
@pytest.mark.parametrize("activations", Activations)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_instruction_set_does_not_matter(
    golden_dir: Path, tokens: list[int], dtype: str, activations: Activations
) -> None:
    """Compares the portable kernels, which run on any processor, with those of this processor."""
    runner = runner_of(load(golden_dir / "tiny", dtype, activations=activations))
    expected = logits_of(runner, tokens)
    usual = native.kernel_set()
    assert native.use_kernel_set("portable")
    try:
        np.testing.assert_array_equal(logits_of(runner, tokens), expected)
    finally:
        native.use_kernel_set(usual)


@for_cpus
@pytest.mark.parametrize("num_threads", [1, 2])
def test_subnormal_numbers_are_zero_on_every_thread(num_threads: int) -> None:
    """XLA's threads flush them to zero, so ours must too. Otherwise bits depend on the thread."""
    outputs_TAD = jnp.full((4096, 1, 8), 1e-20, jnp.float32)
    weights_TA = jnp.full((4096, 1), 1e-20, jnp.float32)
    usual = native.num_threads()
    native.set_num_threads(num_threads)
    try:
        for _ in range(20):
            assert not np.asarray(NativeOps().weigh(outputs_TAD, weights_TA)).any()
    finally:
        native.set_num_threads(usual)
