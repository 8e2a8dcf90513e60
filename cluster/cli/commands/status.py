"""`milliways status`: which workers are in the cluster, what each holds and does."""

# Ray's own types are unknown in part.
# pyright: basic

import argparse
import json
import sys
from contextlib import redirect_stdout
from typing import Any

from milliways.cluster.ray.environment import be_quiet, enter, head_for
from milliways.cluster.ray.running_clusters import find_running
from milliways.wire.errors import ClusterError, StartupError
from milliways.wire.status import ClusterStatus, DeviceStatus, LayerRun, WorkerStatus, to_json

ANSWER_TIMEOUT_S = 30.0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument("--address", metavar="RAY", help="Ray cluster [the one you started last]")
    parser.add_argument("--json", action="store_true", help="print JSON, with every expert")


def run(options: argparse.Namespace) -> None:
    """Asks the controller, and prints."""
    status: ClusterStatus = ask_controller(options.address, "status")
    print(json.dumps(to_json(status), indent=2) if options.json else format_status(status))


def ask_controller(
    address: str | None, method: str, *arguments: Any, timeout_s: float = ANSWER_TIMEOUT_S
) -> Any:
    """The status that the running cluster's controller returns.

    Raises:
        StartupError: no cluster runs, it has no controller, or the controller does not answer.
    """
    # Ray prints messages about its nodes to the standard output, where our JSON goes.
    with redirect_stdout(sys.stderr):
        return _ask(_enter(address), method, arguments, timeout_s)


def _enter(address: str | None) -> str:
    """Prepares to join the cluster at an address, or the one started last; returns its address."""
    be_quiet()
    if address is not None:
        head_for(address)
        return address
    running = find_running()
    if running is None:
        raise StartupError("no cluster of yours runs here; `milliways serve` starts one")
    enter(running)
    return running.address


def _ask(address: str, method: str, arguments: tuple[Any, ...], timeout_s: float) -> Any:
    # Not before: Ray reads its settings when it is imported.
    import ray
    from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

    from milliways.cluster.ray.cluster import join
    from milliways.cluster.ray.start_controller import find_controller

    join(address)
    try:
        reference = getattr(find_controller(), method).remote(*arguments)
        return ray.get(reference, timeout=timeout_s)
    except RayTaskError as error:
        # Our own error is the cause; Ray's would print the controller's traceback as well.
        raise (error.cause if isinstance(error.cause, ClusterError) else error) from None
    except GetTimeoutError as error:
        raise StartupError(f"the controller does not answer within {timeout_s:g} s") from error
    except (ValueError, RayActorError) as error:
        raise StartupError("the Ray cluster runs, but no Milliways controller in it") from error
    finally:
        ray.shutdown()


def format_status(status: ClusterStatus) -> str:
    """A table for a terminal: a line for each worker, and for each device if it has several."""
    health = "complete" if status.is_complete else "INCOMPLETE"
    lines = [
        f"model {status.model}, placement epoch {status.placement_epoch}, {health},"
        f" up {status.uptime_s:.0f} s, {status.deaths} deaths",
        "",
        f"{'worker':<11} {'incarnation':>11} {'pid':>8} {'node':<9} {'state':<9} {'role':<25}"
        f" {'layers':>7} {'experts':>7} {'kv':>11} {'tok/s':>7}  transports",
    ]
    for worker in status.workers:
        lines.append(_line(worker))
        devices = worker.process.devices if worker.process else ()
        lines += [_device_line(device) for device in devices if len(devices) > 1]
    return "\n".join(lines)


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
