"""`milliways serve`: starts a cluster and its endpoint; Ctrl-C ends both.

The code that uses Ray is in `cluster/ray/`. This module owns options, progress bar and greeting.
"""

import argparse
import dataclasses
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

from milliways.cluster.cli.commands.options import ACTIVATION_NAMES, DTYPE_NAMES, RESIDENCE_NAMES
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
from milliways.cluster.settings.config import (
    ClusterConfig,
    IngressSettings,
    WorkerSettings,
    read_config,
)
from milliways.model.checkpoint import Checkpoint
from milliways.model.model_dir import DEMO_NAME, resolve_model_dir
from milliways.model.tokenizer import TOKENIZER_FILE
from milliways.wire import transports
from milliways.wire.errors import PlacementError, StartupError

if TYPE_CHECKING:
    from milliways.cluster.ray.serving import ServedApplication

POLL_S = 0.2
BAR_WIDTH = 30


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options. An option that is not given keeps the file's value, or its default."""
    option = parser.add_argument
    option("--config", type=Path, metavar="FILE.toml", help="file of settings; options override it")
    option("--model", metavar=f"DIR|{DEMO_NAME}", help="model directory, or our demo model [demo]")
    option("--workers", type=int, metavar="N", help="number of workers to start [3]")
    option(
        "--expert-replicas",
        type=int,
        metavar="R",
        help="number of workers that hold each expert [2; 1 with a single worker]",
    )
    option(
        "--gpus-per-worker",
        type=float,
        metavar="G",
        help="number of GPUs of each worker; below 1 it shares one [0]",
    )
    option(
        "--attention",
        choices=("auto", "replicated", "layers"),
        help="replicated: each worker holds all attention layers; layers: each holds some [auto]",
    )
    option(
        "--transport",
        choices=transports.SETTINGS,
        help="how workers exchange rows: by gRPC, or by shared memory within a host [auto]",
    )
    option(
        "--kv-standby",
        action="store_const",
        const=True,
        help="copy KV blocks to a second worker, so that a death does not lose them",
    )
    option("--dtype", choices=DTYPE_NAMES, help="dtype of activations and KV cache [float32]")
    option(
        "--activations",
        choices=ACTIVATION_NAMES,
        help="exact: as computed; int8: rounded before each int8 weight, faster [exact]",
    )
    option(
        "--experts",
        choices=RESIDENCE_NAMES,
        help="loaded: copied into memory; mapped: read from their files [loaded]",
    )
    option("--host", metavar="H", help="address to listen on [127.0.0.1]")
    option("--port", type=int, metavar="P", help="port for HTTP [8000]")
    option("--grpc-port", type=int, metavar="P", help="port for gRPC [50051]")
    option(
        "--grace",
        type=float,
        metavar="S",
        help="seconds that running requests have to end after SIGTERM or SIGHUP [120]",
    )
    option("--address", metavar="RAY", help="address of a running Ray cluster [start a local one]")


def run(options: argparse.Namespace) -> None:
    """Starts the cluster, waits until it is ready, and serves until it is interrupted."""
    config = settings_of(options)
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


def settings_of(options: argparse.Namespace) -> ClusterConfig:
    """The file's settings, overridden by the command line's options.

    Raises:
        ConfigError: a field is invalid; the error names its table, the field, value and limit.
    """
    base = read_config(options.config) if options.config else ClusterConfig()
    count = options.workers
    replicas = options.expert_replicas
    if count is not None and replicas is None and base.workers.expert_replicas > count:
        replicas = count
    tables: dict[str, dict[str, Any]] = {
        "model": {
            "path": options.model,
            "dtype": options.dtype,
            "activations": options.activations,
            "experts": options.experts,
        },
        "workers": {
            "count": count,
            "expert_replicas": replicas,
            "gpus_each": options.gpus_per_worker,
            "attention": options.attention,
            "transport": options.transport,
            "kv_standby": options.kv_standby,
        },
        "ingress": {
            "host": options.host,
            "port": options.port,
            "grpc_port": options.grpc_port,
            "grace_s": options.grace,
        },
    }
    changed = {
        table: dataclasses.replace(
            getattr(base, table), **{k: v for k, v in values.items() if v is not None}
        )
        for table, values in tables.items()
    }
    return dataclasses.replace(base, **changed)


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
    from milliways.cluster.ray.serving import is_serve_running, stop_and_leave

    join(address)
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
