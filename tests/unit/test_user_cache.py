"""The cache folder of users without a home, or without the right to write there."""

import os
import tempfile
from pathlib import Path

import pytest

from milliways.runtime.user_cache import user_cache_dir


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "t"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    return folder


@pytest.mark.parametrize("home", ["/proc", "/dev/null"])
def test_unwritable_home_is_replaced(
    home: str, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", home)
    folder = user_cache_dir()
    assert folder == temporary / f"milliways-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700


def test_user_without_a_home_has_a_cache(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert user_cache_dir().parent == temporary


def test_folder_of_another_user_is_refused(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/proc")
    (temporary / f"milliways-{os.getuid()}").mkdir()
    (temporary / f"milliways-{os.getuid()}").chmod(0o777)
    with pytest.raises(PermissionError, match="set HOME or XDG_CACHE_HOME"):
        user_cache_dir()


def test_cache_of_the_user_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
    assert user_cache_dir() == tmp_path / "c" / "milliways"
    assert user_cache_dir().is_dir()
