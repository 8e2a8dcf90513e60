"""Decodes with a full-size Grok-1 on one small machine.

    python -m milliways.benchmarks.full_size [--dir FOLDER] [--tokens N]
        [--activations exact|int8] [--json FILE]

1. Writes one random layer and an embedding of Grok-1's real sizes (8.1 GB). All 64 layers get the
   same files by hard links: 770 names, which look like 318 GB to a reader.
2. Opens it like any released checkpoint. Attention, embedding and head are loaded; experts stay in
   their mapped files.
3. Decodes some tokens through all 64 layers. Prints seconds per token, and the memory in use.

The figures do not include what a cold disk adds with a real model. The layers share the pages of
one layer, so after the first layers the experts are in the page cache.
"""

import argparse
import json
import os
import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from milliways.benchmarks.speed.bench_model import random_tensor
from milliways.cluster.host.local import load_local_model, make_local_runner
from milliways.model.activations import Activations
from milliways.model.checkpoint import CHECKPOINT_DIR
from milliways.model.checkpoint.layout import TensorSpec, tensor_specs
from milliways.model.checkpoint.writer import write_tensor
from milliways.model.config import GROK_1, ModelConfig
from milliways.model.ops.select import KernelChoice, Residence
from milliways.model.runner import CacheSize, ModelRunner, ScheduledTokens
from milliways.runtime.user_cache import user_cache_dir

SEED = 7
PROMPT = (5043, 271, 8190, 17)


def main() -> None:
    options = parse_options()
    config = GROK_1 if not options.layers else shortened(GROK_1, options.layers)
    model_dir = options.dir / f"grok-1-full-size-{config.num_layers}"
    report: dict[str, Any] = {"num_layers": config.num_layers, "activations": options.activations}
    report["written_s"] = timed(lambda: write_linked_model(model_dir, config))[1]
    kernels = KernelChoice(activations=Activations(options.activations), residence=Residence.MAPPED)
    model, report["loaded_s"] = timed(lambda: load_local_model(model_dir, "float32", kernels))
    runner = make_local_runner(model, CacheSize(num_blocks=8, block_size=16, max_slots=1))
    report |= decode(runner, options.tokens)
    report |= memory_in_use()
    print_report(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Decode with a full-size Grok-1 on one machine.")
    add = parser.add_argument
    default_dir = user_cache_dir() / "models"
    add(
        "--dir",
        type=Path,
        default=default_dir,
        metavar="FOLDER",
        help="folder for the model; 9 GB must be free [%(default)s]",
    )
    add(
        "--tokens",
        type=int,
        default=4,
        choices=range(1, 65),
        metavar="N",
        help="number of tokens to decode, 1 to 64 [%(default)s]",
    )
    add("--layers", type=int, metavar="N", help="number of layers, for a quick try [64]")
    add(
        "--activations",
        choices=("exact", "int8"),
        default="exact",
        help="what is multiplied with int8 weights [%(default)s]",
    )
    add("--json", type=Path, metavar="FILE", help="also write the figures to a file")
    return parser.parse_args()


def shortened(config: ModelConfig, num_layers: int) -> ModelConfig:
    return replace(config, num_layers=num_layers)


def write_linked_model(model_dir: Path, config: ModelConfig) -> None:
    """Writes files for the first layer and the ends, and links for the other layers.

    A complete model from an earlier run is kept.
    """
    done = model_dir / "complete"
    if done.exists():
        return
    ckpt_dir = model_dir / CHECKPOINT_DIR
    ckpt_dir.mkdir(parents=True, exist_ok=True)
    (model_dir / "config.json").write_text(json.dumps(asdict(config)), encoding="utf-8")
    first_of_role: dict[str, Path] = {}
    for spec in tensor_specs(config):
        path = ckpt_dir / spec.file_name
        path.unlink(missing_ok=True)
        role = spec.role.name
        if role in first_of_role:
            os.link(first_of_role[role], path)
        else:
            write_one(path, spec, config)
            first_of_role[role] = path
    done.touch()


def write_one(path: Path, spec: TensorSpec, config: ModelConfig) -> None:
    print(f"writing {spec.name}", flush=True)
    write_tensor(path, spec, random_tensor(spec, config, SEED))


def decode(runner: ModelRunner, num_tokens: int) -> dict[str, Any]:
    """Prefills a short prompt, then decodes greedily, one token at a time."""
    tokens = list(PROMPT)
    logits, prefill_s = timed(lambda: step(runner, tokens, 0))
    seconds = []
    for _ in range(num_tokens):
        tokens.append(int(logits[-1].argmax()))
        logits, token_s = timed(lambda: step(runner, tokens[-1:], len(tokens) - 1))
        seconds.append(token_s)
        print(f"token {tokens[-1]} computed in {token_s:.2f} s", flush=True)
    return {"prefill_tokens": len(PROMPT), "prefill_s": prefill_s, "seconds_per_token": seconds}


def step(runner: ModelRunner, token_ids: list[int], start: int) -> Any:
    scheduled = ScheduledTokens(
        token_ids=token_ids, start_position=start, block_table=range(8), num_logits=1
    )
    return runner.compute_logits([scheduled])


def timed(call: Any) -> tuple[Any, float]:
    start_s = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start_s


def memory_in_use() -> dict[str, float]:
    """The GB of this process's own memory and of mapped files, now.

    The usual peak would count a page once for each map of it, and 64 layers map the same pages.
    """
    own_kb = read_kb(Path("/proc/self/status"), "RssAnon")
    mapped_kb = read_kb(Path("/proc/self/smaps_rollup"), "Pss_File")
    return {"own_memory_gb": own_kb * 1024 / 1e9, "mapped_memory_gb": mapped_kb * 1024 / 1e9}


def read_kb(path: Path, name: str) -> int:
    lines = path.read_text(encoding="utf-8").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


def print_report(report: dict[str, Any]) -> None:
    seconds = report["seconds_per_token"]
    print(f"layers                {report['num_layers']}")
    print(f"activations           {report['activations']}")
    print(f"written in            {report['written_s']:.1f} s")
    print(f"loaded in             {report['loaded_s']:.1f} s")
    print(f"prefill of {report['prefill_tokens']} tokens   {report['prefill_s']:.2f} s")
    print(f"seconds per token     {statistics.median(seconds):.2f} (median of {len(seconds)})")
    print(f"own memory            {report['own_memory_gb']:.1f} GB")
    print(f"mapped files          {report['mapped_memory_gb']:.1f} GB, each page counted once")


if __name__ == "__main__":
    main()
