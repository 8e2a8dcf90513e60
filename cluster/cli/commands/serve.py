"""`milliways serve`: starts a cluster and its endpoint, and ends both at Ctrl-C."""

# Ray's own types are unknown in part.
# pyright: basic

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
from typing import Any
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
from milliways.wire.errors import PlacementError, StartupError

POLL_S = 0.2
ANSWER_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 5.0
BAR_WIDTH = 30


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options; those not given come from the file, or its defaults."""
    option = parser.add_argument
    option("--config", type=Path, metavar="FILE.toml", help="settings; options override them")
    option("--model", metavar=f"DIR|{DEMO_NAME}", help="model directory [demo]")
    option("--workers", type=int, metavar="N", help="worker processes [3]")
    option("--expert-replicas", type=int, metavar="R", help="copies of each expert [2, if it can]")
    option(
        "--gpus-per-worker",
        type=float,
        metavar="G",
        help="GPUs of each worker, or a part of one [0]",
    )
    option("--attention", choices=("auto", "replicated", "layers"), help="[auto]")
    option("--transport", choices=("auto", "grpc", "shm"), help="between workers [auto]")
    option(
        "--kv-standby",
        action="store_const",
        const=True,
        help="copy KV blocks to a second worker, so that a death costs no replay of them",
    )
    option("--dtype", choices=DTYPE_NAMES, help="of activations and KV cache [float32]")
    option("--activations", choices=ACTIVATION_NAMES, help="[exact]")
    option("--experts", choices=RESIDENCE_NAMES, help="[loaded]")
    option("--host", metavar="H", help="to listen on [127.0.0.1]")
    option("--port", type=int, metavar="P", help="of HTTP [8000]")
    option("--grpc-port", type=int, metavar="P", help="of gRPC [50051]")
    option("--address", metavar="RAY", help="a running Ray cluster to use [starts a local one]")


def run(options: argparse.Namespace) -> None:
    """Starts, waits until the endpoint is ready, and then for the end."""
    config = settings_of(options)
    # What cannot work is said before ten seconds are spent on starting Ray.
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
    """The settings of the file, with the options of the command line over them.

    Raises:
        ConfigError: names table, field, value and limit.
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
                reason = f"{ingress.host}:{port} cannot be listened on: {error.strerror}"
                raise StartupError(f"--{name} {port}: {reason}") from error


class Interrupt:
    """Ctrl-C and SIGTERM as an event; the second Ctrl-C interrupts as ever."""

    def __init__(self) -> None:
        self.stopped = threading.Event()

    def watch(self) -> None:
        """Takes the signals; again after Ray, which takes them too when it is initialised."""
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
        interrupt.watch()
        _start(config, interrupt.stopped)
        interrupt.watch()
        interrupt.stopped.wait()
    finally:
        say("stopping …")
        if note is not None:
            note.unlink(missing_ok=True)
        local.stop()


def _serve_on(address: str, config: ClusterConfig, interrupt: Interrupt) -> None:
    be_quiet()
    head_for(address)
    import ray
    from ray import serve

    from milliways.cluster.ray.app import APP_NAME
    from milliways.cluster.ray.cluster import join
    from milliways.cluster.ray.start_controller import end_controller

    join(address)
    had_serve = _serve_runs()
    try:
        interrupt.watch()
        _start(config, interrupt.stopped)
        interrupt.watch()
        interrupt.stopped.wait()
    finally:
        say("stopping …")
        # What ran before goes on: it may serve other applications.
        if had_serve:
            serve.delete(APP_NAME)
        else:
            serve.shutdown()
        end_controller(STOP_TIMEOUT_S)
        ray.shutdown()


def _serve_runs() -> bool:
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    try:
        ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return False
    return True


