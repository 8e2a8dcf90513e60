"""Measures the limits of a device, in bytes and operations per second, and times functions."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

# A sample takes about this long, so that the time to start it does not matter.
SAMPLE_S = 0.02
CALLS_PER_SAMPLE_MAX = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Floors:
    """The rate of a large copy (bytes read and written), and of a large bfloat16 product."""

    bytes_per_s: float
    flops_per_s: float

    def least_s(self, num_bytes: float, num_flops: float) -> float:
        """The least time that any program needs for this work."""
        return max(num_bytes / self.bytes_per_s, num_flops / self.flops_per_s)


def measure_floors(copied_bytes: int, matmul_size: int, num_repeats: int) -> Floors:
    """Copies an array on the device, and multiplies two square matrices."""
    source = jnp.ones(copied_bytes, jnp.uint8)
    square = jnp.ones((matmul_size, matmul_size), jnp.bfloat16)
    copy, multiply = jax.jit(jnp.copy), jax.jit(jnp.matmul)
    seconds = median_times(
        {"copy": lambda: copy(source), "matmul": lambda: multiply(square, square)}, num_repeats
    )
    return Floors(
        bytes_per_s=2 * copied_bytes / seconds["copy"],
        flops_per_s=2 * matmul_size**3 / seconds["matmul"],
    )


def median_times(functions: Mapping[str, Callable[[], Any]], num_repeats: int) -> dict[str, float]:
    """Seconds per call of each function: medians of samples taken in turn, after a warm-up."""
    num_calls = {name: _calls_per_sample(function) for name, function in functions.items()}
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(num_repeats):
        for name, function in functions.items():
            samples[name].append(_time_calls(function, num_calls[name]))
    return {name: statistics.median(times) for name, times in samples.items()}


def _calls_per_sample(function: Callable[[], Any]) -> int:
    jax.block_until_ready(function())
    once_s = _time_calls(function, 1)
    return min(CALLS_PER_SAMPLE_MAX, max(1, round(SAMPLE_S / once_s)))


def _time_calls(function: Callable[[], Any], num_calls: int) -> float:
    """Seconds per call. The calls are queued; only the last one is waited for."""
    start_s = time.perf_counter()
    result = None
    for _ in range(num_calls):
        result = function()
    jax.block_until_ready(result)
    return (time.perf_counter() - start_s) / num_calls
