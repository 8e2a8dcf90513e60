"""Measures the limits of this machine: bytes read from memory and float operations, per second.

A small C++ program measures. If it cannot be compiled, NumPy measures, and its memory figures are
too low.
"""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Protocol

import numpy as np

from milliways.benchmarks.speed.floors import MachineLimits

_SOURCE = Path(__file__).with_name("machine_limits.cpp")
_COMPILERS = ("c++", "g++", "clang++")
_COMPILER_FLAGS = ("-O3", "-march=native", "-std=c++17", "-pthread")
_TIMEOUT_S = 120
_NUM_READ_BYTES = 512 << 20
_MATMUL_SIZE = 1024
_NUM_TRIES = 3


class LimitsReader(Protocol):
    """Measures the limits. `method` is the text of the report on how they are measured."""

    @property
    def method(self) -> str: ...

    def read(self) -> MachineLimits: ...


def num_usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_limits_reader(build_dir: Path, num_threads: int) -> LimitsReader:
    """The compiled reader if its program can be compiled, otherwise NumPy's."""
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    program = build_dir / "machine_limits"
    if compiler and _compile(compiler, program):
        return CompiledReader(program, num_threads)
    return NumpyReader(num_threads)


def median_limits(readings: list[MachineLimits]) -> MachineLimits:
    """The median of each limit over all readings of a benchmark."""
    return MachineLimits(
        read_bytes_per_s_1_thread=median(r.read_bytes_per_s_1_thread for r in readings),
        read_bytes_per_s=median(r.read_bytes_per_s for r in readings),
        flops_per_s_1_thread=median(r.flops_per_s_1_thread for r in readings),
        flops_per_s=median(r.flops_per_s for r in readings),
    )


class CompiledReader:
    """Runs the compiled program for each reading."""

    method = "compiled loops over native vectors, best of 3"

    def __init__(self, program: Path, num_threads: int) -> None:
        self._command = [str(program), str(num_threads)]

    def read(self) -> MachineLimits:
        output = subprocess.run(
            self._command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S
        ).stdout
        return MachineLimits(**json.loads(output))


class NumpyReader:
    """Sums an array and multiplies matrices in this process, which must be idle otherwise."""

    method = "NumPy's sum and matrix product (no C++ compiler found), best of 3: too low for memory"

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads

    def read(self) -> MachineLimits:
        memory = np.ones(_NUM_READ_BYTES // 4, np.float32)
        square = np.ones((_MATMUL_SIZE, _MATMUL_SIZE), np.float32)
        multiply_s = _best_seconds(lambda: square @ square)
        flops_per_s = 2 * _MATMUL_SIZE**3 / multiply_s
        return MachineLimits(
            read_bytes_per_s_1_thread=memory.nbytes / _best_seconds(memory.sum),
            read_bytes_per_s=memory.nbytes / self._sum_in_threads(memory),
            # NumPy's BLAS chooses its number of threads, so one measurement gives both figures.
            flops_per_s_1_thread=flops_per_s,
            flops_per_s=flops_per_s,
        )

    def _sum_in_threads(self, memory: np.ndarray) -> float:
        parts = np.array_split(memory, self._num_threads)
        with ThreadPoolExecutor(self._num_threads) as pool:
            return _best_seconds(lambda: list(pool.map(np.sum, parts)))


def _compile(compiler: str, program: Path) -> bool:
    """Returns whether the compiler succeeded. Errors are not shown, because NumPy can measure."""
    command = [compiler, *_COMPILER_FLAGS, str(_SOURCE), "-o", str(program)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError):
        return False
    return True


def _best_seconds(work: Callable[[], object]) -> float:
    tries: list[float] = []
    for _ in range(_NUM_TRIES):
        start_s = time.perf_counter()
        work()
        tries.append(time.perf_counter() - start_s)
    return min(tries)
