"""The output of `milliways inspect` for small checkpoints and for one of Grok-1's size."""

import json
from pathlib import Path

import pytest

from milliways.model.checkpoint import (
    Checkpoint,
    TensorRole,
    format_summary,
    kv_bytes_per_token,
    summarize,
    to_json,
    write_sparse_checkpoint,
)
from milliways.model.checkpoint.summary import experts_per_worker
from milliways.model.config import GROK_1

GOLDEN = Path(__file__).parents[1] / "golden"

# The file sizes of the real ckpt-0, and how many files have each size.
RELEASED_FILE_BYTES = {
    TensorRole.EMBEDDING: 3_221_225_637,
    TensorRole.FINAL_NORM: 24_727,
    TensorRole.EXPERT_LINEAR: 1_611_137_347,
    TensorRole.EXPERT_LINEAR_1: 1_611_399_491,
    TensorRole.EXPERT_LINEAR_V: 1_611_137_347,
    TensorRole.KEY: 6_293_814,
    TensorRole.ATTENTION_OUT: 37_847_359,
    TensorRole.QUERY: 37_761_334,
    TensorRole.VALUE: 6_293_814,
    TensorRole.PRE_ATTENTION_NORM: 24_727,
    TensorRole.POST_ATTENTION_NORM: 24_727,
    TensorRole.PRE_MOE_NORM: 24_727,
    TensorRole.POST_MOE_NORM: 24_727,
    TensorRole.GATE: 196_770,
}


@pytest.fixture(scope="module")
def grok_1(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A checkpoint of Grok-1's size: 318 GB of holes in sparse files."""
    model_dir = tmp_path_factory.mktemp("grok-1")
    write_sparse_checkpoint(model_dir / "ckpt-0", GROK_1)
    return Checkpoint.open(model_dir)


def test_files_of_grok_1_have_the_sizes_of_the_release(grok_1: Checkpoint) -> None:
    for spec, record in zip(grok_1.specs, grok_1.records, strict=True):
        assert record.num_file_bytes == RELEASED_FILE_BYTES[spec.role], spec.name


def test_grok_1_is_opened_by_reading_less_than_a_megabyte(grok_1: Checkpoint) -> None:
    assert grok_1.bytes_scanned < 1 << 20
    assert grok_1.bytes_read == 0


def test_summary_of_grok_1_has_the_known_totals(grok_1: Checkpoint) -> None:
    summary = summarize(grok_1, num_workers=8)
    assert summary.num_tensors == 770
    assert summary.num_parameters == 315_684_820_992
    assert summary.num_active_parameters == 83_756_587_008
    assert summary.num_file_bytes == 318_239_886_140
    assert summary.kv_bytes_per_token == 262_144


def test_one_expert_of_grok_1_is_two_hundred_megabytes(grok_1: Checkpoint) -> None:
    weight, scales = grok_1.expert(63, TensorRole.EXPERT_LINEAR_1, 7)
    assert weight.shape == (32768, 6144) and scales.shape == (8, 6144)
    assert grok_1.bytes_read == 32768 * 6144 + 2 * 8 * 6144
    assert not weight[-1].any()


def test_totals_are_sums_over_roles() -> None:
    with Checkpoint.open(GOLDEN / "mini8") as checkpoint:
        summary = summarize(checkpoint, num_workers=3)
        assert sum(role.num_tensors for role in summary.roles) == summary.num_tensors == 146
        assert sum(role.num_file_bytes for role in summary.roles) == summary.num_file_bytes
        on_disk = sum(path.stat().st_size for path in checkpoint.ckpt_dir.iterdir())
        assert summary.num_file_bytes == on_disk
        assert checkpoint.bytes_read == 0


def test_workers_together_hold_every_expert_once() -> None:
    with Checkpoint.open(GOLDEN / "mini8") as checkpoint:
        alone = summarize(checkpoint, num_workers=1).workers[0]
        three = summarize(checkpoint, num_workers=3).workers
    assert [worker.num_experts_per_layer for worker in three] == [3, 3, 2]
    assert sum(worker.expert_bytes for worker in three) == alone.expert_bytes
    assert {worker.attention_bytes for worker in three} == {alone.attention_bytes}
    assert three[0].total_bytes - three[0].bytes_without_embedding == 256 * 32 * 4 + 32 * 4


def test_memory_of_a_lone_worker_is_all_the_arrays() -> None:
    with Checkpoint.open(GOLDEN / "tiny") as checkpoint:
        summary = summarize(checkpoint, num_workers=1)
    assert summary.workers[0].total_bytes == summary.num_array_bytes


@pytest.mark.parametrize(
    ("num_workers", "held"),
    [(1, (8,)), (3, (3, 3, 2)), (5, (2, 2, 2, 1, 1)), (8, (1,) * 8), (10, (1,) * 8 + (0, 0))],
)
def test_experts_are_spread_as_evenly_as_whole_experts_can_be(
    num_workers: int, held: tuple[int, ...]
) -> None:
    assert experts_per_worker(8, num_workers) == held


def test_kv_bytes_count_keys_and_values_of_all_layers() -> None:
    assert kv_bytes_per_token(GROK_1) == 2 * 64 * 8 * 128 * 2


def test_summary_in_json_has_all_figures() -> None:
    with Checkpoint.open(GOLDEN / "tiny") as checkpoint:
        summary = summarize(checkpoint, num_workers=2)
    values = json.loads(json.dumps(to_json(summary)))
    assert values["num_parameters"] == 6_558_336
    assert values["workers"][1]["total_bytes"] == summary.workers[1].total_bytes
    assert values["roles"][0]["role"] == "embedding"


def test_formatted_summary_has_exact_numbers_and_gigabytes(grok_1: Checkpoint) -> None:
    text = format_summary(summarize(grok_1, num_workers=10))
    assert "318,239,886,140 (318.24 GB)" in text
    assert "315,684,820,992 (315.68 billion)" in text
    assert "83,756,587,008 (83.76 billion)" in text
    assert "workers 0 to 7, each: 1 of 8 experts of every layer" in text
    assert "workers 8 to 9, each: 0 of 8 experts of every layer" in text
    assert max(map(len, text.splitlines())) <= 100
