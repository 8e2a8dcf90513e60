"""Where the time of a step goes: the parts add up, and belong to what ran."""

import pytest

from milliways.benchmarks.steps import (
    AFTER_HEAD,
    BEFORE,
    BETWEEN,
    HEAD,
    divide_step,
    format_steps,
)
from milliways.model.ops.native_trace import KernelEvent

VOCAB = 100
EVENTS = [
    KernelEvent("linear", 8, 110, 120),
    KernelEvent("linear", 8, 115, 130),
    KernelEvent("experts", 0, 140, 160),
    KernelEvent("linear", VOCAB, 165, 185),
    KernelEvent("summarize", 0, 190, 192),
]


def test_parts_of_a_step_add_up_to_its_time() -> None:
    assert sum(divide_step(100, 200, EVENTS, VOCAB).values()) == 100


def test_every_moment_belongs_to_one_part() -> None:
    assert divide_step(100, 200, EVENTS, VOCAB) == {
        BEFORE: 10,
        "projections of attention": 20,
        BETWEEN: 15,
        "experts": 20,
        HEAD: 20,
        AFTER_HEAD: 13,
        "kernels of drawing": 2,
    }


@pytest.mark.parametrize("events", [[], EVENTS[:1]], ids=["none", "no head"])
def test_step_without_a_head_still_adds_up(events: list[KernelEvent]) -> None:
    assert sum(divide_step(100, 200, events, VOCAB).values()) == 100


def test_table_has_the_largest_part_first_and_a_column_for_each_batch() -> None:
    table = format_steps({1: {"experts": 1.0, HEAD: 3.0}, 8: {"experts": 4.0}})
    lines = table.splitlines()
    assert "decode 1" in lines[0] and "decode 8" in lines[0]
    assert "4.00" in lines[2]
    assert HEAD in lines[3] and "75 %" in lines[3] and "0 %" in lines[3]
