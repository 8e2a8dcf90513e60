"""The folder of a run, its end, and what dead runs leave."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from milliways.cluster.ray import run_folder
from milliways.cluster.ray.run_folder import MAX_BASE_BYTES, RunFolder, choose_base
from milliways.wire.errors import StartupError

DIE = """
import os
from milliways.cluster.ray.run_folder import RunFolder
folder = RunFolder()
(folder.path / "session").mkdir()
print(folder.path, flush=True)
{ending}
"""


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="b-", dir="/tmp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield Path(folder)
    monkeypatch.setattr(tempfile, "tempdir", None)


def run(ending: str) -> Path:
    code = DIE.format(ending=ending)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return Path(done.stdout.strip())


def test_folder_of_a_killed_run_goes_with_the_next_run(base: Path) -> None:
    abandoned = run("os.kill(os.getpid(), 9)")
    assert (abandoned / "session").is_dir() and abandoned.parent == base
    mine = RunFolder()
    assert not abandoned.exists()
    mine.remove()
    assert list(base.iterdir()) == []


def test_folder_of_a_living_run_stays(base: Path) -> None:
    first = RunFolder()
    second = RunFolder()
    assert run("pass").parent == base
    third = RunFolder()
    assert sorted(base.iterdir()) == sorted(folder.path for folder in (first, second, third))


def test_folders_that_are_not_ours_stay(base: Path) -> None:
    (base / "mw-of-somebody").mkdir()
    (base / "mw-link").symlink_to(base / "mw-of-somebody")
    RunFolder().remove()
    assert {path.name for path in base.iterdir()} == {"mw-of-somebody", "mw-link"}


def test_long_tmpdir_is_replaced_or_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fits, long = "/" + "a" * (MAX_BASE_BYTES - 1), "/" + "a" * MAX_BASE_BYTES
    assert choose_base(fits) == fits
    assert choose_base(long) == "/tmp"
    monkeypatch.setattr(run_folder, "_SHORT_BASES", ())
    with pytest.raises(StartupError, match=f"TMPDIR {long} has 25 bytes.*at most 24"):
        choose_base(long)
