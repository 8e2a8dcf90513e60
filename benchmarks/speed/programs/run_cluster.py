"""A cluster as a contestant: worker processes, each with a share of the experts.

Every worker has all attention layers, so sequences are spread evenly over the workers' routers, as
the ingress would do. Workers are connected as in serving; there is no Ray, Serve or ingress. The
program speaks the line protocol, for decoding workloads only.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from milliways.benchmarks.speed.programs.line_protocol import Measure, serve
from milliways.model.config import load_config

BLOCK_SIZE = 16
_SEED = 1
# Tokens of each sequence that are not timed: drawn before all sequences decode, or after one ended.
_SPARE_TOKENS = 3


class Worker:
    """A worker's process. Its pipes carry lines of JSON."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def send(self, values: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(values) + "\n")
        self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a worker's process ended")
        return json.loads(line)


class Cluster:
    """All workers, and the prompts for them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._vocab_size = load_config(options.model_dir).vocab_size
        self._workers = [Worker(_command(options, index)) for index in range(options.workers)]
        started = [worker.receive() for worker in self._workers]
        addresses = [values["address"] for values in started]
        for worker in self._workers:
            worker.send({"addresses": addresses})
        transports = {
            name for worker in self._workers for name in worker.receive()["transports"].values()
        }
        between = ", ".join(sorted(transports - {"direct"})) or "nothing"
        self.about = (
            f"{started[0]['about']}, {options.workers} workers of {options.threads} thread, "
            f"experts split, {between} between them"
        )
        self._turn = 0

    def measure(self, request: dict[str, Any]) -> tuple[int, float]:
        """Runs one request of the line protocol; counts tokens while all sequences decode."""
        self._turn += 1
        num_steps = request["steps"]
        shares = [
            [self._prompt(i, request["prompt_tokens"]) for i in share]
            for share in _shares(request["size"], len(self._workers))
        ]
        busy = [
            (worker, share) for worker, share in zip(self._workers, shares, strict=True) if share
        ]
        for worker, share in busy:
            worker.send({"prompts": share, "max_tokens": num_steps + _SPARE_TOKENS})
        return decode_speed([worker.receive()["times"] for worker, _ in busy])

    def _prompt(self, index: int, num_tokens: int) -> list[int]:
        """A prompt whose beginning is always the same, so that the prefix cache has most of it.

        Its last block differs in each measurement.
        """
        shared = num_tokens - BLOCK_SIZE
        begin = np.random.default_rng([_SEED, index]).integers(3, self._vocab_size, shared)
        end = np.random.default_rng([_SEED, index, self._turn])
        return [*begin.tolist(), *end.integers(3, self._vocab_size, num_tokens - shared).tolist()]


def _shares(size: int, num_workers: int) -> list[range]:
    return [range(first, size, num_workers) for first in range(num_workers)]


def decode_speed(times_by_worker: Sequence[Sequence[Sequence[float]]]) -> tuple[int, float]:
    """Tokens and seconds of the period in which all sequences decode.

    Routers step independently. The speed of each is measured over its own steps in that period, and
    the speeds are added.
    """
    sequences = [times for worker in times_by_worker for times in worker]
    begin_s = max(times[0] for times in sequences)
    end_s = min(times[-1] for times in sequences)
    num_tokens, tokens_per_s = 0, 0.0
    for worker in times_by_worker:
        steps = sorted({t for times in worker for t in times if begin_s <= t <= end_s})
        if len(steps) < 2:
            # The routers hardly ran at the same time, as in the first request, which compiles.
            return _speed_of_all(sequences)
        drawn = sum(steps[0] < t <= steps[-1] for times in worker for t in times)
        num_tokens += drawn
        tokens_per_s += drawn / (steps[-1] - steps[0])
    return num_tokens, num_tokens / tokens_per_s


def _speed_of_all(sequences: Sequence[Sequence[float]]) -> tuple[int, float]:
    seconds = max(times[-1] for times in sequences) - min(times[0] for times in sequences)
    return sum(len(times) for times in sequences), seconds


def _command(options: argparse.Namespace, index: int) -> list[str]:
    longest = options.batch_tokens + _SPARE_TOKENS + BLOCK_SIZE
    flags = {
        "--index": index,
        "--workers": options.workers,
        "--threads": options.threads,
        "--dtype": options.dtype,
        "--activations": options.activations,
        "--transport": options.transport,
        "--kv-tokens": options.max_batch * longest * 2,
    }
    words = [str(word) for flag, value in flags.items() for word in (flag, value)]
    program = "milliways.benchmarks.speed.programs.run_worker"
    return [sys.executable, "-m", program, str(options.model_dir), *words]


def load(options: argparse.Namespace) -> tuple[str, Measure]:
    """Starts the workers; each loads its share of the model."""
    cluster = Cluster(options)
    return cluster.about, cluster.measure


def parse_options() -> argparse.Namespace:
    """The options that `milliways bench cluster` starts this program with."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True, help="threads of each worker")
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--activations", required=True)
    parser.add_argument("--transport", required=True)
    parser.add_argument("--max-batch", type=int, required=True)
    parser.add_argument("--batch-tokens", type=int, required=True, help="context of each sequence")
    return parser.parse_args()


if __name__ == "__main__":
    parsed = parse_options()
    serve(lambda: load(parsed))
