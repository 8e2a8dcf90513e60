"""Compares the forward pass with the answers of the reference code; tests/golden has both."""

from pathlib import Path

import numpy as np
import pytest

from milliways.model.runner import ScheduledTokens, StepMode
from tests.layers import layer_states
from tests.runners import BACKENDS, in_eights, load, logits_of, runner_of

MODELS = ("tiny", "mini8")
PROMPTS = ("p0", "p1", "p2", "p3", "p4", "p5", "p6", "padded")
LOGITS_TOLERANCE = 2e-3
PROBABILITY_TOLERANCE = 1e-4
NEAR_TIE = 1e-5


class Golden:
    """One golden set: the loaded model and the recorded arrays."""

    def __init__(self, model_dir: Path, backend: str) -> None:
        self.model_dir = model_dir
        self.model = load(model_dir, backend=backend)
        self.runner = runner_of(self.model)

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        with np.load(self.model_dir / "golden" / f"{name}.npz") as file:
            return dict(file)


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=MODELS)
def golden(request: pytest.FixtureRequest, golden_dir: Path, backend: str) -> Golden:
    return Golden(golden_dir / request.param, backend)


def test_float32_logits_equal_the_reference(golden: Golden) -> None:
    forward = golden.arrays("forward_f32")
    for prompt in PROMPTS:
        tokens = forward[f"{prompt}_tokens"].tolist()
        logits = logits_of(golden.runner, tokens, in_eights(len(tokens)))
        # p5 begins with the pad token. In the reference, its row averages keys of later positions.
        first = 1 if prompt == "p5" else 0
        difference = np.abs(logits - forward[f"{prompt}_logits"])[first:]
        assert difference.max() <= LOGITS_TOLERANCE, prompt


@pytest.mark.parametrize("prompt", ["p0", "p4"])
def test_every_layer_equals_the_reference(golden: Golden, prompt: str) -> None:
    recorded = golden.arrays("layers_f32")
    states = layer_states(golden.model, golden.arrays("forward_f32")[f"{prompt}_tokens"])
    assert states.keys() >= {"layer0_moe_out", "layer1_attn_out", "final_norm"}
    for name, state in states.items():
        expected = recorded[f"{prompt}_{name}"]
        scale = max(1.0, float(np.abs(expected).max()) / 10)
        np.testing.assert_allclose(state, expected, rtol=0, atol=2e-3 * scale, err_msg=name)


def test_expert_choice_equals_the_reference(golden: Golden) -> None:
    recorded = golden.arrays("routing_f32")
    states = layer_states(golden.model, golden.arrays("forward_f32")["p6_tokens"])
    num_compared = 0
    for layer in range(golden.model[0].config.num_layers):
        probabilities = np.sort(recorded[f"p6_layer{layer}_router_probs"], axis=1)[:, ::-1]
        num_chosen = golden.model[0].config.num_selected_experts
        gaps = -np.diff(probabilities[:, : num_chosen + 1], axis=1)
        clear = gaps.min(axis=1) > NEAR_TIE
        chosen = states[f"layer{layer}_expert_index"]
        np.testing.assert_array_equal(
            chosen[clear], recorded[f"p6_layer{layer}_expert_index"][clear]
        )
        np.testing.assert_allclose(
            states[f"layer{layer}_expert_gate"][clear],
            recorded[f"p6_layer{layer}_expert_gate"][clear],
            rtol=0,
            atol=PROBABILITY_TOLERANCE,
        )
        num_compared += int(clear.sum())
    assert num_compared > 100


def test_greedy_decoding_gives_the_reference_tokens(golden: Golden) -> None:
    forward, recorded = golden.arrays("forward_f32"), golden.arrays("generate_f32")
    for prompt in ("p0", "p1", "p2", "p3"):
        expected = recorded[f"greedy_{prompt}_tokens"].tolist()
        tokens = forward[f"{prompt}_tokens"].tolist()
        completion = greedy(golden, tokens, len(expected))
        assert completion == expected, prompt


def test_cache_after_prefill_equals_the_reference(golden: Golden) -> None:
    tokens = golden.arrays("forward_f32")["p0_tokens"].tolist()
    recorded = golden.arrays("generate_f32")
    runner = runner_of(golden.model)
    logits_of(runner, tokens, in_eights(len(tokens)))
    cache = runner.read_cache()
    for layer, layer_cache in enumerate(cache.layers_L):
        for name, blocks in (("k", layer_cache.keys_NPRK), ("v", layer_cache.values_NPRK)):
            rows = np.asarray(blocks).reshape(-1, *blocks.shape[2:])[: len(tokens)]
            expected = recorded[f"kv_p0_{name}"][layer]
            np.testing.assert_allclose(rows, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_stays_near_the_reference(name: str, golden_dir: Path, backend: str) -> None:
    model_dir = golden_dir / name
    runner = runner_of(load(model_dir, "bfloat16", backend))
    num_agreeing = num_rows = 0
    with np.load(model_dir / "golden" / "forward_bf16.npz") as recorded:
        for prompt in ("p0", "p4"):
            tokens = recorded[f"{prompt}_tokens"].tolist()
            logits = logits_of(runner, tokens, in_eights(len(tokens)))
            expected = recorded[f"{prompt}_logits"]
            assert np.median(np.abs(logits - expected)) <= 0.2, prompt
            num_agreeing += int((logits.argmax(1) == expected.argmax(1)).sum())
            num_rows += len(logits)
    assert num_agreeing >= 0.8 * num_rows


def test_fused_step_gives_the_same_bits_as_the_halves(golden_dir: Path, backend: str) -> None:
    golden = Golden(golden_dir / "tiny", backend)
    tokens = golden.arrays("forward_f32")["p2_tokens"].tolist()
    chunks = in_eights(len(tokens))
    fused = logits_of(runner_of(golden.model, StepMode.FUSED), tokens, chunks)
    np.testing.assert_array_equal(fused, logits_of(golden.runner, tokens, chunks))


def greedy(golden: Golden, prompt: list[int], num_tokens: int) -> list[int]:
    """Logits of a prefill, then of one token at a time through the cache."""
    runner, tokens = golden.runner, list(prompt)
    logits = logits_of(runner, tokens, in_eights(len(tokens)))
    for _ in range(num_tokens):
        tokens.append(int(logits[-1].argmax()))
        step = ScheduledTokens(
            token_ids=tokens[-1:], start_position=len(tokens) - 1, block_table=range(8)
        )
        logits = runner.compute_logits([step])
    return tokens[len(prompt) :]
