"""The least work of a layer, with which the GPU benchmark compares a time."""

import jax
import pytest

from milliways.benchmarks.gpu_floors import Floors
from milliways.benchmarks.gpu_workload import (
    Layer,
    Workload,
    attention_work,
    expert_work,
    make_layer,
)
from milliways.model.config import GROK_1


@pytest.fixture(scope="module")
def layer() -> Layer:
    """A layer of full width that has shapes but no values."""

    def parts() -> tuple:
        layer = make_layer(GROK_1, seed=0)
        return layer.attention, layer.experts

    return Layer(*jax.eval_shape(parts))


def test_decoding_one_token_reads_the_bytes_that_grok_1_must_read(layer: Layer) -> None:
    workload = Workload(num_tokens=1, is_prefill=False)
    attention = attention_work(GROK_1, layer, workload)
    experts = expert_work(GROK_1, layer, workload, num_experts_read=2)
    assert experts.num_bytes == pytest.approx(2 * 3 * 6144 * 32768, rel=1e-3)
    assert attention.num_bytes == pytest.approx(88e6, rel=0.01)
    assert 64 * (attention.num_bytes + experts.num_bytes) == pytest.approx(83e9, rel=0.01)


def test_operations_count_each_token_and_each_pair_of_positions(layer: Layer) -> None:
    decode = Workload(num_tokens=8, is_prefill=False, context=512)
    prefill = Workload(num_tokens=512, is_prefill=True)
    per_token = 2 * (2 * 6144 * 6144 + 2 * 6144 * 1024 + 6144 * 8)
    assert attention_work(GROK_1, layer, decode).num_flops == 8 * (per_token + 4 * 513 * 6144)
    assert attention_work(GROK_1, layer, prefill).num_flops == (
        512 * per_token + 4 * 6144 * 512 * 513 // 2
    )
    assert expert_work(GROK_1, layer, prefill, 8).num_flops == 512 * 2 * 2 * 3 * 6144 * 32768


def test_floor_is_the_slower_of_reading_and_computing() -> None:
    floors = Floors(bytes_per_s=100.0, flops_per_s=1000.0)
    assert floors.least_s(50.0, 100.0) == 0.5
    assert floors.least_s(50.0, 2000.0) == 2.0
