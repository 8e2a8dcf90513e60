"""llama.cpp as a contestant: runs its own benchmark programs on our weights, once per round.

`llama-bench` measures one sequence (its figures are the ones usually quoted), and
`llama-batched-bench` several. Both load the model and warm up each time; that is not timed.
"""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from milliways.benchmarks.speed.contestant import MEASURE_TIMEOUT_S, ContestantError
from milliways.benchmarks.speed.workload import PROMPT_TOKENS, Kind, Workload

BENCH = "llama-bench"
BATCHED_BENCH = "llama-batched-bench"
_NUM_ERROR_LINES = 3


class LlamaCpp:
    """llama.cpp with one model file."""

    def __init__(self, name: str, bin_dir: Path, model_path: Path, num_threads: int) -> None:
        self.name = name
        self.about = "the same weights"
        self._bin_dir = bin_dir
        self._common = ["-m", str(model_path), "-t", str(num_threads)]

    def measure(self, workload: Workload) -> float:
        if workload.kind is Kind.DECODE and workload.size > 1:
            return self._batched(workload)
        if workload.kind is Kind.DECODE:
            size = ["-p", "0", "-n", str(workload.num_steps), "-d", str(PROMPT_TOKENS)]
        else:
            size = ["-p", str(workload.size), "-n", "0"]
        (result,) = json.loads(self._run(BENCH, [*size, "-r", "1", "-o", "json"]))
        self.about = _describe(result)
        return float(result["avg_ts"])

    def close(self) -> None:
        """Does nothing: no process runs between measurements."""

    def _batched(self, workload: Workload) -> float:
        num_context_tokens = workload.size * workload.num_context_tokens
        size = ["-npp", str(PROMPT_TOKENS), "-ntg", str(workload.num_steps)]
        size += ["-npl", str(workload.size), "-c", str(num_context_tokens)]
        output = self._run(BATCHED_BENCH, [*size, "--output-format", "jsonl"])
        return batched_tokens_per_s(output)

    def _run(self, program: str, options: Sequence[str]) -> str:
        command = [str(self._bin_dir / program), *self._common, *options]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=MEASURE_TIMEOUT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ContestantError(f"{program}: {error}") from error
        if done.returncode:
            lines = done.stderr.strip().splitlines()[-_NUM_ERROR_LINES:]
            raise ContestantError(f"{program} exited with {done.returncode}: {' / '.join(lines)}")
        return done.stdout


def batched_tokens_per_s(output: str) -> float:
    """The decode speed in the output of `llama-batched-bench`.

    Raises:
        ContestantError: the output has none. The program skips a batch that does not fit, and
            reports no error.
    """
    for line in output.splitlines():
        if line.startswith("{"):
            return float(json.loads(line)["speed_tg"])
    raise ContestantError(f"{BATCHED_BENCH} printed no result")


def _describe(result: dict[str, Any]) -> str:
    build = f"build {result['build_number']} ({result['build_commit']})"
    return f"the same weights, {result['n_threads']} threads, {build}"
