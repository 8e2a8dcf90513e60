"""Generates the stubs of every .proto into a folder, for `make proto` and for its test."""

import sys
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

PROTO = Path(__file__).resolve().parents[1] / "proto"


def generate(target: Path) -> None:
    """Writes messages, their types, and services below `target`, which must exist."""
    sources = sorted(str(path) for path in PROTO.rglob("*.proto"))
    options = [f"--{kind}={target}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    well_known = files("grpc_tools") / "_proto"
    failed = protoc.main(["", f"-I{PROTO}", f"-I{well_known}", *options, *sources])
    if failed:
        raise RuntimeError(f"protoc failed with code {failed}")


if __name__ == "__main__":
    generate(Path(sys.argv[1]))
