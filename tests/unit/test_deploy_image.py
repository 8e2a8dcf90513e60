"""The image: its recipe linted, and held to what it copies and installs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy_checks import DEPLOY, REPOSITORY

DOCKERFILE = DEPLOY / "Dockerfile"
LOCK = REPOSITORY / "locks" / "requirements.txt"
ADDITIONS = (DEPLOY / "cuda-requirements.txt", DEPLOY / "ray-up" / "requirements.txt")


def lint(recipe: str) -> str:
    """What hadolint has to say."""
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run(
        [hadolint, "--no-color", "-"], input=recipe, capture_output=True, text=True, check=False
    )
    return done.stdout


def locked(path: Path) -> dict[str, str]:
    """Versions that a lock names."""
    return dict(re.findall(r"(?m)^([a-z0-9-]+)==(\S+)", path.read_text("utf-8")))


def copied_from_repository() -> list[str]:
    """Sources of every COPY that is not from another stage."""
    lines = re.findall(r"(?m)^COPY (?!--from)(.+)$", DOCKERFILE.read_text("utf-8"))
    return [source for line in lines for source in line.split()[:-1]]


def test_recipe_is_clean() -> None:
    assert lint(DOCKERFILE.read_text("utf-8")) == ""


@pytest.mark.parametrize("word", ["FROM", "RUN", "COPY", "WORKDIR", "USER", "ENV"])
def test_misspelt_instruction_is_caught(word: str) -> None:
    recipe = re.sub(rf"(?m)^{word} ", f"{word}X ", DOCKERFILE.read_text("utf-8"), count=1)
    assert lint(recipe) != ""


def test_every_package_is_in_the_image() -> None:
    links = [path for path in (REPOSITORY / "milliways").iterdir() if path.is_symlink()]
    linked = {path.resolve().relative_to(REPOSITORY).parts[0] for path in links}
    assert {"model", "router", "workers", "cluster", "proto"} <= linked
    folders = {source.rstrip("/") for source in copied_from_repository()}
    assert linked | {"milliways"} <= folders


@pytest.mark.parametrize("source", copied_from_repository())
def test_what_is_copied_is_there_and_not_ignored(source: str) -> None:
    assert (REPOSITORY / source).exists()
    kept = re.findall(r"(?m)^!(.+)$", (DEPLOY / "Dockerfile.dockerignore").read_text("utf-8"))
    assert any(source.rstrip("/") == each or source.startswith(f"{each}/") for each in kept)


@pytest.mark.parametrize("path", ADDITIONS, ids=lambda path: path.name)
def test_additions_are_exact_and_hashed_and_say_not_from_where(path: Path) -> None:
    text = path.read_text("utf-8")
    for entry in re.split(r"\n(?=\S)", text.strip()):
        assert re.match(r"[a-z0-9-]+==[^\s;]+", entry), entry
        assert "--hash=sha256:" in entry
    assert "://" not in text
    assert re.findall(r"(?m)^-.*", text) == []


@pytest.mark.parametrize("path", ADDITIONS, ids=lambda path: path.name)
def test_additions_do_not_contradict_the_lock(path: Path) -> None:
    lock, additions = locked(LOCK), locked(path)
    assert {
        name: additions[name] for name in additions.keys() & lock.keys()
    }.items() <= lock.items()


def test_cuda_is_made_for_the_locked_jax() -> None:
    additions = locked(ADDITIONS[0])
    ours = {additions[name] for name in additions if name.startswith("jax-cuda")}
    assert ours == {locked(LOCK)["jax"]}
