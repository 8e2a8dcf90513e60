"""`milliways serve`: starts a cluster and its endpoint; Ctrl-C ends both.

The code that uses Ray is in `cluster/ray/`. This module owns options, progress bar and greeting.
"""

import argparse
import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

from milliways.cluster.cli.commands.setting_flags import (
    add_setting_flags,
    gathered_from,
    print_config,
)
from milliways.cluster.ray.environment import (
    RunningCluster,
    be_patient,
    be_quiet,
    head_for,
    make_token,
    remember,
    stay_local,
    watch_proxies,
)
from milliways.cluster.settings.config import ClusterConfig, IngressSettings, WorkerSettings
from milliways.model.checkpoint import Checkpoint
from milliways.model.model_dir import resolve_model_dir
from milliways.model.tokenizer import TOKENIZER_FILE
from milliways.wire.errors import PlacementError, StartupError

if TYPE_CHECKING:
    from milliways.cluster.ray.serving import ServedApplication

POLL_S = 0.2
BAR_WIDTH = 30


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options. An option that is not given keeps the file's value, or its default."""
    parser.usage = f"{parser.prog} [--config FILE.toml] [options]"
    option = parser.add_argument
    option("--config", type=Path, metavar="FILE.toml", help="file of settings; options override it")
    option(
        "--print-config",
        action="store_true",
        help="print the settings and where each comes from, and exit",
    )
    option("--address", metavar="RAY", help="address of a running Ray cluster [start a local one]")
    add_setting_flags(parser)


def run(options: argparse.Namespace) -> None:
    """Starts the cluster, waits until it is ready, and serves until it is interrupted."""
    gathered = gathered_from(options, options.config)
    if options.print_config:
        print_config(gathered)
        return
    config = gathered.config
    # These checks come first, because starting Ray takes ten seconds.
    _check_ports(config.ingress)
    with Checkpoint.open(resolve_model_dir(config.model.path)):
        pass
    interrupt = Interrupt()
    interrupt.watch()
    if options.address:
        _serve_on(options.address, config, interrupt)
    else:
        _serve_locally(config, interrupt)


