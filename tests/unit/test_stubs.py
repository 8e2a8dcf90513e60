"""The committed stubs are those of the committed .proto files."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stubs import PROTO

SOURCES = sorted(PROTO.rglob("*.proto"))


def test_stubs_have_not_drifted(tmp_path: Path) -> None:
    # A process of its own: two compilers of one file in one process clash.
    program = "import sys, pathlib, tests.stubs as s; s.generate(pathlib.Path(sys.argv[1]))"
    root = PROTO.parent
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, cwd=root)
    fresh = {path.relative_to(tmp_path): path for path in tmp_path.rglob("*_pb2*")}
    assert len(fresh) == 3 * len(SOURCES)
    committed = {
        path.relative_to(PROTO)
        for path in PROTO.rglob("*_pb2*.py*")
        if "__pycache__" not in path.parts
    }
    assert committed == set(fresh), "run `make proto`"
    for name, path in fresh.items():
        assert (PROTO / name).read_text("utf-8") == path.read_text("utf-8"), f"{name}: `make proto`"


def test_buf_has_no_complaint(tmp_path: Path) -> None:
    buf = Path(sys.executable).with_name("buf")
    environment = {"PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run([buf, "lint", "."], cwd=PROTO, env=environment, capture_output=True)
    assert done.returncode == 0, (done.stdout + done.stderr).decode()


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_every_field_and_message_is_documented_and_named_by_rule(source: Path) -> None:
    """What `buf lint` asks for, as far as it can be seen from descriptors."""
    name = ".".join(source.relative_to(PROTO).with_suffix("").parts)
    descriptor = importlib.import_module(f"{name}_pb2").DESCRIPTOR
    assert descriptor.package == ".".join(source.relative_to(PROTO).parent.parts)
    for enum in descriptor.enum_types_by_name.values():
        prefix = "".join(f"_{c}" if c.isupper() else c.upper() for c in enum.name).lstrip("_")
        values = {value.number: value.name for value in enum.values}
        assert values[0] == f"{prefix}_UNSPECIFIED"
        assert all(value.startswith(f"{prefix}_") for value in values.values())
    for service in descriptor.services_by_name.values():
        assert service.name.endswith("Service")
        for method in service.methods:
            assert method.input_type.name == f"{method.name}Request"
            assert method.output_type.name == f"{method.name}Response"
