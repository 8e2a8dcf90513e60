"""What is said of a worker: as the controller knows it, and as the worker answers."""

# Ray's own types are unknown in part.
# pyright: basic

import asyncio
from typing import Any

from milliways.cluster.control.worker_record import WorkerRecord
from milliways.cluster.ray.generation import RunningGeneration
from milliways.wire.status import ProcessStatus, WorkerStatus
from milliways.wire.view import WorkerState

STATUS_TIMEOUT_S = 5.0


async def progress_of(generation: RunningGeneration, record: WorkerRecord) -> dict[str, Any]:
    """What a worker waits for, and how many bytes it has read, as the start of a cluster shows."""
    bytes_read = bytes_wanted = 0
    if record.spawned is not None and record.state is not WorkerState.LOST:
        try:
            async with asyncio.timeout(2.0):
                bytes_read, bytes_wanted = await generation.fleet.progress(record.worker_id)
        except Exception:
            # It may die while it is asked; the next progress says so.
            pass
    return {
        "worker_id": record.worker_id,
        "state": record.state.value,
        "has_process": record.spawned is not None,
        "waits_for": generation.controller.waits_for(record),
        "bytes_read": bytes_read,
        "bytes_wanted": bytes_wanted,
        "last_error": record.last_error,
    }


async def ask_status(generation: RunningGeneration, record: WorkerRecord) -> WorkerStatus:
    """A worker as the controller knows it, with what the worker says if it answers."""
    process: ProcessStatus | None = None
    last_error = record.last_error
    if record.state in (WorkerState.READY, WorkerState.DRAINING):
        try:
            async with asyncio.timeout(STATUS_TIMEOUT_S):
                process = await generation.fleet.status(record.worker_id)
        except Exception as error:
            # It may die while it is asked, or be busy. Neither is for a question to judge.
            last_error = f"it does not answer: {error}"
    return status_of(record, generation.controller.waits_for(record), last_error, process)


def status_of(
    record: WorkerRecord, waits_for: str, last_error: str, process: ProcessStatus | None
) -> WorkerStatus:
    """A worker as the controller knows it, with what it says itself."""
    member = record.member()
    return WorkerStatus(
        worker_id=record.worker_id,
        incarnation=record.incarnation,
        pid=member.pid,
        state=record.state.value,
        process=process,
        role=_role(record),
        node=member.node_id,
        address=member.address,
        router_address=member.router_address,
        waits_for=waits_for,
        last_error=last_error,
        quick_deaths=record.num_quick_deaths,
        experts=tuple(sorted((e.layer, e.expert) for e in record.held)),
    )


def _role(record: WorkerRecord) -> str:
    if record.shards is None:
        return "none yet"
    parts = ["attention"] if record.shards.num_layers else []
    parts += ["router"] if record.shards.has_ends else []
    parts += ["experts"] if record.held else []
    return "+".join(parts) or "spare"
