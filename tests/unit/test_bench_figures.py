"""The arithmetic of `milliways bench`: turns, medians, ratios, floors and tables."""

import pytest

from milliways.benchmarks.speed.bench_model import BENCH_CONFIG
from milliways.benchmarks.speed.contestant import ContestantError
from milliways.benchmarks.speed.floors import (
    Bound,
    MachineLimits,
    Work,
    ceiling,
    distinct_experts,
    work_of,
)
from milliways.benchmarks.speed.machine import median_limits
from milliways.benchmarks.speed.rounds import Results, Speeds, rotated, run_rounds
from milliways.benchmarks.speed.table import NOISY_SPREAD, Report, format_number, format_table
from milliways.benchmarks.speed.workload import Kind, Workload, workloads_of

DECODE_1 = Workload(Kind.DECODE, 1)
DECODE_8 = Workload(Kind.DECODE, 8)
PREFILL_512 = Workload(Kind.PREFILL, 512)
LIMITS = MachineLimits(
    read_bytes_per_s_1_thread=20e9,
    read_bytes_per_s=26e9,
    flops_per_s_1_thread=96e9,
    flops_per_s=190e9,
)


class FakeContestant:
    """Returns the given speeds one after another, then fails."""

    about = "fake"

    def __init__(self, name: str, speeds: list[float], asked: list[tuple[str, Workload]]) -> None:
        self.name = name
        self._speeds = list(speeds)
        self._asked = asked

    def measure(self, workload: Workload) -> float:
        self._asked.append((self.name, workload))
        if not self._speeds:
            raise ContestantError("out of speeds")
        return self._speeds.pop(0)

    def close(self) -> None:
        pass


def run(speeds: dict[str, list[float]], workloads: tuple[Workload, ...], num_repeats: int):
    asked: list[tuple[str, Workload]] = []
    contestants = [FakeContestant(name, list(figures), asked) for name, figures in speeds.items()]
    results = run_rounds(contestants, workloads, num_repeats, lambda: LIMITS, lambda _: None)
    return results, asked


def test_every_round_begins_with_another_contestant() -> None:
    _, asked = run({"a": [1, 2], "b": [3, 4]}, (DECODE_1,), 2)
    assert [name for name, _ in asked] == ["a", "b", "b", "a"]


def test_all_contestants_run_a_workload_before_the_next_one_begins() -> None:
    _, asked = run({"a": [1, 2], "b": [3, 4]}, (DECODE_1, PREFILL_512), 1)
    assert [workload for _, workload in asked] == [DECODE_1, DECODE_1, PREFILL_512, PREFILL_512]


def test_contestant_that_fails_is_noted_and_not_measured_again() -> None:
    results, asked = run({"a": [1, 2, 3], "b": [4]}, (DECODE_1,), 3)
    assert results.find("b", DECODE_1) == Speeds((4,))
    assert results.find("a", DECODE_1) == Speeds((1, 2, 3))
    assert [name for name, _ in asked].count("b") == 2
    assert results.notes == ["b failed at decode 1: out of speeds"]


def test_limits_are_read_once_in_every_round() -> None:
    results, _ = run({"a": [1, 2, 3]}, (DECODE_1,), 3)
    assert len(results.limits) == 3


def test_ratio_is_of_medians() -> None:
    results, _ = run({"a": [10, 30, 20], "b": [5, 1, 9]}, (DECODE_1,), 3)
    assert results.ratio("a", "b", DECODE_1) == 20 / 5
    assert results.ratio("a", "b", DECODE_8) is None
    assert results.ratio("a", "nobody", DECODE_1) is None


def test_rotating_nothing_gives_nothing() -> None:
    assert rotated([], 3) == []
    assert rotated([1, 2, 3], 4) == [2, 3, 1]


def test_step_of_the_bench_model_reads_346_megabytes() -> None:
    work = work_of(BENCH_CONFIG, DECODE_1)
    assert work.read_bytes == pytest.approx(346e6, rel=1e-3)
    assert work.flops == pytest.approx(0.692e9, rel=1e-3)
    top = ceiling(work, LIMITS)
    assert top.bound is Bound.MEMORY
    assert top.tokens_per_s == pytest.approx(75, abs=1)


