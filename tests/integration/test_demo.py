"""Does it still speak? The demo model, served as users get it."""

import random
from pathlib import Path

import numpy as np
import pytest

from milliways.benchmarks.demo.grammar import check_text, opening_prompts
from milliways.benchmarks.demo.sample_check import ANSWER_PROMPT
from milliways.cluster.host.local import (
    LocalModel,
    cache_size_for,
    load_local_model,
    make_local_engine,
)
from milliways.model.demo import DEMO_DIR
from milliways.model.model_dir import resolve_model_dir
from milliways.model.sampling_params import SamplingParams
from milliways.model.tokenizer import Tokenizer
from milliways.router.requests.request import GenerationRequest
from tests.layers import PADDED_LENGTH, layer_states

NUM_TEXTS = 200
NUM_BESIDE_EACH_OTHER = 32
MAX_TOKENS = 240


@pytest.fixture(scope="module")
def demo() -> LocalModel:
    return load_local_model(resolve_model_dir("demo"), "float32")


@pytest.fixture(scope="module")
def tokenizer(demo: LocalModel) -> Tokenizer:
    assert demo.tokenizer is not None
    return demo.tokenizer


@pytest.fixture(scope="module")
def texts(demo: LocalModel, tokenizer: Tokenizer) -> list[str]:
    """Sampled texts, each a prompt with its completion."""
    engine = make_local_engine(demo, cache_size_for(NUM_BESIDE_EACH_OTHER, MAX_TOKENS + 32))
    texts: dict[int, str] = {}
    for number, prompt in enumerate(opening_prompts(random.Random("openings"), NUM_TEXTS)):
        request = GenerationRequest(
            prompt_ids=tuple(tokenizer.encode(prompt)),
            max_tokens=MAX_TOKENS,
            sampling=SamplingParams(temperature=0.7, seed=number),
        )
        (sequence,) = engine.add(request)
        texts[id(sequence)] = prompt
    while engine.has_work:
        for sequence, event in engine.step():
            texts[id(sequence)] += event.text
    return list(texts.values())


def test_demo_model_knows_the_answer(demo: LocalModel, tokenizer: Tokenizer) -> None:
    engine = make_local_engine(demo, cache_size_for(1, 64))
    request = GenerationRequest(
        prompt_ids=tuple(tokenizer.encode(ANSWER_PROMPT)),
        max_tokens=8,
        sampling=SamplingParams(temperature=0.0),
    )
    assert "".join(event.text for event in engine.generate(request)).split()[0].strip(".") == "42"


def test_sampled_texts_are_in_the_language(texts: list[str]) -> None:
    verdicts = [check_text(text) for text in texts]
    wrong = [(v.reason, t) for v, t in zip(verdicts, texts, strict=True) if not v.in_language]
    assert len(texts) == NUM_TEXTS
    assert len(wrong) <= 0.05 * NUM_TEXTS, wrong[:5]
    # All kinds of text, not one that happens to be easy.
    assert len({verdict.kind for verdict in verdicts}) >= 6


def test_no_expert_of_any_layer_is_idle(
    demo: LocalModel, tokenizer: Tokenizer, texts: list[str]
) -> None:
    config = demo.decoder.config
    counts_LE = np.zeros((config.num_layers, config.num_experts), np.int64)
    for text in texts[:40]:
        tokens = np.asarray(tokenizer.encode(text)[:PADDED_LENGTH])
        states = layer_states((demo.decoder, demo.params), tokens)
        for layer in range(config.num_layers):
            chosen = states[f"layer{layer}_expert_index"].ravel()
            counts_LE[layer] += np.bincount(chosen, minlength=config.num_experts)
    shares_LE = counts_LE / counts_LE.sum(axis=1, keepdims=True)
    assert shares_LE.min() >= 0.04, np.round(shares_LE, 3)


def test_demo_model_is_small_and_complete() -> None:
    files = [path for path in Path(DEMO_DIR).rglob("*") if path.suffix != ".py" and path.is_file()]
    shipped = [path for path in files if "__pycache__" not in path.parts]
    assert {"config.json", "tokenizer.model"} <= {path.name for path in shipped}
    assert sum(path.stat().st_size for path in shipped) <= 12_000_000
