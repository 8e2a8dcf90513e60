"""The plugin that records what became of each test, in a run of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.run_report import describe_skips, read_results

SUITE = """
import pytest

def test_that_passes(): pass

@pytest.mark.skip(reason="by a mark")
def test_skipped_by_a_mark(): pass

def test_that_skips_itself(): pytest.skip("by itself")

@pytest.fixture
def broken():
    yield
    raise ValueError

def test_whose_tear_down_fails(broken): pass
"""


@pytest.mark.parametrize("processes", ["0", "2"])
def test_plugin_records_every_test_once(tmp_path: Path, processes: str) -> None:
    (tmp_path / "test_suite.py").write_text(SUITE, "utf-8")
    (tmp_path / "test_skipped.py").write_text("import pytest\npytest.importorskip('no_such')\n")
    report = tmp_path / "folder" / "report.jsonl"
    command = [sys.executable, "-m", "pytest", "-c", "/dev/null", "--rootdir", str(tmp_path)]
    command += ["-p", "tests.run_report", "--report-file", str(report), "-n", processes]
    done = subprocess.run([*command, str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    results = sorted(read_results([report]), key=lambda result: result.test)
    assert [(result.test.rpartition("::")[2], result.outcome) for result in results] == [
        ("test_skipped.py", "skipped"),
        ("test_skipped_by_a_mark", "skipped"),
        ("test_that_passes", "passed"),
        ("test_that_skips_itself", "skipped"),
        ("test_whose_tear_down_fails", "failed"),
    ]
    assert [result.reason for result in results[1:4]] == ["by a mark", "", "by itself"]
    assert "no_such" in describe_skips(results[:1])[0]
