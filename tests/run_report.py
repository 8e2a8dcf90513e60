"""What one run of the tests leaves to say: its slowest tests, and the tests that did not run.

    pytest -p tests.run_report --report-file FILE ...
    python -m tests.run_report [--strict] FILE...

As a plugin it appends a line of JSON to the file for each test that ended. As a command it reads
the files of several pytest runs together. It exits with 1 if no test ran, and with --strict also
if a test was skipped for a reason that `tests/allowed_skips.toml` does not list, or if that file
lists a reason for which no test was skipped.
"""

import argparse
import json
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

ALLOWED_SKIPS = Path(__file__).with_name("allowed_skips.toml")
NUM_SLOWEST = 10


class AllowedSkipError(ValueError):
    """An entry of the list of allowed skips is not well-formed."""


@dataclass(frozen=True, slots=True)
class Result:
    """How a test, or the collection of a file of tests, ended."""

    test: str
    # passed, failed or skipped, as pytest says it
    outcome: str
    # Why it was skipped; otherwise empty.
    reason: str
    duration_s: float


@dataclass(frozen=True, slots=True)
class AllowedSkip:
    """Tests that may be skipped for a reason, and why we accept that."""

    # A node id, in which * and ? stand for other characters
    tests: str
    # A regular expression that matches the whole reason
    reason: str
    why: str

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, str) or not value.strip():
                raise AllowedSkipError(f"{name} is {value!r}, and has to be a text that says it")
        try:
            re.compile(self.reason)
        except re.error as error:
            raise AllowedSkipError(f"reason {self.reason!r} is no pattern: {error}") from None

    def allows(self, result: Result) -> bool:
        matches = fnmatchcase(result.test, self.tests)
        return matches and re.fullmatch(self.reason, result.reason) is not None


def read_allowed(text: str) -> list[AllowedSkip]:
    """The entries of a list of allowed skips."""
    try:
        return [AllowedSkip(**entry) for entry in tomllib.loads(text).get("skip", [])]
    except (TypeError, tomllib.TOMLDecodeError) as error:
        raise AllowedSkipError(f"an entry has tests, reason and why: {error}") from None


def unexpected_skips(results: Iterable[Result], allowed: Sequence[AllowedSkip]) -> list[Result]:
    """Skipped tests that no entry allows."""
    skipped = [result for result in results if result.outcome == "skipped"]
    return [result for result in skipped if not any(entry.allows(result) for entry in allowed)]


def unused_entries(results: Sequence[Result], allowed: Iterable[AllowedSkip]) -> list[AllowedSkip]:
    """Entries that allowed nothing in this run, and so have to go."""
    skipped = [result for result in results if result.outcome == "skipped"]
    return [entry for entry in allowed if not any(map(entry.allows, skipped))]


def describe_skips(skipped: Iterable[Result]) -> list[str]:
    """One line for each file and reason."""
    counts = Counter((result.test.partition("::")[0], result.reason) for result in skipped)
    return [f"  {count:4d}  {file}: {reason}" for (file, reason), count in counts.items()]


def summary(results: Sequence[Result]) -> list[str]:
    """The slowest tests, then the counts."""
    slowest = sorted(results, key=lambda result: -result.duration_s)[:NUM_SLOWEST]
    counts = Counter(result.outcome for result in results)
    return [
        f"The {len(slowest)} slowest tests, with set-up and tear-down:",
        *(f"  {result.duration_s:6.1f} s  {result.test}" for result in slowest),
        ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped")),
    ]


def complaints(
    results: Sequence[Result], allowed: Sequence[AllowedSkip], *, strict: bool
) -> list[str]:
    """What makes the run fail although every test that ran has passed."""
    if not any(result.outcome != "skipped" for result in results):
        return ["No test ran."]
    if not strict:
        return []
    lines = []
    if unexpected := unexpected_skips(results, allowed):
        lines += ["Skipped, and not allowed to be:", *describe_skips(unexpected)]
    for entry in unused_entries(results, allowed):
        lines.append(f"No test was skipped as this entry allows: {entry.tests}: {entry.reason}")
    return lines


def read_results(paths: Iterable[Path]) -> list[Result]:
    """All results that pytest left in these files."""
    lines = [line for path in paths for line in path.read_text("utf-8").splitlines()]
    return [Result(**json.loads(line)) for line in lines]


# The plugin


class Recorder:
    """Appends the result of each test to a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # Seconds of the phases that have ended, of tests that have not.
        self._durations_s: Counter[str] = Counter()
        self._outcomes: dict[str, tuple[str, str]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("", "utf-8")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.outcome != "passed":
            self._write(Result(report.nodeid, report.outcome, reason_of(report), 0.0))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = report.nodeid
        self._durations_s[test] += report.duration
        # A phase that passed does not undo that an earlier one was skipped or failed.
        if report.outcome != "passed":
            self._outcomes[test] = (report.outcome, reason_of(report))
        if report.when == "teardown":
            outcome, reason = self._outcomes.pop(test, ("passed", ""))
            self._write(Result(test, outcome, reason, self._durations_s.pop(test)))

    def _write(self, result: Result) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(result)) + "\n")


def reason_of(report: pytest.CollectReport | pytest.TestReport) -> str:
    """Why a test was skipped; empty where it was not."""
    if report.outcome != "skipped":
        return ""
    if hasattr(report, "wasxfail"):
        return f"expected to fail: {report.wasxfail}"
    reason: Any = report.longrepr
    return str(reason[2]).removeprefix("Skipped: ")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--report-file", type=Path, help="where to write the result of each test")


def pytest_configure(config: pytest.Config) -> None:
    path: Path | None = config.getoption("--report-file")
    # xdist gives its workers the same options, and reports all their tests to the first process.
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(path))


# The command


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.run_report")
    parser.add_argument("files", nargs="+", type=Path, help="what --report-file wrote")
    parser.add_argument("--strict", action="store_true", help="fail if a test was skipped")
    given = parser.parse_args(arguments)
    results, allowed = read_results(given.files), read_allowed(ALLOWED_SKIPS.read_text("utf-8"))
    wrong = complaints(results, allowed, strict=given.strict)
    skipped = unexpected_skips(results, allowed)
    if skipped and not given.strict:
        print(
            "Skipped here; continuous integration runs these:", *describe_skips(skipped), sep="\n"
        )
    print(*summary(results), sep="\n")
    print(*wrong, sep="\n", end="\n" if wrong else "", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
