"""`milliways plan`: what each worker would hold, and the memory it needs. It starts nothing."""

import argparse
import json
import re
from collections import Counter
from typing import Any

from milliways.cluster.cli.commands.options import DTYPE_NAMES
from milliways.cluster.control.planner import (
    DEFAULT_KV_TOKENS,
    AttentionCut,
    Placement,
    PlacementPolicy,
    WorkerMemory,
    WorkerPlan,
    plan,
)
from milliways.cluster.host.model_bytes import checkpoint_bytes, released_bytes
from milliways.model.checkpoint import Checkpoint
from milliways.model.config import GROK_1
from milliways.model.errors import InvalidRequestError
from milliways.model.model_dir import DEMO_NAME, resolve_model_dir
from milliways.wire.placement import BYTES_PER_GB, ModelBytes

GROK_1_NAME = "grok-1"
MAX_WORKERS = 4096
_UNITS = {"": 1, "MB": 1e6, "GB": 1e9, "TB": 1e12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_GROUP = re.compile(r"(?:(\d+)x)?(\d+(?:\.\d+)?)([a-z]*)(?:@([\w.-]+))?", re.IGNORECASE)
_KV_VALUE_BYTES = {"bfloat16": 2, "float32": 4}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    option = parser.add_argument
    option(
        "--model",
        metavar=f"{GROK_1_NAME}|{DEMO_NAME}|DIR",
        default=GROK_1_NAME,
        help=f"model to place; {GROK_1_NAME} needs no files [%(default)s]",
    )
    option(
        "--workers",
        metavar="NxSIZE[@NODE],…",
        required=True,
        help="number of workers and memory of each, such as 8x80GB; workers that share a node have"
        " its name, as in 4x80GB@a,4x80GB@b, the others have a node each",
    )
    option(
        "--expert-replicas",
        type=int,
        default=1,
        metavar="R",
        help="number of workers that hold each expert [%(default)s]",
    )
    option(
        "--attention",
        choices=[cut.value for cut in AttentionCut],
        default=AttentionCut.AUTO.value,
        help="placement of the attention layers: replicated on every worker, or consecutive layers"
        " on each; auto replicates them if memory allows it [%(default)s]",
    )
    option(
        "--kv-tokens",
        type=int,
        default=DEFAULT_KV_TOKENS,
        metavar="N",
        help="number of KV cache positions to reserve on each attention shard [%(default)s]",
    )
    option(
        "--dtype",
        choices=DTYPE_NAMES,
        default="bfloat16",
        help="dtype of the KV cache [%(default)s]",
    )
    option("--json", action="store_true", help="print JSON, with the workers of every expert")


def run(options: argparse.Namespace) -> None:
    """Plans a placement, and prints it with the memory of each worker."""
    model = sizes_of(options.model, _KV_VALUE_BYTES[options.dtype])
    policy = PlacementPolicy(
        expert_replicas=options.expert_replicas,
        attention=AttentionCut(options.attention),
        kv_tokens=options.kv_tokens,
    )
    placement = plan(model, parse_workers(options.workers), policy)
    if options.json:
        print(json.dumps(to_json(placement), indent=2))
    else:
        print(format_placement(model, placement))


def sizes_of(name: str, kv_value_bytes: int) -> ModelBytes:
    """The sizes of Grok-1, or of a model directory."""
    if name == GROK_1_NAME:
        return released_bytes(GROK_1, kv_value_bytes)
    with Checkpoint.open(resolve_model_dir(name)) as checkpoint:
        return checkpoint_bytes(checkpoint, kv_value_bytes)


def parse_workers(text: str) -> list[WorkerMemory]:
    """Parses workers such as "8x80GB" or "4x80GB@a,2x40GB@b".

    Raises:
        InvalidRequestError: a group has another form, or there are too many workers.
    """
    workers: list[WorkerMemory] = []
    for group in text.split(","):
        match = _GROUP.fullmatch(group.strip())
        unit = _UNITS.get(match[3].upper()) if match else None
        if match is None or unit is None:
            raise InvalidRequestError("workers", group, "NxSIZE or NxSIZE@NODE, as in 8x80GB")
        count, memory_bytes = int(match[1] or 1), int(float(match[2]) * unit)
        if not 1 <= len(workers) + count <= MAX_WORKERS:
            raise InvalidRequestError("workers", group, f"between 1 and {MAX_WORKERS} workers")
        for _ in range(count):
            worker_id = f"worker-{len(workers)}"
            node_id = match[4] or f"node-{len(workers)}"
            workers.append(
                WorkerMemory(worker_id=worker_id, node_id=node_id, memory_bytes=memory_bytes)
            )
    return workers


def to_json(placement: Placement) -> dict[str, Any]:
    """The whole placement as dicts and numbers."""
    return {
        "placement_epoch": placement.placement_epoch,
        "workers": [_worker_json(worker) for worker in placement.workers],
    }


def _worker_json(worker: WorkerPlan) -> dict[str, Any]:
    return {
        "worker_id": worker.worker.worker_id,
        "node_id": worker.worker.node_id,
        "memory_bytes": worker.worker.memory_bytes,
        "attention": {
            "first_layer": worker.attention.first_layer,
            "num_layers": worker.attention.num_layers,
            "has_ends": worker.attention.has_ends,
        },
        "experts": [[expert_id.layer, expert_id.expert] for expert_id in worker.experts],
        "attention_bytes": worker.attention_bytes,
        "kv_bytes": worker.kv_bytes,
        "end_bytes": worker.end_bytes,
        "expert_bytes": worker.expert_bytes,
        "used_bytes": worker.used_bytes,
        "free_bytes": worker.free_bytes,
    }


def format_placement(model: ModelBytes, placement: Placement) -> str:
    """A table for a terminal, with a line for each worker; sizes are in GB."""
    columns = ("attention", "kv", "ends", "experts", "used", "of", "free")
    header = f"{'worker':<12} {'node':<10} {'layers':>8} {'experts held':>13}  "
    lines = [header + " ".join(f"{column:>9}" for column in columns)]
    lines += [_worker_line(worker) for worker in placement.workers]
    return "\n".join([*lines, "", *_summary(model, placement)])


def _worker_line(worker: WorkerPlan) -> str:
    attention = worker.attention
    last = attention.first_layer + attention.num_layers - 1
    layers = f"{attention.first_layer}-{last}" if attention.num_layers else "-"
    sizes = (
        worker.attention_bytes,
        worker.kv_bytes,
        worker.end_bytes,
        worker.expert_bytes,
        worker.used_bytes,
        worker.worker.memory_bytes,
        worker.free_bytes,
    )
    names = f"{worker.worker.worker_id:<12} {worker.worker.node_id:<10}"
    return f"{names} {layers:>8} {len(worker.experts):>13}  " + " ".join(
        f"{size / BYTES_PER_GB:>9.2f}" for size in sizes
    )


def _summary(model: ModelBytes, placement: Placement) -> list[str]:
    """The totals below the table."""
    held = Counter(expert_id for worker in placement.workers for expert_id in worker.experts)
    fewest = min(held.values())
    nodes = {
        expert_id: {w.worker.node_id for w in placement.workers if expert_id in w.experts}
        for expert_id in held
    }
    spread = min(len(node_ids) for node_ids in nodes.values())
    return [
        f"model             {model.total_bytes / BYTES_PER_GB:.1f} GB: {model.num_layers} layers of"
        f" {model.num_experts} experts, {model.expert_bytes / BYTES_PER_GB:.3f} GB each",
        f"expert replicas   {fewest}, each expert on at least {spread} node{'s' * (spread > 1)}",
        f"placement epoch   {placement.placement_epoch}",
    ]
