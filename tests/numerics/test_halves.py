"""Kernels of whole halves and of all layers have the bits of what they replace, one by one."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from milliways.model.activations import Activations
from milliways.model.checkpoint import Checkpoint
from milliways.model.decoder import Decoder
from milliways.model.kv_cache import StepBatch, make_kv_cache
from milliways.model.ops import NativeOps
from milliways.model.ops.interface import HalfOps
from milliways.model.ops.native import MappedLoader
from milliways.model.ops.native_trace import take_events, traced
from milliways.model.params import load_model
from milliways.model.runner import ModelRunner, ScheduledTokens, StepMode
from tests.runners import Model, load, runner_of


@dataclass(frozen=True)
class SingleOps(NativeOps):
    """The same kernels, one call for each operation."""

    @property
    def halves(self) -> HalfOps | None:
        return None


def single(model: Model) -> Model:
    decoder, params = model
    return replace(decoder, ops=SingleOps()), params


def scheduled(tokens: np.ndarray, start: int, end: int, first_block: int) -> ScheduledTokens:
    return ScheduledTokens(
        token_ids=tokens[start:end].tolist(),
        start_position=start,
        block_table=range(first_block, first_block + -(-end // 16)),
        num_logits=end - start,
    )


def logits_of_steps(runner: ModelRunner) -> list[np.ndarray]:
    """A prefill of 35 tokens, then steps of two sequences, with a pad token and padded rows."""
    rng = np.random.default_rng(3)
    one, two = rng.integers(1, 512, 38), rng.integers(1, 512, 3)
    one[5] = 0
    steps = [
        [scheduled(one, 0, 35, 0)],
        [scheduled(one, 35, 36, 0), scheduled(two, 0, 2, 7)],
        [scheduled(one, 36, 37, 0), scheduled(two, 2, 3, 7)],
        [scheduled(one, 37, 38, 0)],
    ]
    return [runner.compute_logits(step) for step in steps]


@pytest.mark.parametrize(
    ("name", "dtype", "activations", "mode"),
    [
        ("tiny", "float32", Activations.EXACT, StepMode.FUSED),
        ("tiny", "bfloat16", Activations.EXACT, StepMode.HALVES),
        ("tiny", "bfloat16", Activations.INT8, StepMode.FUSED),
        ("mini8", "bfloat16", Activations.EXACT, StepMode.FUSED),
        ("mini8", "float32", Activations.INT8, StepMode.HALVES),
    ],
)
def test_whole_halves_have_the_bits_of_single_kernels(
    golden_dir: Path, name: str, dtype: str, activations: Activations, mode: StepMode
) -> None:
    model = load(golden_dir / name, dtype, "native", activations)
    runner, plain = runner_of(model, mode), runner_of(single(model))
    for whole, composed in zip(logits_of_steps(runner), logits_of_steps(plain), strict=True):
        np.testing.assert_array_equal(whole, composed)
    caches = [jax.tree.leaves(each.read_cache()) for each in (runner, plain)]
    for whole, composed in zip(*caches, strict=True):
        np.testing.assert_array_equal(np.asarray(whole), np.asarray(composed))


def test_mapped_experts_are_computed_layer_by_layer_with_the_same_bits(golden_dir: Path) -> None:
    """The library cannot hold layers whose experts are looked up at each use."""
    loader = MappedLoader()
    with Checkpoint.open(golden_dir / "mini8") as checkpoint:
        decoder = Decoder(config=checkpoint.config, dtype=np.dtype("float32"), ops=NativeOps())
        params = load_model(checkpoint, loader)
    mapped = runner_of((decoder, params), StepMode.FUSED)
    held = runner_of(load(golden_dir / "mini8", backend="native"), StepMode.FUSED)
    for one, other in zip(logits_of_steps(mapped), logits_of_steps(held), strict=True):
        np.testing.assert_array_equal(one, other)


def test_layers_that_are_gone_are_an_error_of_the_call(golden_dir: Path) -> None:
    decoder, params = load(golden_dir / "tiny", backend="native")
    held = NativeOps().hold_layers(params.attention_L, params.experts_L, decoder.half_sizes)
    assert held is not None
    number_1 = held.number_1
    del held
    batch = StepBatch(*(jnp.zeros(shape, jnp.int32) for shape in (1, 1, 1, (1, 1), 1)))
    cache = make_kv_cache(decoder.config, decoder.config.num_layers, 1, 16, decoder.dtype)
    hidden_TD = jnp.zeros((1, decoder.config.emb_size), jnp.float32)
    with pytest.raises(jax.errors.JaxRuntimeError, match="not held any more"):
        jax.block_until_ready(
            NativeOps().pass_layers(number_1, hidden_TD, batch, cache.layers_L, cache.visible_NP)
        )


def test_log_of_kernels_is_off_until_it_is_started() -> None:
    rows_TD, scale_D = jnp.ones((2, 8), jnp.float32), jnp.ones(8, jnp.float32)
    jax.block_until_ready(NativeOps().rms_norm(rows_TD, scale_D))
    with traced():
        start_ns = time.monotonic_ns()
        jax.block_until_ready(NativeOps().rms_norm(rows_TD, scale_D))
        end_ns = time.monotonic_ns()
        events = take_events()
    jax.block_until_ready(NativeOps().rms_norm(rows_TD, scale_D))
    assert [event.name for event in events] == ["norm"]
    assert start_ns <= events[0].start_ns <= events[0].end_ns <= end_ns
    assert take_events() == []
