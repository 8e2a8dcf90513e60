"""Documents name files and link to pages that exist, so that a moved file is noticed.

Decision records are history: they may name files that are gone. Their links are checked.
"""

import argparse
import fnmatch
import re
from functools import cache
from pathlib import Path

import pytest

from milliways.cluster.cli.main import COMMANDS, build_parser

REPOSITORY = Path(__file__).resolve().parents[2]
RECORDS = REPOSITORY / "docs" / "adr"
DOCUMENTS = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md")),
    *(REPOSITORY / folder / "README.md" for folder in ("benchmarks", "tests/golden")),
    *sorted((REPOSITORY / "docs").rglob("*.md")),
]
FOLDERS = ("benchmarks", "cluster", "deploy", "docs", "locks", "milliways", "model")
FOLDERS += ("proto", "router", "tests", "workers")

LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
RUN = re.compile(r"python -m ((?:milliways|tests)\.[\w.]+)")
# A path from the repository's root, and the bare name of a module.
PATH = re.compile(rf"(?:{'|'.join(FOLDERS)})/[\w.*/-]*")
MODULE = re.compile(r"[\w*]+\.py")


def broken_links(document: Path, text: str) -> list[str]:
    """Relative links to pages or headings that are not there."""
    return [
        target
        for target in LINK.findall(text)
        if "://" not in target and not _leads_somewhere(document, target)
    ]


def missing_files(text: str) -> list[str]:
    """Files, folders and modules named as code that are not there; `*` stands for any letters."""
    run = (f"{name.replace('.', '/')}.py" for name in RUN.findall(text))
    return [name for name in (*CODE.findall(text), *run) if not _exists(name)]


@cache
def module_names() -> list[str]:
    """The names of all our Python files, without their folders."""
    return [path.name for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*.py")]


def usage(command: str) -> str:
    """What README says of a command's arguments."""
    text = (REPOSITORY / "README.md").read_text("utf-8")
    found = re.search(rf"^milliways {command} +(.*(?:\n {{3,}}.*)*)", text, re.MULTILINE)
    assert found is not None
    return found[1]


def options(command: str) -> set[str]:
    """The options that a command takes, by their long names."""
    [commands] = [
        action
        for action in build_parser(command)._actions
        if isinstance(action, argparse._SubParsersAction)
    ]
    actions = commands.choices[command]._actions
    names = {name for action in actions for name in action.option_strings} - {"--help"}
    return {name for name in names if name.startswith("--")}


def _leads_somewhere(document: Path, target: str) -> bool:
    path, _, heading = target.partition("#")
    page = document.parent / path if path else document
    if not page.exists():
        return False
    headings = {_anchor(line) for line in page.read_text("utf-8").splitlines()}
    return not heading or heading in headings


def _anchor(line: str) -> str:
    """What GitHub calls a heading in a link; empty for other lines."""
    if not line.startswith("#"):
        return ""
    return re.sub(r"[^\w -]", "", line.lstrip("#").strip().lower()).replace(" ", "-")


def _exists(name: str) -> bool:
    if PATH.fullmatch(name):
        return any(REPOSITORY.glob(name.rstrip("/")))
    if MODULE.fullmatch(name):
        return bool(fnmatch.filter(module_names(), name))
    return True


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_document_links_to_pages_that_exist(document: Path) -> None:
    assert broken_links(document, document.read_text("utf-8")) == []


@pytest.mark.parametrize(
    "document",
    [path for path in DOCUMENTS if path.parent != RECORDS],
    ids=lambda path: str(path.relative_to(REPOSITORY)),
)
def test_document_names_files_that_exist(document: Path) -> None:
    assert missing_files(document.read_text("utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        "in `router/gone.py`",
        "in `router/gone/`",
        "in `tests/golden/GONE.md`",
        "`gone_for_good.py` and more",
        "all of `model/ops/gone*.py`",
        "run `python -m milliways.benchmarks.gone` once",
    ],
)
def test_name_of_a_file_that_is_gone_is_noticed(text: str) -> None:
    assert len(missing_files(text)) == 1


@pytest.mark.parametrize("target", ["gone.md", "../gone.md", "#gone", "FAULTS.md#gone"])
def test_link_to_what_is_gone_is_noticed(target: str) -> None:
    page = REPOSITORY / "docs" / "ARCHITECTURE.md"
    assert broken_links(page, f"see [there]({target})") == [target]


def test_names_and_links_that_lead_somewhere_pass() -> None:
    text = """See [faults](FAULTS.md#the-promise), [below](#glossary), [all](https://example.org/a).
    `router/dispatch.py`, `model/ops/`, `gpu*.py`, `ckpt-0/tensor00000_000`, `config.json`
    python -m milliways.benchmarks.full_size"""
    assert missing_files(text) == []
    assert broken_links(REPOSITORY / "docs" / "ARCHITECTURE.md", text) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_lists_the_options_of_a_command(command: str) -> None:
    listed = usage(command)
    named = set(re.findall(r"--[a-z-]+", listed))
    assert named <= options(command)
    # Only a list that says that there are more may leave any out.
    assert listed.endswith("…") or named == options(command)
