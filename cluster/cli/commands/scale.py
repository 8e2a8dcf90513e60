"""`milliways scale`: grows or shrinks a running cluster without a failed request."""

import argparse

from milliways.cluster.cli.commands.running_controller import joined
from milliways.cluster.ray.asking import ControllerGoneError
from milliways.cluster.settings.config import WorkerSettings


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument("--workers", type=int, required=True, metavar="N", help="number of workers")
    parser.add_argument("--address", metavar="RAY", help="Ray cluster [the one you started last]")


def run(options: argparse.Namespace) -> None:
    """Makes the controller add or remove workers; returns when the new placement is served."""
    # The command has the same bounds as the setting.
    settings = WorkerSettings(count=options.workers)
    with joined(options.address) as controller:
        # If the controller is not there at all, there is nothing to wait for.
        controller.ask("whereabouts")
        order = ("scale", options.workers)
        try:
            controller.ask(*order, timeout_s=settings.load_timeout_s)
        except ControllerGoneError:
            controller.ask_next(*order, timeout_s=settings.load_timeout_s)
    print(f"{options.workers} workers")
