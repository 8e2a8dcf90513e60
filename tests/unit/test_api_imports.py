"""What an import costs: a name of the API brings only what it needs."""

import subprocess
import sys
from typing import get_type_hints

import pytest

import milliways

HEAVY = ("jax", "ray", "grpc", "numpy", "google.protobuf", "asyncio", "importlib.metadata")


def imported_by(statement: str, modules: tuple[str, ...] = HEAVY) -> set[str]:
    """Those of the modules that a program with this one statement imports."""
    program = f"import sys; {statement}; print(*(n for n in {modules!r} if n in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return set(done.stdout.split())


def test_package_itself_imports_nothing() -> None:
    assert imported_by("import milliways") == set()


def test_parameters_need_no_arrays() -> None:
    assert imported_by("from milliways import SamplingParams") == set()


def test_clients_import_neither_jax_nor_ray() -> None:
    statement = "from milliways import AsyncClient, Client, SamplingParams, TlsSettings"
    assert imported_by(statement, ("jax", "jaxlib", "ray")) == set()


def test_versions_are_shown_without_importing_the_libraries() -> None:
    statement = (
        "from milliways.cluster.cli.main import main\n"
        "try: main(['--version'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print()"
    )
    program = f"{statement}; import sys; print(*({{'jax', 'ray'}} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.stderr == ""
    said, _, imported = done.stdout.partition("\n\n")
    assert [line.split()[0] for line in said.splitlines()] == ["milliways", "jax", "ray"]
    assert said.splitlines()[0] == f"milliways {milliways.__version__}"
    assert imported.strip() == ""


def test_every_public_name_is_there() -> None:
    for name in milliways.__all__:
        assert getattr(milliways, name) is not None
    assert set(milliways.__all__) <= set(dir(milliways))
    assert get_type_hints(milliways.LLM.generate)


def test_other_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = milliways.Nothing  # type: ignore[attr-defined]
