"""The report on a run of the tests: no test is left out unless a list says why."""

import pytest

from tests.conftest import REPOSITORY
from tests.run_report import (
    ALLOWED_SKIPS,
    AllowedSkip,
    AllowedSkipError,
    Result,
    complaints,
    read_allowed,
    summary,
)

PASSED = Result("tests/test_a.py::test_one", "passed", "", 1.0)
SKIPPED = Result("tests/test_a.py::test_two[x]", "skipped", "redis is not installed", 0.0)
ENTRY = AllowedSkip("tests/test_a.py::*", "redis .*", "Nobody can install it.")


def test_skip_fails_the_strict_run_only() -> None:
    assert complaints([PASSED, SKIPPED], [], strict=False) == []
    assert complaints([PASSED, SKIPPED], [], strict=True) == [
        "Skipped, and not allowed to be:",
        "     1  tests/test_a.py: redis is not installed",
    ]


def test_skip_that_is_listed_with_its_reason_is_allowed() -> None:
    assert complaints([PASSED, SKIPPED], [ENTRY], strict=True) == []


@pytest.mark.parametrize(
    "entry",
    [
        AllowedSkip("tests/test_b.py::*", "redis .*", "Another file."),
        AllowedSkip("tests/test_a.py::*", "redis", "Only a part of the reason."),
    ],
)
def test_entry_for_another_skip_allows_nothing_and_is_reported(entry: AllowedSkip) -> None:
    wrong = complaints([PASSED, SKIPPED], [entry], strict=True)
    assert wrong[0] == "Skipped, and not allowed to be:"
    assert wrong[-1].startswith("No test was skipped as this entry allows: ")


@pytest.mark.parametrize("results", [[], [SKIPPED]])
def test_run_without_a_test_fails(results: list[Result]) -> None:
    assert complaints(results, [ENTRY], strict=False) == ["No test ran."]


def test_summary_names_the_slowest_first_and_counts_all() -> None:
    slow = [Result(f"test_{i}", "passed", "", float(i)) for i in range(12)]
    lines = summary([*slow, SKIPPED])
    assert [line.split()[-1] for line in lines[1:-1]] == [f"test_{i}" for i in range(11, 1, -1)]
    assert lines[-1] == "12 passed, 0 failed, 1 skipped"


@pytest.mark.parametrize(
    "text",
    [
        '[[skip]]\ntests = "a"\nreason = "b"',
        '[[skip]]\ntests = "a"\nreason = "b"\nwhy = " "',
        '[[skip]]\ntests = "a"\nreason = "("\nwhy = "c"',
        '[[skip]]\ntests = "a"\nreason = 1\nwhy = "c"',
        "[[skip]",
    ],
)
def test_entry_without_a_reason_or_a_why_is_refused(text: str) -> None:
    with pytest.raises(AllowedSkipError):
        read_allowed(text)


def test_list_of_this_repository_can_be_read() -> None:
    for entry in read_allowed(ALLOWED_SKIPS.read_text("utf-8")):
        assert (REPOSITORY / entry.tests.partition("::")[0]).exists()