def test_large_batch_reads_every_expert_once() -> None:
    config = BENCH_CONFIG
    experts = config.num_layers * config.num_experts * 3 * config.emb_size * config.ffn_size
    work = work_of(config, Workload(Kind.DECODE, 64))
    assert work.read_bytes == pytest.approx(experts + 18.9e6 + 100.7e6, rel=1e-3)


def test_prefill_computes_logits_of_one_token_and_is_bound_by_arithmetic() -> None:
    decode, prefill = (
        work_of(BENCH_CONFIG, workload) for workload in (Workload(Kind.DECODE, 512), PREFILL_512)
    )
    head_flops = 2 * BENCH_CONFIG.vocab_size * BENCH_CONFIG.emb_size
    assert decode.flops - prefill.flops == pytest.approx(511 * head_flops)
    assert ceiling(prefill, LIMITS).bound is Bound.ARITHMETIC


@pytest.mark.parametrize(("num_tokens", "expected"), [(1, 2.0), (2, 3.5), (1000, 8.0)])
def test_distinct_experts_grow_from_two_to_all(num_tokens: int, expected: float) -> None:
    assert distinct_experts(BENCH_CONFIG, num_tokens) == pytest.approx(expected)


def test_ceiling_is_the_slower_of_reading_and_computing() -> None:
    memory = ceiling(Work(num_tokens=4, read_bytes=26e9, flops=1.0), LIMITS)
    assert (memory.tokens_per_s, memory.bound) == (4.0, Bound.MEMORY)
    arithmetic = ceiling(Work(num_tokens=4, read_bytes=1.0, flops=190e9), LIMITS)
    assert (arithmetic.tokens_per_s, arithmetic.bound) == (4.0, Bound.ARITHMETIC)


def test_limits_of_a_run_are_medians_one_by_one() -> None:
    slow = MachineLimits(
        read_bytes_per_s_1_thread=1, read_bytes_per_s=99e9, flops_per_s_1_thread=1, flops_per_s=1
    )
    assert median_limits([slow, LIMITS, LIMITS]) == LIMITS


def test_workloads_are_named_once_each() -> None:
    assert [w.title for w in workloads_of((1, 8, 8), (512,))] == [
        "decode 1",
        "decode 8",
        "prefill 512",
    ]


def test_larger_batches_take_fewer_steps_but_enough_for_a_mean() -> None:
    steps = [Workload(Kind.DECODE, batch).num_steps for batch in (1, 8, 32, 64)]
    assert steps == sorted(steps, reverse=True)
    assert min(steps) >= 8


def test_table_aligns_columns() -> None:
    assert format_table(["tokens/s", "decode 1"], [["milliways", "40"]]) == (
        "| tokens/s  | decode 1 |\n| --------- | -------: |\n| milliways |       40 |"
    )


@pytest.mark.parametrize(
    ("value", "shown"), [(0.376, "0.38"), (9.996, "10.00"), (40.91, "40.9"), (130.5, "130")]
)
def test_numbers_have_three_digits(value: float, shown: str) -> None:
    assert format_number(value) == shown


def test_report_shows_speeds_ratios_floors_and_notes() -> None:
    results, _ = run({"us": [40, 41, 42], "peer": [20, 10, 60]}, (DECODE_1,), 3)
    results.notes.append("other is absent: not installed")
    report = Report(BENCH_CONFIG, [DECODE_1], ["us"], ["peer"], results)
    lines = report.format().splitlines()
    assert ["us", "41.0"] in [cells(line) for line in lines]
    assert ["peer", "20.0 (?)"] in [cells(line) for line in lines]
    assert ["peer", "2.05"] in [cells(line) for line in lines]
    assert ["us reaches", "55%"] in [cells(line) for line in lines]
    assert "- other is absent: not installed" in lines
    assert report.to_json()["tokens_per_s"] == {
        "us": {"decode 1": [40, 41, 42]},
        "peer": {"decode 1": [20, 10, 60]},
    }


def test_contestant_without_figures_has_a_dash() -> None:
    results = Results(limits=[LIMITS])
    report = Report(BENCH_CONFIG, [DECODE_1], ["us"], ["peer"], results)
    assert ["peer", "-"] in [cells(line) for line in report.format().splitlines()]


def test_noise_is_marked_only_beyond_the_limit() -> None:
    assert Speeds((95, 100, 105)).spread < NOISY_SPREAD < Speeds((80, 100, 105)).spread


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]
