"""`milliways status`: which workers are in the cluster, what each holds and does."""

# Ray's own types are unknown in part.
# pyright: basic

import argparse
import json

from milliways.cluster.cli.commands.running_controller import ask_controller
from milliways.wire.status import (
    ClusterStatus,
    DeviceStatus,
    GenerationStatus,
    LayerRun,
    SettingsStatus,
    WorkerStatus,
    to_json,
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument("--address", metavar="RAY", help="Ray cluster [the one you started last]")
    parser.add_argument("--json", action="store_true", help="print JSON, with every expert")


def run(options: argparse.Namespace) -> None:
    """Asks the controller, and prints."""
    status: ClusterStatus = ask_controller(options.address, "status")
    print(json.dumps(to_json(status), indent=2) if options.json else format_status(status))


def format_status(status: ClusterStatus) -> str:
    """A table for a terminal: a line for each worker, and for each device if it has several."""
    health = "complete" if status.is_complete else "INCOMPLETE"
    lines = [
        f"model {status.model}, placement epoch {status.placement_epoch}, {health},"
        f" up {status.uptime_s:.0f} s, {status.deaths} deaths",
        format_settings(status.settings),
        f"{'worker':<11} {'incarnation':>11} {'pid':>8} {'node':<9} {'state':<9} {'role':<25}"
        f" {'layers':>7} {'experts':>7} {'kv':>11} {'tok/s':>7}  transports",
    ]
    for worker in status.workers:
        lines.append(_line(worker))
        devices = worker.process.devices if worker.process else ()
        lines += [_device_line(device) for device in devices if len(devices) > 1]
    if len(status.generations) > 1:
        lines += [_generation_line(generation) for generation in status.generations]
    return "\n".join(lines)


def format_settings(settings: SettingsStatus) -> str:
    """Whether everything is as declared, or what is not, and why."""
    problem = f" ({settings.problem})" if settings.problem else ""
    if settings.unconfirmed:
        problem = f", not yet confirmed by {', '.join(settings.unconfirmed)}{problem}"
    if not settings.pending:
        return f"settings: as declared{problem}"
    return f"settings: pending: {'; '.join(settings.pending)}{problem}"


def _generation_line(generation: GenerationStatus) -> str:
    """One of two generations of workers; the table above has the workers of the one that serves."""
    return (
        f"generation {generation.generation}: model {generation.model},"
        f" {generation.num_ready} of {generation.num_workers} workers ready; {generation.text}"
    )


def _line(worker: WorkerStatus) -> str:
    layers = kv = rate = "-"
    links = ""
    if worker.process is not None:
        router = worker.process.router
        layers = _layers(worker.process.layers)
        kv = f"{router.kv_blocks_used}/{router.kv_blocks_total}"
        rate = f"{router.tokens_per_s:.1f}"
        links = ", ".join(f"{name} {carrier}" for name, carrier in router.transports.items())
        if router.standby:
            # Which worker has copies of its KV blocks.
            links += f"  copies {router.standby_blocks_copied} to {router.standby}"
    note = f"  waits for {worker.waits_for}" if worker.waits_for else ""
    return (
        f"{worker.worker_id:<11} {worker.incarnation:>11} {worker.pid:>8}"
        f" {worker.node[:8]:<9} {worker.state:<9} {worker.role:<25}"
        f" {layers:>7} {len(worker.experts):>7} {kv:>11} {rate:>7}  {links}{note}"
    )


def _device_line(device: DeviceStatus) -> str:
    """What a device of the worker above holds."""
    ends = ", embedding and output head" if device.has_ends else ""
    has = f" of {device.memory_bytes / 1e9:.1f}" if device.memory_bytes else ""
    return (
        f"  {device.device:<9} layers {_layers(device.layers)}, {device.num_experts} experts{ends};"
        f" {device.bytes / 1e9:.1f}{has} GB"
    )


def _layers(run: LayerRun) -> str:
    first, count = run
    return f"{first}-{first + count - 1}" if count else "-"
