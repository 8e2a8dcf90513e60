"""Whoever computes: the same tokens, the weights in memory once, and a word where it is slow."""

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from milliways.cluster.host.local import (
    LocalModel,
    cache_size_for,
    load_local_model,
    make_local_engine,
)
from milliways.model.activations import Activations
from milliways.model.errors import KernelsMissingError
from milliways.model.model_dir import resolve_model_dir
from milliways.model.ops import PureOps, native, select
from milliways.model.ops.select import KernelChoice, Residence, select_ops
from milliways.model.sampling_params import SamplingParams
from milliways.router.requests.request import GenerationRequest
from tests.reference import small_config, write_random_model

PROMPTS = ("Welcome to", "Question: What is the capital of", "Table 4, Iris:")
# About what a process needs to load and compile, whatever the model.
SLACK_BYTES = 60_000_000


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if no compiler had been there at installation."""

    def missing() -> None:
        raise KernelsMissingError("they were not compiled")

    monkeypatch.setattr(native, "library", missing)
    select._warn_once.cache_clear()
    yield
    select._warn_once.cache_clear()


def tokens_of(model: LocalModel, prompt: str, temperature: float) -> list[int]:
    assert model.tokenizer is not None
    request = GenerationRequest(
        prompt_ids=tuple(model.tokenizer.encode(prompt)),
        max_tokens=40,
        sampling=SamplingParams(temperature=temperature, seed=11),
    )
    engine = make_local_engine(model, cache_size_for(1, 64))
    return [event.token_id for event in engine.generate(request)]


def all_tokens() -> list[list[int]]:
    model = load_local_model(resolve_model_dir("demo"), "float32")
    return [tokens_of(model, prompt, heat) for prompt in PROMPTS for heat in (0.0, 0.7)]


def test_plain_jax_gives_the_tokens_of_the_compiled_kernels(
    without_kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = all_tokens()
    monkeypatch.undo()
    assert plain == all_tokens()


def test_missing_kernels_are_said_once(
    without_kernels: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        ops, loader = select_ops(KernelChoice(activations=Activations.INT8))
        select_ops(KernelChoice())
    assert ops == PureOps(Activations.INT8) and loader.activations is Activations.INT8
    (record,) = caplog.records
    assert "not compiled" in record.message and "slower" in record.message


def test_mapped_experts_need_the_compiled_kernels(without_kernels: None) -> None:
    with pytest.raises(KernelsMissingError, match="not compiled"):
        select_ops(KernelChoice(residence=Residence.MAPPED))


def test_engine_keeps_mapped_experts_known_by_itself() -> None:
    kernels = KernelChoice(residence=Residence.MAPPED)
    engine = make_local_engine(
        load_local_model(resolve_model_dir("demo"), "float32", kernels), cache_size_for(1, 16)
    )
    events = list(engine.generate(GenerationRequest(prompt_ids=(5, 9), max_tokens=4)))
    assert events[-1].finish_reason is not None


PEAK_MEMORY = """
import json, resource, sys
from pathlib import Path
import jax, jax.numpy as jnp
from milliways.cluster.host.local import load_local_model
jax.block_until_ready(jnp.zeros(8) + 1)

def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before = peak_bytes()
model = load_local_model(Path(sys.argv[1]), "float32")
jax.block_until_ready(model.params)
weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
print(json.dumps({"growth": peak_bytes() - before, "weights": weights}))
"""


def test_weights_are_in_memory_once(tmp_path: Path) -> None:
    """At the peak of loading, too: files are mapped while they are copied, and let go."""
    config = small_config(
        emb_size=256, ffn_size=2560, num_experts=8, num_selected_experts=2, num_layers=12
    )
    write_random_model(tmp_path, config, {})
    run = subprocess.run(
        [sys.executable, "-c", PEAK_MEMORY, str(tmp_path)],
        capture_output=True,
        check=True,
        text=True,
    )
    found = json.loads(run.stdout)
    assert found["weights"] > 180_000_000
    assert found["growth"] < found["weights"] + SLACK_BYTES
