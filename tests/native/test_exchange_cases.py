"""What the native exchange does in moments that Python cannot arrange (exchange_cases.cc).

The program is linked with the compiled kernels, so that little has to be compiled.
"""

import shutil
import subprocess
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

OPS = Path(__file__).resolve().parents[2] / "model" / "ops"
# Only a hang takes so long.
TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++")
    kernels = [path for end in EXTENSION_SUFFIXES if (path := OPS / f"_kernels{end}").is_file()]
    if compiler is None or not kernels:
        pytest.skip("there is no g++, or no compiled kernels")
    program = tmp_path_factory.mktemp("cases") / "cases"
    source = Path(__file__).with_name("exchange_cases.cc")
    flags = ["-std=c++17", "-O1", "-g", "-Wno-psabi", "-pthread", f"-I{OPS / 'native'}"]
    subprocess.run(
        [compiler, *flags, source, kernels[0], f"-Wl,-rpath,{OPS}", "-o", program], check=True
    )
    return program


@pytest.mark.parametrize("name", ["forgotten", "late", "replaced"])
def test_case(cases: Path, name: str) -> None:
    done = subprocess.run(
        [cases, name], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
