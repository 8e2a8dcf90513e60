"""The native exchange under sanitizers: races and memory errors that no result would show."""

import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
NATIVE = REPOSITORY / "model" / "ops" / "native"
SECONDS = "20"
# Those that need XLA's headers and nothing else of it; the stress test does without.
_WITH_XLA = ("ffi.cc", "exchange_ffi.cc", "halves_ffi.cc", "layers_ffi.cc")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_exchange_under_stress_is_clean(tmp_path: Path, sanitizer: str) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++")
    sources = [path for path in sorted(NATIVE.glob("*.cc")) if path.name not in _WITH_XLA]
    program = tmp_path / "stress"
    flags = ["-std=c++17", "-O1", "-g", "-ffp-contract=off", "-Wno-psabi", "-pthread"]
    flags += [f"-fsanitize={sanitizer}", f"-I{NATIVE}"]
    stress = Path(__file__).with_name("exchange_stress.cc")
    subprocess.run(
        [
            compiler,
            *flags,
            f"-fsanitize={sanitizer}",
            f"-I{NATIVE}",
            *sources,
            stress,
            "-o",
            program,
        ],
        check=True,
    )
    done = subprocess.run(
        [program, SECONDS],
        env={"TSAN_OPTIONS": "halt_on_error=1", "UBSAN_OPTIONS": "halt_on_error=1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # What it counted: exchanges were right, filled, given up, and lost.
    assert all(int(word) > 0 for word in done.stdout.split() if word.isdigit()), done.stdout