def _check_ports(ingress: IngressSettings) -> None:
    for name, port in (("port", ingress.port), ("grpc-port", ingress.grpc_port)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((ingress.host, port))
            except OSError as error:
                reason = f"cannot listen on {ingress.host}:{port}: {error.strerror}"
                raise StartupError(f"--{name} {port}: {reason}") from error


class Interrupt:
    """Turns the first Ctrl-C or SIGTERM into an event; a second Ctrl-C raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.stopped = threading.Event()

    def watch(self) -> None:
        """Installs the handlers. Call it again after Ray started: Ray installs its own."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)

    def _stop(self, number: int, frame: object) -> None:
        self.stopped.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _serve_locally(config: ClusterConfig, interrupt: Interrupt) -> None:
    be_quiet()
    be_patient()
    watch_proxies()
    stay_local()
    token = make_token()
    # Not earlier: Ray reads its settings when it is imported.
    from milliways.cluster.ray.cluster import LocalRay

    say("starting Ray …")
    local = LocalRay()
    note: Path | None = None
    try:
        ingress = config.ingress
        running = RunningCluster(
            pid=os.getpid(),
            address=local.address,
            token=token,
            http=f"http://{ingress.host}:{ingress.port}",
            grpc=f"{ingress.host}:{ingress.grpc_port}",
        )
        note = remember(running)
        _serve_until(config, interrupt)
    finally:
        say("stopping …")
        if note is not None:
            note.unlink(missing_ok=True)
        local.stop()


def _serve_on(address: str, config: ClusterConfig, interrupt: Interrupt) -> None:
    be_quiet()
    head_for(address)
    # Not earlier: Ray reads its settings when it is imported.
    from milliways.cluster.ray.cluster import join
    from milliways.cluster.ray.declaring import check_running
    from milliways.cluster.ray.serving import is_serve_running, stop_and_leave

    join(address)
    # Before anything changes: a cluster that cannot take these settings goes on as it is.
    check_running(config)
    # If Serve ran before us, it may run other applications: it stays.
    keeps_serve = is_serve_running()
    try:
        _serve_until(config, interrupt)
    finally:
        say("stopping …")
        stop_and_leave(keeps_serve=keeps_serve)


def _serve_until(config: ClusterConfig, interrupt: Interrupt) -> None:
    """Starts workers and endpoint, says when they are ready, and waits for the interrupt."""
    interrupt.watch()
    from milliways.cluster.ray.serving import ServedApplication

    application = ServedApplication(config)
    application.start()
    stopped = interrupt.stopped
    _watch_loading(application, config.workers, stopped)
    _wait_until_ready(application, config.ingress, config.workers.start_timeout_s, stopped)
    if not stopped.is_set():
        say(greeting(config))
    interrupt.watch()
    stopped.wait()


def _watch_loading(
    application: "ServedApplication", settings: WorkerSettings, stopped: threading.Event
) -> None:
    """Draws a progress bar until all workers are ready.

    Raises:
        PlacementError: the workers cannot hold the model.
        StartupError: the start takes too long; the error says what each worker waits for.
    """
    bar = Bar(sys.stderr)
    begun_s = time.monotonic()
    try:
        while not stopped.is_set():
            progress = application.progress()
            bar.draw(progress["workers"])
            if progress["failure"]:
                raise PlacementError(progress["failure"])
            if progress["is_complete"]:
                return
            timeout_s = _time_for(progress["workers"], settings)
            if time.monotonic() > begun_s + timeout_s:
                late = waiting(progress["workers"])
                raise StartupError(f"not up within {timeout_s:g} s: {late}")
            stopped.wait(POLL_S)
    finally:
        bar.end()


def _time_for(workers: list[dict[str, Any]], settings: WorkerSettings) -> float:
    """Time limit of the start; loading adds to it once all workers have a process."""
    have_processes = all(worker["has_process"] for worker in workers)
    return settings.start_timeout_s + (settings.load_timeout_s if have_processes else 0.0)


def waiting(workers: list[dict[str, Any]]) -> str:
    """What each worker waits for, in words."""
    parts: list[str] = []
    for worker in workers:
        if worker["waits_for"]:
            error = f" ({worker['last_error']})" if worker["last_error"] else ""
            parts.append(f"{worker['worker_id']} waits for {worker['waits_for']}{error}")
    return "; ".join(parts) or "all workers are ready, but the endpoint is not"


def _wait_until_ready(
    application: "ServedApplication",
    ingress: IngressSettings,
    timeout_s: float,
    stopped: threading.Event,
) -> None:
    """Waits until the endpoint can make a token.

    Raises:
        StartupError: that takes too long; the error gives the endpoint's own reason.
    """
    until_s = time.monotonic() + timeout_s
    url = f"http://{ingress.host}:{ingress.port}/ready"
    reason = "the endpoint does not answer"
    while not stopped.is_set():
        try:
            with urlopen(url, timeout=10.0):
                return
        except HTTPError as error:
            reason = _message_of(error)
        except (URLError, OSError):
            application.check_endpoint()
        if time.monotonic() > until_s:
            raise StartupError(f"not ready within {timeout_s:g} s: {reason}")
        stopped.wait(POLL_S)


def _message_of(error: HTTPError) -> str:
    try:
        return json.loads(error.read())["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"HTTP {error.code}"


def greeting(config: ClusterConfig) -> str:
    """The addresses of the cluster, and a command to try."""
    ingress = config.ingress
    http, grpc = f"http://{ingress.host}:{ingress.port}", f"{ingress.host}:{ingress.grpc_port}"
    model_dir = resolve_model_dir(config.model.path)
    name = config.model.name or model_dir.name
    # A model without a tokenizer takes token ids only.
    prompt = "Welcome to" if (model_dir / TOKENIZER_FILE).is_file() else [1, 2, 3]
    body = json.dumps({"model": name, "prompt": prompt, "max_tokens": 32, "stream": True})
    return "\n".join(
        [
            f"serving {name} with {config.workers.count} workers",
            f"  HTTP  {http}/v1",
            f"  gRPC  {grpc}",
            "try:",
            f"  curl -N {http}/v1/completions -H 'Content-Type: application/json' -d '{body}'",
            "Ctrl-C stops it.",
        ]
    )


class Bar:
    """A progress line for loading; a terminal shows it in place."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._last = ""

    def draw(self, workers: list[dict[str, Any]]) -> None:
        """Shows the bytes read and the number of ready workers."""
        bytes_read = sum(worker["bytes_read"] for worker in workers)
        bytes_wanted = sum(worker["bytes_wanted"] for worker in workers)
        share = min(1.0, bytes_read / bytes_wanted) if bytes_wanted else 0.0
        num_ready = sum(worker["state"] == "ready" for worker in workers)
        filled = round(share * BAR_WIDTH)
        line = (
            f"loading [{'#' * filled}{'.' * (BAR_WIDTH - filled)}]"
            f" {bytes_read / 1e9:.2f} of {bytes_wanted / 1e9:.2f} GB,"
            f" {num_ready} of {len(workers)} workers ready"
        )
        if self._is_terminal:
            self._stream.write(f"\r{line}")
            self._stream.flush()
        elif num_ready and line != self._last:
            self._stream.write(f"{line}\n")
            self._stream.flush()
        self._last = line

    def end(self) -> None:
        """Moves to the next line."""
        if self._is_terminal:
            self._stream.write("\n")


def say(text: str) -> None:
    """Prints to standard error; standard output is for programs."""
    print(text, file=sys.stderr, flush=True)
