"""`milliways apply`: changes settings of a running cluster; prints the difference first."""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from milliways.cluster.cli.commands.running_controller import joined
from milliways.cluster.control.changes import EFFECTS, GENERATION, OF_INGRESS, differences
from milliways.cluster.ray.asking import RunningController
from milliways.cluster.settings.config import ClusterConfig
from milliways.cluster.settings.names import changed, flat
from milliways.wire.errors import ChangeRefusedError, StartupError
from milliways.wire.status import SettingsStatus
from milliways.wire.view import Declared

SETTLE_TIMEOUT_S = 20.0
POLL_S = 0.5


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    option = parser.add_argument
    option(
        "-f",
        "--file",
        type=Path,
        required=True,
        metavar="FILE.toml",
        help="file of settings; those that it does not name stay as they are",
    )
    option("--dry-run", action="store_true", help="print the difference only")
    option("--address", metavar="RAY", help="Ray cluster [the one you started last]")


def run(options: argparse.Namespace) -> None:
    """Declares the settings, and returns when the cluster is so.

    Raises:
        ChangeRefusedError: a running cluster cannot take them. Everything stays as it was.
        ConfigError: a setting is invalid, or does not go with those that run.
        StartupError: the cluster cannot become so now; says why. It goes on trying.
    """
    # Ray's messages go to the standard error meanwhile; ours do not.
    out = sys.stdout
    with joined(options.address) as controller:
        running: ClusterConfig = controller.ask("config")
        wanted = wanted_values(running, options.file)
        # The files of another model are checked, and its disk may be slow.
        timeout_s = running.workers.load_timeout_s
        lines: Sequence[str] = controller.ask("plan", wanted, timeout_s=timeout_s)
        print("\n".join(lines) or "nothing to change", file=out, flush=True)
        if options.dry_run or not lines:
            return
        needs_workers = bool(differences(flat(running), wanted, GENERATION))
        reaches_ingress = bool(differences(flat(running), wanted, OF_INGRESS))
        if reaches_ingress or needs_workers:
            _check_ingress()
        if needs_workers:
            declared = _change_workers(
                controller, running, wanted, lambda text: print(text, file=out, flush=True)
            )
        else:
            declared = controller.ask("apply", wanted)
            if reaches_ingress:
                _deploy_ingress(changed(running, declared.values), declared)
        timeout_s = running.workers.start_timeout_s + running.workers.load_timeout_s
        _wait(controller, declared, timeout_s)
    print("done", file=out)


def _change_workers(
    controller: RunningController,
    running: ClusterConfig,
    wanted: Mapping[str, Any],
    say: Callable[[str], object],
) -> Declared:
    """Starts other workers beside those that run, then an ingress that uses them.

    Raises:
        ChangeRefusedError: there is no room, or something fails. All is as it was before.
    """
    from milliways.cluster.ray.declaring import declared_now, prepare
    from milliways.cluster.ray.serving import deploy_ingress, wait_for_ingress

    before: SettingsStatus = controller.ask("settle", 0.0, 0.0)
    config = changed(running, wanted)
    declared = declared_now(config)
    try:
        prepare(controller, declared, say)
    except KeyboardInterrupt:
        # They would end by themselves after a minute.
        controller.ask("abandon", declared.values)
        raise
    say("the ingress changes over to the new workers; the old ones end with their requests")
    deploy_ingress(config, declared.at_s)
    try:
        wait_for_ingress(config.workers.start_timeout_s)
    except StartupError as error:
        deploy_ingress(running, before.declared_at_s)
        wait_for_ingress(config.workers.start_timeout_s)
        _take_back(controller, declared, running.workers.start_timeout_s)
        raise ChangeRefusedError(f"all is as it was: {error}") from error
    return declared


def _take_back(controller: RunningController, declared: Declared, timeout_s: float) -> None:
    """Ends the new workers as soon as no ingress uses them: the old ones serve again then.

    Raises:
        StartupError: that takes too long. They end by themselves when their requests have ended.
    """
    until_s = time.monotonic() + timeout_s
    while not controller.ask_next("abandon", declared.values, timeout_s=SETTLE_TIMEOUT_S):
        if time.monotonic() > until_s:
            raise StartupError(f"the new workers still have requests after {timeout_s:g} s")
        time.sleep(POLL_S)


def wanted_values(running: ClusterConfig, file: Path) -> Mapping[str, Any]:
    """The settings that a file, or the environment, changes.

    Raises:
        ConfigError: one is invalid, or does not go with those that run.
    """
    # Not earlier: `--help` needs no pydantic.
    from milliways.cluster.settings.sources import gather

    gathered = gather(file=file, base=running, reads_environment=True)
    before, after = flat(running), flat(gathered.config)
    return {name: after[name] for name in EFFECTS if after[name] != before[name]}


def _check_ingress() -> None:
    from milliways.cluster.ray.serving import is_deployed_from_file

    if is_deployed_from_file():
        raise ChangeRefusedError(
            "the ingress was deployed from a file, which has its settings:"
            " change them there, and give the file to `serve deploy` or the chart"
        )


def _deploy_ingress(config: ClusterConfig, declared: Declared) -> None:
    from milliways.cluster.ray.serving import deploy_ingress, wait_for_ingress

    deploy_ingress(config, declared.at_s)
    wait_for_ingress(config.workers.start_timeout_s)


def _wait(controller: RunningController, declared: Declared, timeout_s: float) -> None:
    """Waits until everything is as declared; a controller that is started meanwhile is told it."""
    until_s = time.monotonic() + timeout_s
    while True:
        # The next controller may not have heard of it.
        controller.ask_next("declare", declared, timeout_s=SETTLE_TIMEOUT_S + 30.0)
        order = (declared.at_s, SETTLE_TIMEOUT_S)
        status: SettingsStatus = controller.ask_next(
            "settle", *order, timeout_s=SETTLE_TIMEOUT_S + 30.0
        )
        if status.declared_at_s > declared.at_s:
            raise StartupError("other settings were declared meanwhile")
        if not status.pending:
            return
        if status.problem:
            raise StartupError(f"declared, but not so yet: {status.problem}")
        if time.monotonic() > until_s:
            late = "; ".join(status.pending)
            raise StartupError(f"declared, but not so within {timeout_s:g} s: {late}")
