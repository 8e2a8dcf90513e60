"""`milliways status`: who is in the cluster, what each holds and does."""

# Ray's own types are unknown in part.
# pyright: basic

import argparse
import json
import sys
from contextlib import redirect_stdout
from typing import Any

from milliways.cluster.ray.environment import be_quiet, enter, find_running, head_for
from milliways.wire.errors import ClusterError, StartupError

ANSWER_TIMEOUT_S = 30.0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument("--address", metavar="RAY", help="Ray cluster [the one you started last]")
    parser.add_argument("--json", action="store_true", help="print JSON, with every expert")


def run(options: argparse.Namespace) -> None:
    """Asks the controller, and prints."""
    status = ask_controller(options.address, "status")
    print(json.dumps(status, indent=2) if options.json else format_status(status))


def ask_controller(
    address: str | None, method: str, *arguments: Any, timeout_s: float = ANSWER_TIMEOUT_S
) -> Any:
    """What the running cluster's controller answers.

    Raises:
        StartupError: no cluster runs, it has no controller, or that does not answer.
    """
    # Ray prints news of its nodes, a death say, where our answer goes: into somebody's JSON.
    with redirect_stdout(sys.stderr):
        return _ask(_enter(address), method, arguments, timeout_s)


def _enter(address: str | None) -> str:
    """Makes the settings those of the cluster that is meant; its address."""
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
    from milliways.cluster.ray.controller_actor import find_controller

    join(address)
    try:
        reference = getattr(find_controller(), method).remote(*arguments)
        return ray.get(reference, timeout=timeout_s)
    except RayTaskError as error:
        # What it refused is of ours; Ray's own would print where in the controller it was.
        raise (error.cause if isinstance(error.cause, ClusterError) else error) from None
    except GetTimeoutError as error:
        raise StartupError(f"the controller does not answer within {timeout_s:g} s") from error
    except (ValueError, RayActorError) as error:
        raise StartupError("the Ray cluster runs, but no Milliways controller in it") from error
    finally:
        ray.shutdown()


def format_status(status: dict[str, Any]) -> str:
    """A table for a terminal, one line a worker, and one for each device where it has several."""
    health = "complete" if status["is_complete"] else "INCOMPLETE"
    lines = [
        f"model {status['model']}, placement epoch {status['placement_epoch']}, {health},"
        f" up {status['uptime_s']:.0f} s, {status['deaths']} deaths",
        "",
        f"{'worker':<11} {'life':>4} {'pid':>8} {'node':<9} {'state':<9} {'role':<25}"
        f" {'layers':>7} {'experts':>7} {'kv':>11} {'tok/s':>7}  transports",
    ]
    for worker in status["workers"]:
        lines.append(_line(worker))
        devices = worker.get("devices", [])
        lines += [_device_line(device) for device in devices if len(devices) > 1]
    return "\n".join(lines)


def _line(worker: dict[str, Any]) -> str:
    layers = _layers(worker)
    router = worker.get("router", {})
    kv = f"{router['kv_blocks_used']}/{router['kv_blocks_total']}" if router else "-"
    rate = f"{router['tokens_per_s']:.1f}" if router else "-"
    ways = router.get("transports", {})
    transports = ", ".join(f"{name} {way}" for name, way in ways.items())
    if router.get("standby"):
        # What of its KV blocks is at another worker.
        transports += f"  copies {router['standby_blocks_copied']} to {router['standby']}"
    note = f"  waits for {worker['waits_for']}" if worker["waits_for"] else ""
    return (
        f"{worker['worker_id']:<11} {worker['incarnation']:>4} {worker['pid']:>8}"
        f" {worker['node'][:8]:<9} {worker['state']:<9} {worker['role']:<25}"
        f" {layers:>7} {len(worker['experts']):>7} {kv:>11} {rate:>7}  {transports}{note}"
    )


def _device_line(device: dict[str, Any]) -> str:
    """What lies on a device of the worker above."""
    ends = ", embedding and output head" if device["has_ends"] else ""
    has = f" of {device['memory_bytes'] / 1e9:.1f}" if device["memory_bytes"] else ""
    return (
        f"  {device['device']:<9} layers {_layers(device)}, {device['num_experts']} experts{ends};"
        f" {device['bytes'] / 1e9:.1f}{has} GB"
    )


def _layers(holder: dict[str, Any]) -> str:
    first, count = holder.get("layers", [0, 0])
    return f"{first}-{first + count - 1}" if count else "-"
