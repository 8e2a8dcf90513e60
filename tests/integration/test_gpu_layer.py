"""The GPU benchmark runs without a GPU with small layers, and its table is complete."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

KERNELS = {"rms_norm", "linear", "gate", "experts", "attention", "layer"}


def run_benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "milliways.benchmarks.gpu_layer", *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )


# Interpreted kernels compile slowly: minutes when nothing is cached.
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_small_table_is_complete(tmp_path: Path) -> None:
    file = tmp_path / "layer.json"
    result = run_benchmark("--small", "--deterministic", "--repeats", "1", "--json", str(file))
    assert result.returncode == 0, result.stderr
    report = json.loads(file.read_text(encoding="utf-8"))
    assert report["num_layers"] == 2
    assert min(report["floors"].values()) > 0
    shapes = ["batch 1", "batch 4", "prefill 20"]
    modes = ["default", "deterministic"]
    rows = {(row["shape"], row["mode"]): row for row in report["rows"]}
    assert sorted(rows) == sorted((shape, mode) for shape in shapes for mode in modes)
    for row in rows.values():
        numbers = [value for value in row.values() if not isinstance(value, str)]
        assert len(numbers) == 8 and min(numbers) > 0, row
        line = f"| {row['shape']} | {row['mode']} | {row['layer_ms']:.3f} |"
        assert line in result.stdout
    assert rows["batch 1", "default"]["num_experts_read"] == 2
    for mode in modes:
        by_kernel = report["rows_with_equal_bits"][mode]
        assert by_kernel.keys() == KERNELS
        for classes in by_kernel.values():
            assert sorted(size for sizes in classes for size in sizes) == [1, 4, 20]


def test_without_a_gpu_it_says_so() -> None:
    result = run_benchmark()
    assert result.returncode == 1
    assert "no GPU" in result.stderr and "--small" in result.stderr
