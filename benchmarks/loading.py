"""What digests cost while weights are loaded.

    python -m milliways.benchmarks.loading [--model DIR] [--rounds N]

Loads all experts of a model for the kernels, in turns: from views of mapped files, without digests;
and as a worker does, from its own copies, with digests. The floor reads the same bytes and keeps
none. The files are in the page cache, so that the disk hides nothing: with a disk of 1 GB/s or
less, the digests cost nothing.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from milliways.benchmarks.speed.bench_model import ensure_bench_model
from milliways.model.checkpoint import CheckedTensors, Checkpoint, TensorSource
from milliways.model.ops.select import KernelChoice, select_ops
from milliways.model.params import Loader, load_experts
from milliways.runtime.malloc import keep_freed_blocks
from milliways.runtime.user_cache import user_cache_dir

MOST_TIMES = 1.05
_PIECE_BYTES = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what digests cost while loading.")
    parser.add_argument("--model", type=Path, help="model directory [the bench model, 1.3 GB]")
    parser.add_argument("--rounds", type=int, default=7, help="number of rounds [%(default)s]")
    options = parser.parse_args()
    model_dir = options.model or ensure_bench_model(user_cache_dir() / "models")
    # As a worker does: memory of one copy is used for the next.
    keep_freed_blocks()
    loader = select_ops(KernelChoice())[1]
    programs: dict[str, Callable[[], int]] = {
        "read only: floor": lambda: read_files(model_dir),
        "mapped, no digests": lambda: load(Checkpoint.open(model_dir), loader),
        "copied, with digests": lambda: load(CheckedTensors(Checkpoint.open(model_dir)), loader),
    }
    for run in programs.values():
        run()
    rates: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(options.rounds):
        for name, run in programs.items():
            began_s = time.perf_counter()
            num_bytes = run()
            rates[name].append(num_bytes / (time.perf_counter() - began_s) / 1e9)
    print("| GB/s | median | best |\n|---|---:|---:|")
    for name, of_one in rates.items():
        print(f"| {name} | {statistics.median(of_one):.2f} | {max(of_one):.2f} |")
    _, mapped, digested = rates.values()
    # Within a round, because the machine's speed changes from round to round.
    ratio = statistics.median(m / d for m, d in zip(mapped, digested, strict=True))
    verdict = "reached" if ratio <= MOST_TIMES else "missed"
    print(f"with digests {ratio:.2f} times as long (aim: at most {MOST_TIMES}, {verdict})")


def load(source: TensorSource, loader: Loader) -> int:
    """Loads all experts, a layer at a time; returns the number of bytes."""
    for layer in range(source.config.num_layers):
        load_experts(source, layer, loader)
    return source.bytes_read


def read_files(model_dir: Path) -> int:
    """Reads the experts' files into one small buffer; returns the number of bytes."""
    buffer = bytearray(_PIECE_BYTES)
    num_bytes = 0
    with Checkpoint.open(model_dir) as checkpoint:
        for spec in checkpoint.specs:
            if spec.role.is_expert:
                with open(checkpoint.record(spec).path, "rb", buffering=0) as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
                    while count := file.readinto(buffer):
                        num_bytes += count
    return num_bytes


if __name__ == "__main__":
    main()
