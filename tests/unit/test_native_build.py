"""The compiled kernels under test are those of these sources."""

import runpy
from pathlib import Path

import pytest
import setuptools

from milliways.model.ops import native

REPOSITORY = Path(__file__).resolve().parents[2]


def test_kernels_were_compiled_from_these_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """An older library would be tested in the place of this one."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    digest = runpy.run_path("setup.py")["digest_of_sources"]
    assert native.sources() == digest()
