"""One worker of the cluster that `run_cluster` measures: shards, router and servers, without Ray.

It reads and writes lines of JSON:

1. It loads its share and writes {"address": ..., "about": ...}.
2. It reads {"addresses": [...]} of all workers in order. It writes {"transports": {...}} when its
   router has a link to each of them.
3. It reads {"prompts": [[...]], "max_tokens": 34}, gives the prompts to its router, and writes
   {"times": [[...]]}: the arrival time of each token of each prompt.
"""

import argparse
import json
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from milliways.benchmarks.speed.programs.line_protocol import take_stdout
from milliways.cluster.control.planner import (
    AttentionCut,
    Placement,
    PlacementPolicy,
    WorkerMemory,
    plan,
)
from milliways.cluster.host.model_bytes import checkpoint_bytes
from milliways.cluster.host.worker_process import WorkerProcess
from milliways.cluster.settings.config import ClusterConfig, config_from_tree
from milliways.model.checkpoint import Checkpoint
from milliways.model.sampling import SamplingParams
from milliways.router.requests.admission import RoutedRequest
from milliways.router.requests.request import GenerationRequest
from milliways.router.requests.sequence import PromptScores, TokenEvent
from milliways.wire.errors import ClusterError
from milliways.wire.placement import AttentionRange
from milliways.wire.view import ClusterView, Member, WorkerState, chains_of

_HOST = "127.0.0.1"
_INCARNATION = 1
_EPOCH = 1
_PLENTY_BYTES = 1 << 40
_TIMEOUT_S = 300.0
_POLL_S = 0.02
_GREEDY = SamplingParams(temperature=0.0)


class Arrivals:
    """Records when the tokens of one request arrive. The router's thread calls it.

    Invariant: after `has_ended` is set, `times` and `error` do not change.
    """

    def __init__(self) -> None:
        self.times: list[float] = []
        self.error: ClusterError | None = None
        self.has_ended = threading.Event()

    def scored(self, scores: PromptScores) -> None:
        """Never called: no request asks for scores."""

    def tokens(self, events: Sequence[TokenEvent]) -> None:
        now_s = time.perf_counter()
        self.times += [now_s] * len(events)

    def ended(self, error: ClusterError | None) -> None:
        self.error = error
        self.has_ended.set()

    def moved(self) -> None:
        self.has_ended.set()


def worker_name(index: int) -> str:
    return f"worker-{index}"


def placed(model_dir: Path, num_workers: int) -> Placement:
    """A placement with all attention layers on every worker, and each expert on one worker."""
    with Checkpoint.open(model_dir) as checkpoint:
        sizes = checkpoint_bytes(checkpoint, kv_value_bytes=4)
    workers = [
        WorkerMemory(worker_id=worker_name(i), node_id="", memory_bytes=_PLENTY_BYTES)
        for i in range(num_workers)
    ]
    policy = PlacementPolicy(expert_replicas=1, attention=AttentionCut.REPLICATED)
    return plan(sizes, workers, policy)


def view_of(placement: Placement, addresses: Sequence[str]) -> ClusterView:
    """A view in which all workers are ready at their addresses."""
    members = {
        worker.worker.worker_id: Member(
            worker_id=worker.worker.worker_id,
            incarnation=_INCARNATION,
            address=address,
            state=WorkerState.READY,
            first_layer=worker.attention.first_layer,
            num_layers=worker.attention.num_layers,
            has_ends=worker.attention.has_ends,
            experts=frozenset(worker.experts),
        )
        for worker, address in zip(placement.workers, addresses, strict=True)
    }
    shards = {
        name: AttentionRange(
            first_layer=member.first_layer, num_layers=member.num_layers, has_ends=member.has_ends
        )
        for name, member in members.items()
    }
    num_layers = max(shard.first_layer + shard.num_layers for shard in shards.values())
    chains = chains_of(shards, num_layers)
    return ClusterView(placement_epoch=_EPOCH, members=members, chains=chains)


def settings_of(options: argparse.Namespace) -> ClusterConfig:
    """The configuration of the cluster."""
    return config_from_tree(
        {
            "model": {
                "path": str(options.model_dir),
                "dtype": options.dtype,
                "activations": options.activations,
            },
            "workers": {
                "count": options.workers,
                "expert_replicas": 1,
                "transport": options.transport,
                "threads_each": options.threads,
                "kv_tokens": options.kv_tokens,
                "warm_up": options.warm_up,
            },
        }
    )


def run_prompts(
    process: WorkerProcess, prompts: Sequence[Sequence[int]], max_tokens: int
) -> list[list[float]]:
    """Runs all prompts at the same time; returns the arrival time of each token of each."""
    all_arrivals = [Arrivals() for _ in prompts]
    for number, (prompt_ids, arrivals) in enumerate(zip(prompts, all_arrivals, strict=True)):
        request = GenerationRequest(
            prompt_ids=tuple(prompt_ids), max_tokens=max_tokens, sampling=_GREEDY, ignore_eos=True
        )
        process.submit(
            RoutedRequest(request_id=str(number), request=request, timeout_s=_TIMEOUT_S), arrivals
        )
    for arrivals in all_arrivals:
        if not arrivals.has_ended.wait(_TIMEOUT_S) or arrivals.error is not None:
            raise RuntimeError(f"a request failed: {arrivals.error}")
    return [arrivals.times for arrivals in all_arrivals]


def wait_for_links(process: WorkerProcess, num_workers: int) -> dict[str, str]:
    """Waits until the router has a link to each worker; returns the transport of each link."""
    deadline_s = time.monotonic() + _TIMEOUT_S
    while time.monotonic() < deadline_s:
        transports = dict(process.status().router.transports)
        if len(transports) == num_workers and not any(
            name.startswith("none") for name in transports.values()
        ):
            return transports
        time.sleep(_POLL_S)
    raise TimeoutError(f"the workers are not connected after {_TIMEOUT_S:g} s")


def run(options: argparse.Namespace) -> None:
    """Answers requests until the input ends."""
    replies = take_stdout()

    def reply(values: dict[str, Any]) -> None:
        replies.write(json.dumps(values) + "\n")
        replies.flush()

    index: int = options.index
    placement = placed(options.model_dir, options.workers)
    process = WorkerProcess(settings_of(options), worker_name(index), _INCARNATION, _HOST, _die)
    spawned = process.start()
    process.load(placement.workers[index].shards)
    about = f"{options.dtype}, activations {options.activations}, jax {jax.__version__}"
    reply({"address": spawned.address, "about": about})
    for line in sys.stdin:
        request = json.loads(line)
        if "addresses" in request:
            process.publish(view_of(placement, request["addresses"]))
            process.fence(_EPOCH)
            reply({"transports": wait_for_links(process, options.workers)})
        else:
            reply({"times": run_prompts(process, request["prompts"], request["max_tokens"])})


def _die(error: BaseException) -> None:
    raise SystemExit(f"the worker process failed: {error}")


def parse_options() -> argparse.Namespace:
    """The options that `run_cluster` starts this program with."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--index", type=int, required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--activations", required=True)
    parser.add_argument("--transport", required=True)
    parser.add_argument("--kv-tokens", type=int, required=True)
    parser.add_argument("--warm-up", action="store_true", help="compile all step sizes at start")
    return parser.parse_args()


if __name__ == "__main__":
    run(parse_options())
