"""`milliways bench cluster`: a cluster's tokens per second beside those of one process."""

import argparse
import tempfile
from pathlib import Path

from milliways.benchmarks.speed.arguments import (
    check_rounds,
    counts_of,
    find_model,
    report,
    write_json,
)
from milliways.benchmarks.speed.bench_model import BENCH_NAME, DEEP_NAME
from milliways.benchmarks.speed.distribution import ClusterBench, measure_cluster
from milliways.benchmarks.speed.workload import workloads_of
from milliways.cluster.cli.commands.options import ACTIVATION_NAMES, DTYPE_NAMES
from milliways.model.errors import InvalidRequestError, ModelError
from milliways.model.model_dir import DEMO_NAME
from milliways.wire import transports

MAX_BATCH = 64
MAX_WORKERS = 8


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    option = parser.add_argument
    option(
        "--model",
        metavar=f"{BENCH_NAME}|{DEEP_NAME}|{DEMO_NAME}|DIR",
        default=BENCH_NAME,
        help="model to measure with [%(default)s]",
    )
    option(
        "--workers",
        type=int,
        default=2,
        metavar="N",
        help="number of workers, each with one thread [%(default)s]",
    )
    option(
        "--transport",
        choices=transports.SETTINGS,
        default="auto",
        help="transport between the workers [%(default)s]",
    )
    option(
        "--dtype",
        choices=DTYPE_NAMES,
        default="float32",
        help="dtype of activations [%(default)s]",
    )
    option(
        "--activations",
        choices=ACTIVATION_NAMES,
        default=ACTIVATION_NAMES[0],
        help="what is multiplied with int8 weights [%(default)s]",
    )
    option("--batch", metavar="1,8", default="1,8,32", help="decode batch sizes [%(default)s]")
    option("--rounds", type=int, default=7, metavar="N", help="number of rounds [%(default)s]")
    option("--json", type=Path, metavar="FILE", help="also write every sample to a file")


def run(options: argparse.Namespace) -> None:
    """Measures both, and prints the tables."""
    workloads = workloads_of(counts_of("batch", options.batch), ())
    _check(options, [workload.size for workload in workloads])
    model_dir = find_model(options.model)
    with tempfile.TemporaryDirectory() as work_dir:
        bench = ClusterBench(
            model_dir=model_dir,
            work_dir=Path(work_dir),
            num_workers=options.workers,
            transport=options.transport,
            dtype=options.dtype,
            activations=options.activations,
            workloads=workloads,
            num_rounds=options.rounds,
        )
        figures = measure_cluster(bench, report)
    print(figures.format())
    write_json(options.json, figures.to_json())
    if not figures.is_complete:
        raise ModelError("some workloads were not measured; the notes above say why")


def _check(options: argparse.Namespace, batches: list[int]) -> None:
    check_rounds("rounds", options.rounds)
    if not batches or max(batches) > MAX_BATCH:
        limit = f"one or more sizes of at most {MAX_BATCH}"
        raise InvalidRequestError("batch", options.batch, limit)
    if not 2 <= options.workers <= MAX_WORKERS:
        raise InvalidRequestError("workers", options.workers, f"between 2 and {MAX_WORKERS}")
