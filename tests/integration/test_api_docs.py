"""The code in the documentation of the API does what the text beside it says."""

import io
import re
import textwrap
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

import milliways
import milliways.api
from tests.ingresses import demo_model, grpc_served, local_source

REPOSITORY = Path(__file__).resolve().parents[2]
ADDRESS = "127.0.0.1:50051"
BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with local_source() as source, grpc_served(source, demo_model()) as address:
        yield address


def printed_by(source: str, address: str, names: dict[str, Any]) -> str:
    """Runs code as its reader would, with a server of ours at the address that it names."""
    out = io.StringIO()
    with redirect_stdout(out):
        exec(compile(source.replace(ADDRESS, address), "<documentation>", "exec"), names)
    return out.getvalue()


@pytest.mark.parametrize("name", ["docs/api.md", "README.md"])
def test_blocks_of_a_page_print_what_the_page_says(name: str, address: str) -> None:
    names: dict[str, Any] = {}
    said = ""
    num_compared = 0
    for language, text in BLOCK.findall((REPOSITORY / name).read_text("utf-8")):
        if language == "python":
            said = printed_by(text, address, names)
        else:
            assert said == text
            num_compared += 1
    assert num_compared > 0


@pytest.mark.parametrize("package", [milliways, milliways.api])
def test_code_in_the_docstring_of_a_package_runs(package: Any, address: str) -> None:
    lines = package.__doc__.splitlines()
    code = textwrap.dedent("\n".join(line for line in lines if line.startswith("    ")))
    assert " Lumen" in printed_by(code, address, {})
