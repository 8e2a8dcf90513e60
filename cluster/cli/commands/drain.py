"""`milliways drain`: moves a worker's work away, then stops or restarts the worker."""

import argparse

from milliways.cluster.cli.commands.running_controller import joined
from milliways.cluster.ray.asking import ControllerGoneError
from milliways.cluster.settings.config import WorkerSettings


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument("worker", metavar="WORKER", help="its name in `milliways status`")
    parser.add_argument(
        "--restart",
        action="store_true",
        help="start the worker again; do this to one after another for a rolling restart",
    )
    parser.add_argument("--address", metavar="RAY", help="Ray cluster [the one you started last]")


def run(options: argparse.Namespace) -> None:
    """Makes the controller drain a worker; returns when it is stopped, or ready again."""
    timeout_s = WorkerSettings().load_timeout_s
    with joined(options.address) as controller:
        # Should the controller die meanwhile, the next one must know whether it is done.
        incarnation = controller.ask("incarnation_of", options.worker)
        order = (options.worker, options.restart)
        try:
            controller.ask("drain", *order, timeout_s=timeout_s)
        except ControllerGoneError:
            controller.ask_next("finish_drain", *order, incarnation, timeout_s=timeout_s)
    print(f"{options.worker} was {'restarted' if options.restart else 'stopped'}")
