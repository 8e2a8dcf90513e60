"""`milliways bench cluster`: a cluster's tokens a second beside those of one process."""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

from milliways.benchmarks.speed.arguments import (
    check_rounds,
    counts_of,
    find_model,
    report,
    write_json,
)
from milliways.benchmarks.speed.bench_model import BENCH_NAME
from milliways.benchmarks.speed.contestant import Contestant, ContestantError, ProgramContestant
from milliways.benchmarks.speed.distribution import format_aims
from milliways.benchmarks.speed.machine import make_limits_reader
from milliways.benchmarks.speed.rounds import run_rounds
from milliways.benchmarks.speed.table import Report
from milliways.benchmarks.speed.workload import workloads_of
from milliways.cluster.cli.commands.options import ACTIVATION_NAMES, DTYPE_NAMES
from milliways.model.config import load_config
from milliways.model.errors import InvalidRequestError, ModelError
from milliways.model.model_dir import DEMO_NAME
from milliways.wire import transports

CLUSTER, ALONE = "cluster", "one process"
MAX_BATCH = 64
MAX_WORKERS = 8


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    option = parser.add_argument
    option("--model", metavar=f"{BENCH_NAME}|{DEMO_NAME}|DIR", default=BENCH_NAME)
    option("--workers", type=int, default=2, metavar="N", help="of one thread [%(default)s]")
    option("--transport", choices=transports.SETTINGS, default="auto", help="[%(default)s]")
    option("--dtype", choices=DTYPE_NAMES, default="float32", help="[%(default)s]")
    option("--activations", choices=ACTIVATION_NAMES, default=ACTIVATION_NAMES[0])
    option("--batch", metavar="1,8", default="1,8,32", help="decode batch sizes [%(default)s]")
    option("--rounds", type=int, default=7, metavar="N", help="[%(default)s]")
    option("--json", type=Path, metavar="FILE", help="also write every sample to a file")


def run(options: argparse.Namespace) -> None:
    """Starts both, runs the rounds, prints the tables."""
    workloads = workloads_of(counts_of("batch", options.batch), ())
    _check(options, [workload.size for workload in workloads])
    model_dir = find_model(options.model)
    num_tokens = max(workload.num_context_tokens for workload in workloads)
    sizes = ["--max-batch", str(max(w.size for w in workloads)), "--batch-tokens", str(num_tokens)]
    with tempfile.TemporaryDirectory() as work_dir, ExitStack() as running:
        limits_reader = make_limits_reader(Path(work_dir), options.workers)
        contestants = [
            running.enter_context(closing(contestant))
            for contestant in _start(options, model_dir, sizes, Path(work_dir))
        ]
        results = run_rounds(contestants, workloads, options.rounds, limits_reader.read, report)
    tables = Report(load_config(model_dir), workloads, [CLUSTER], [ALONE], results)
    print(tables.format())
    print("\n" + format_aims(results, CLUSTER, ALONE, workloads) + "\n")
    for contestant in contestants:
        print(f"- {contestant.name}: {contestant.about}")
    about = {contestant.name: contestant.about for contestant in contestants}
    write_json(options.json, tables.to_json() | {"about": about})
    if not all(results.find(name, w) for name in (CLUSTER, ALONE) for w in workloads):
        raise ModelError("not everything was measured; the notes above say why")


def _check(options: argparse.Namespace, batches: list[int]) -> None:
    check_rounds("rounds", options.rounds)
    if not batches or max(batches) > MAX_BATCH:
        limit = f"one or more sizes of at most {MAX_BATCH}"
        raise InvalidRequestError("batch", options.batch, limit)
    if not 2 <= options.workers <= MAX_WORKERS:
        raise InvalidRequestError("workers", options.workers, f"between 2 and {MAX_WORKERS}")


def _start(
    options: argparse.Namespace, model_dir: Path, sizes: list[str], work_dir: Path
) -> Iterator[Contestant]:
    """Both with as many threads in all.

    Raises:
        ModelError: one cannot be started.
    """
    numbers = ["--dtype", options.dtype, "--activations", options.activations]
    workers = ["--workers", str(options.workers), "--threads", "1"]
    programs: dict[str, list[str]] = {
        CLUSTER: ["run_cluster", *workers, "--transport", options.transport],
        ALONE: ["run_milliways", "--prompt-tokens", "1", "--threads", str(options.workers)],
    }
    for name, (program, *flags) in programs.items():
        report(f"loading {name}")
        command = [
            sys.executable,
            "-m",
            f"milliways.benchmarks.speed.programs.{program}",
            str(model_dir),
        ]
        log_path = work_dir / f"{program}.log"
        try:
            yield ProgramContestant(
                name, [*command, *numbers, *flags, *sizes], os.environ, log_path
            )
        except ContestantError as error:
            raise ModelError(f"{name}: {error}") from error
