"""What `milliways inspect` prints about a checkpoint: counts, bytes, and memory per worker.

A parameter is an element of a weight; the scales of quantized weights are not counted. The
embedding is counted once, although the logits are computed with it too. The active parameters of a
token are all parameters minus those of the experts that are not chosen for it. 1 GB is 1e9 bytes.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from milliways.model.checkpoint.layout import TensorRole, TensorSpec
from milliways.model.checkpoint.reader import Checkpoint
from milliways.model.checkpoint.records import TensorRecord
from milliways.model.config import ModelConfig

_BYTES_PER_GB = 1e9
_BYTES_PER_KV_VALUE = 2  # The figures assume a bfloat16 KV cache.


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleSummary:
    """Totals of one `TensorRole`'s tensors. File bytes include the pickle around the arrays."""

    role: str
    num_tensors: int
    num_parameters: int
    num_array_bytes: int
    num_file_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardMemory:
    """Bytes of one worker's weights, if every worker has all attention layers and some experts.

    Attention bytes include a layer's norms and gate. Embedding bytes include the final norm.
    """

    worker_index: int
    num_experts_per_layer: int
    expert_bytes: int
    attention_bytes: int
    embedding_bytes: int

    @property
    def bytes_without_embedding(self) -> int:
        return self.expert_bytes + self.attention_bytes

    @property
    def total_bytes(self) -> int:
        return self.bytes_without_embedding + self.embedding_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSummary:
    """All figures of a checkpoint."""

    num_tensors: int
    num_layers: int
    num_experts: int
    num_experts_per_token: int
    num_parameters: int
    num_active_parameters: int
    num_array_bytes: int
    num_file_bytes: int
    kv_bytes_per_token: int
    roles: tuple[RoleSummary, ...]
    workers: tuple[ShardMemory, ...]


def summarize(checkpoint: Checkpoint, num_workers: int) -> CheckpointSummary:
    """Adds up the records of the scan; reads no file."""
    config = checkpoint.config
    roles = tuple(_summarize_role(role, checkpoint) for role in TensorRole)
    num_parameters = sum(role.num_parameters for role in roles)
    return CheckpointSummary(
        num_tensors=len(checkpoint.specs),
        num_layers=config.num_layers,
        num_experts=config.num_experts,
        num_experts_per_token=config.num_selected_experts,
        num_parameters=num_parameters,
        num_active_parameters=num_parameters - _num_idle_parameters(config, checkpoint.specs),
        num_array_bytes=sum(role.num_array_bytes for role in roles),
        num_file_bytes=sum(role.num_file_bytes for role in roles),
        kv_bytes_per_token=kv_bytes_per_token(config),
        roles=roles,
        workers=_worker_memory(checkpoint, num_workers),
    )


def kv_bytes_per_token(config: ModelConfig) -> int:
    """The bytes of a token's keys and values in all layers, if the KV cache is bfloat16."""
    return 2 * config.num_layers * config.kv_size * _BYTES_PER_KV_VALUE


def experts_per_worker(num_experts: int, num_workers: int) -> tuple[int, ...]:
    """The number of experts of a layer on each worker, as even as possible; the first have more."""
    assert num_workers >= 1
    fewest, num_with_one_more = divmod(num_experts, num_workers)
    return tuple(fewest + (worker < num_with_one_more) for worker in range(num_workers))


def to_json(summary: CheckpointSummary) -> dict[str, Any]:
    """The summary as dicts and numbers. Each worker also gets its totals."""
    values = asdict(summary)
    for worker, memory in zip(values["workers"], summary.workers, strict=True):
        worker["bytes_without_embedding"] = memory.bytes_without_embedding
        worker["total_bytes"] = memory.total_bytes
    return values


def format_summary(summary: CheckpointSummary) -> str:
    """Tables for a terminal."""
    return "\n".join(
        [*_format_totals(summary), "", *_format_roles(summary), "", *_format_workers(summary)]
    )


