"""The house rules that a linter does not know."""

import ast
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("model", "workers", "router", "cluster", "milliways", "benchmarks")
LOCKS = ("requirements.txt", "bootstrap.txt", "ci.txt")
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 70


def python_files(*folders: str) -> list[Path]:
    """Our Python files in these folders, generated ones left out."""
    paths = [path for folder in folders for path in sorted((REPOSITORY / folder).rglob("*.py"))]
    return [path for path in paths if "_pb2" not in path.name]


@cache
def nodes_of(path: Path) -> list[ast.AST]:
    """Every syntax node of a file. Several tests ask, and parsing takes seconds."""
    return list(ast.walk(ast.parse(path.read_text("utf-8"))))


def nodes(*folders: str) -> Iterator[tuple[str, ast.AST]]:
    """Every syntax node, with the place to name in a complaint."""
    for path in python_files(*folders):
        for node in nodes_of(path):
            yield f"{path.relative_to(REPOSITORY)}:{getattr(node, 'lineno', 0)}", node


def loads_pickle(node: ast.AST) -> bool:
    """Whether a node could run what a file says: unpickling, or NumPy asked to do so."""
    match node:
        case ast.Import(names=aliases):
            return any(alias.name in {"pickle", "dill", "shelve"} for alias in aliases)
        case ast.ImportFrom(module="pickle" | "dill" | "shelve" | "cloudpickle"):
            return True
        case ast.keyword(arg="allow_pickle", value=ast.Constant(value=False)):
            return False
        case ast.keyword(arg="allow_pickle"):
            return True
    return False


def asserts_a_constant(node: ast.AST) -> bool:
    """Whether a node asserts what cannot fail."""
    match node:
        case ast.Assert(test=ast.Constant(value=value)):
            return bool(value)
    return False


def lines_of(node: ast.AST) -> int:
    """Length of a function with its signature and docstring; 0 for any other node."""
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            return (node.end_lineno or node.lineno) - node.lineno + 1
    return 0


def long_functions(places: Iterable[tuple[str, ast.AST]]) -> list[str]:
    """The functions with too many lines. Other nodes may have the same place as a function."""
    return [
        f"{place}: {length} lines"
        for place, node in places
        if (length := lines_of(node)) > MAX_FUNCTION_LINES
    ]


def test_files_are_short() -> None:
    lengths = {
        str(path.relative_to(REPOSITORY)): len(path.read_text("utf-8").splitlines())
        for path in python_files(*PACKAGES, "tests")
    }
    assert {path: n for path, n in lengths.items() if n > MAX_FILE_LINES} == {}


def test_functions_are_short() -> None:
    assert long_functions(nodes(*PACKAGES, "tests")) == []


def test_a_long_function_is_found_although_its_arguments_are_on_its_line() -> None:
    tree = ast.parse("def long(argument: int) -> int:\n" + "    argument += 1\n" * 70)
    assert long_functions(
        (f"{node.lineno}", node) for node in ast.walk(tree.body[0]) if hasattr(node, "lineno")
    ) == ["1: 71 lines"]


def test_nothing_of_ours_can_unpickle() -> None:
    assert [place for place, node in nodes(*PACKAGES) if loads_pickle(node)] == []


def test_no_assertion_is_of_a_constant() -> None:
    assert [place for place, node in nodes(*PACKAGES, "tests") if asserts_a_constant(node)] == []


@pytest.mark.parametrize("name", LOCKS)
def test_lock_says_what_and_not_from_where(name: str) -> None:
    text = (REPOSITORY / "locks" / name).read_text("utf-8")
    assert "://" not in text
    assert [line for line in text.splitlines() if re.match(r"-|.*@ ", line)] == []
    assert str(REPOSITORY) not in text


@pytest.mark.parametrize("name", LOCKS)
def test_every_locked_package_is_exact_and_hashed(name: str) -> None:
    text = (REPOSITORY / "locks" / name).read_text("utf-8")
    entries = re.split(r"\n(?=\S)", text.strip())
    assert entries
    for entry in entries:
        assert re.match(r"[a-z0-9-]+==[^\s;]+", entry), entry
        assert "--hash=sha256:" in entry


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=trusted)",
    ],
)
def test_unpickling_is_caught(source: str) -> None:
    assert any(loads_pickle(node) for node in ast.walk(ast.parse(source)))