def _start(config: ClusterConfig, stopped: threading.Event) -> None:
    """Brings up workers and endpoint, side by side."""
    import ray
    from ray import serve

    from milliways.cluster.ray.app import APP_NAME, make_app
    from milliways.cluster.ray.start_controller import find_or_start_controller

    controller = find_or_start_controller(config)
    ray.get(controller.begin.remote())
    _open_proxy(config.ingress)
    target = serve.RunTarget(target=make_app(config), name=APP_NAME, route_prefix="/")
    # The endpoint comes up while the workers load; it is ready when both are.
    serve.run_many(
        [target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False
    )
    _watch_loading(controller, config.workers, stopped)
    _wait_until_ready(config.ingress, config.workers.start_timeout_s, stopped)
    if not stopped.is_set():
        say(greeting(config))


def _open_proxy(ingress: IngressSettings) -> None:
    """Has Serve listen, or finds that it does.

    Raises:
        StartupError: it does not come up, or listens elsewhere.
    """
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.context import _get_global_client

    options = {"host": ingress.host, "port": ingress.port}
    try:
        serve.start(proxy_location="HeadOnly", http_options=options)
        client: Any = _get_global_client()
    except RayError as error:
        reason = str(error).partition("\n")[0]
        raise StartupError(f"the proxy of Ray Serve does not start: {reason}") from error
    there = client.http_config
    if (there.host, there.port) != (ingress.host, ingress.port):
        where = f"{there.host}:{there.port}"
        raise StartupError(f"Ray Serve runs there already and listens on {where}: say so")


def _watch_loading(controller: Any, settings: WorkerSettings, stopped: threading.Event) -> None:
    """Draws a bar until all workers are ready.

    Raises:
        PlacementError: the workers cannot hold the model.
        StartupError: it takes too long; says which worker waits for what.
    """
    import ray

    bar = Bar(sys.stderr)
    begun_s = time.monotonic()
    try:
        while not stopped.is_set():
            progress: Any = ray.get(controller.progress.remote(), timeout=ANSWER_TIMEOUT_S)
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
    """How long the start may take: little until all have a process, more for loading."""
    is_there = all(worker["has_process"] for worker in workers)
    return settings.start_timeout_s + (settings.load_timeout_s if is_there else 0.0)


def waiting(workers: list[dict[str, Any]]) -> str:
    """Who waits for what, for people."""
    parts: list[str] = []
    for worker in workers:
        if worker["waits_for"]:
            error = f" ({worker['last_error']})" if worker["last_error"] else ""
            parts.append(f"{worker['worker_id']} waits for {worker['waits_for']}{error}")
    return "; ".join(parts) or "all workers are ready, the endpoint is not"


def _wait_until_ready(ingress: IngressSettings, timeout_s: float, stopped: threading.Event) -> None:
    """Until a token can be made; the endpoint says why it cannot.

    Raises:
        StartupError: it takes too long.
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
            _check_endpoint()
        if time.monotonic() > until_s:
            raise StartupError(f"not ready within {timeout_s:g} s: {reason}")
        stopped.wait(POLL_S)


def _check_endpoint() -> None:
    """Raises StartupError where Serve has given up on the endpoint."""
    from ray import serve

    from milliways.cluster.ray.app import APP_NAME

    application = serve.status().applications.get(APP_NAME)
    if application is not None and application.status == "DEPLOY_FAILED":
        raise StartupError(f"the endpoint does not start: {application.message}")


def _message_of(error: HTTPError) -> str:
    try:
        return json.loads(error.read())["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"HTTP {error.code}"


def greeting(config: ClusterConfig) -> str:
    """Where the cluster is, and a line to try."""
    ingress = config.ingress
    http, grpc = f"http://{ingress.host}:{ingress.port}", f"{ingress.host}:{ingress.grpc_port}"
    model_dir = resolve_model_dir(config.model.path)
    name = config.model.name or model_dir.name
    # Without a tokenizer it takes no text.
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
    """A line that says how far loading is; on a terminal it is drawn over itself."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._last = ""

    def draw(self, workers: list[dict[str, Any]]) -> None:
        """Shows bytes read, and what the slowest waits for."""
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
        """Leaves the line."""
        if self._is_terminal:
            self._stream.write("\n")


def say(text: str) -> None:
    """Tells the operator; standard output stays for what programs read."""
    print(text, file=sys.stderr, flush=True)