def _summarize_role(role: TensorRole, checkpoint: Checkpoint) -> RoleSummary:
    chosen = [
        (spec, record)
        for spec, record in zip(checkpoint.specs, checkpoint.records, strict=True)
        if spec.role is role
    ]
    return RoleSummary(
        role=role.name.lower(),
        num_tensors=len(chosen),
        num_parameters=sum(math.prod(spec.shape) for spec, _ in chosen),
        num_array_bytes=sum(_array_bytes(record) for _, record in chosen),
        num_file_bytes=sum(record.num_file_bytes for _, record in chosen),
    )


def _array_bytes(record: TensorRecord) -> int:
    return sum(array.num_bytes for array in record.arrays)


def _num_idle_parameters(config: ModelConfig, specs: Sequence[TensorSpec]) -> int:
    num_in_experts = sum(math.prod(spec.shape) for spec in specs if spec.role.is_expert)
    num_idle_experts = config.num_experts - config.num_selected_experts
    return num_in_experts // config.num_experts * num_idle_experts


def _worker_memory(checkpoint: Checkpoint, num_workers: int) -> tuple[ShardMemory, ...]:
    expert_bytes = attention_bytes = embedding_bytes = 0
    for spec, record in zip(checkpoint.specs, checkpoint.records, strict=True):
        if spec.role.is_expert:
            expert_bytes += _array_bytes(record)
        elif spec.role.in_layer:
            attention_bytes += _array_bytes(record)
        else:
            embedding_bytes += _array_bytes(record)
    num_experts = checkpoint.config.num_experts
    return tuple(
        ShardMemory(
            worker_index=worker_index,
            num_experts_per_layer=num_held,
            expert_bytes=expert_bytes // num_experts * num_held,
            attention_bytes=attention_bytes,
            embedding_bytes=embedding_bytes,
        )
        for worker_index, num_held in enumerate(experts_per_worker(num_experts, num_workers))
    )


def _format_totals(summary: CheckpointSummary) -> list[str]:
    experts = f"{summary.num_experts} experts, {summary.num_experts_per_token} per token"
    return [
        f"{summary.num_tensors} tensors, {summary.num_layers} layers, {experts}",
        f"parameters        {_parameters(summary.num_parameters)}",
        f"active per token  {_parameters(summary.num_active_parameters)}",
        f"bytes on disk     {_bytes(summary.num_file_bytes)}",
        f"bytes of arrays   {_bytes(summary.num_array_bytes)}",
        f"KV per token      {summary.kv_bytes_per_token:,} bytes (bfloat16)",
    ]


def _format_roles(summary: CheckpointSummary) -> list[str]:
    header = f"{'role':<20} {'tensors':>7} {'parameters':>17} {'bytes':>17} {'GB':>8}"
    return [header] + [
        f"{role.role:<20} {role.num_tensors:>7} {role.num_parameters:>17,}"
        f" {role.num_array_bytes:>17,} {role.num_array_bytes / _BYTES_PER_GB:>8.2f}"
        for role in summary.roles
    ]


def _format_workers(summary: CheckpointSummary) -> list[str]:
    lines = [
        f"weights of each of {len(summary.workers)} workers, if every worker has all attention"
        " layers and a share of the experts"
    ]
    for num_held in sorted({w.num_experts_per_layer for w in summary.workers}, reverse=True):
        alike = [w for w in summary.workers if w.num_experts_per_layer == num_held]
        lines += _format_alike(alike, summary.num_experts)
    return lines


def _format_alike(workers: Sequence[ShardMemory], num_experts: int) -> list[str]:
    """One entry for a group of workers that hold equally many experts, so need equal memory."""
    one = workers[0]
    which = f"worker {one.worker_index}"
    if len(workers) > 1:
        which = f"workers {one.worker_index} to {workers[-1].worker_index}, each"
    return [
        f"{which}: {one.num_experts_per_layer} of {num_experts} experts of every layer",
        f"  experts            {_bytes(one.expert_bytes)}",
        f"  attention          {_bytes(one.attention_bytes)}",
        f"  embedding          {_bytes(one.embedding_bytes)}",
        f"  all                {_bytes(one.total_bytes)}",
        f"  without embedding  {_bytes(one.bytes_without_embedding)}",
    ]


def _parameters(count: int) -> str:
    return f"{count:,} ({count / 1e9:.2f} billion)"


def _bytes(count: int) -> str:
    return f"{count:,} ({count / _BYTES_PER_GB:.2f} GB)"
