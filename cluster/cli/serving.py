"""Starts a cluster for `milliways serve`, follows it while it serves, and stops it.

Everything here runs in the working thread of a `ProcessLife`, except what ends the cluster: that
runs in a thread of its own, because the working thread may hang.
"""

import json
import os
import sys
import threading
import time
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError, URLError

from milliways.cluster.cli.listening import check_listeners
from milliways.cluster.cli.messages import Bar, greeting, mute_stderr, say
from milliways.cluster.cli.process_life import ProcessLife
from milliways.cluster.cli.stop_signals import Wish
from milliways.cluster.ray.descendants import adopt_orphans, descendants, end_descendants
from milliways.cluster.ray.environment import (
    be_equal,
    be_patient,
    be_quiet,
    drain_proxies_at_once,
    guard_proxies,
    head_for,
    make_token,
    stay_local,
    watch_proxies,
)
from milliways.cluster.ray.haproxy import use_haproxy
from milliways.cluster.ray.heartbeat import Heartbeat
from milliways.cluster.ray.run_folder import RunFolder
from milliways.cluster.ray.running_clusters import Note, RunningCluster, notes_dir, this_machine
from milliways.cluster.settings.config import ClusterConfig, IngressSettings, WorkerSettings
from milliways.wire.addresses import join_address, reachable_host
from milliways.wire.errors import PlacementError, RayGoneError, StartupError
from milliways.wire.local_http import open_url

if TYPE_CHECKING:
    from milliways.cluster.ray.serving import ServedApplication

POLL_S = 0.2
END_TIMEOUT_S = 5.0
# An actor's death may be news before that of the process that took it along.
GONE_TIMEOUT_S = 3.0
PORTS_PERIOD_S = 10.0
HEARTBEAT_PERIOD_S = 2.0
# Longer than Ray takes to start its own actors again on a busy machine, or a head from Redis.
SILENCE_LIMIT_S = 50.0


class LocalCluster:
    """A cluster on a Ray that this process starts and ends."""

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._life = ProcessLife()
        self._folder: RunFolder | None = None
        self._note: Note | None = None

    def run(self) -> None:
        """Serves until a signal or a fault ends it; leaves the process."""
        self._life.run(self._work, self._end)

    def _work(self) -> None:
        # Before Ray starts, because both may be impossible.
        notes_dir()
        folder = self._folder = RunFolder()
        adopt_orphans()
        be_quiet()
        be_equal()
        be_patient()
        watch_proxies()
        guard_proxies()
        drain_proxies_at_once()
        stay_local()
        use_haproxy(folder.path, self._config.ingress.host)
        token = make_token()
        # Not earlier: Ray reads its settings when it is imported.
        from milliways.cluster.ray.cluster import LocalRay

        say("starting Ray …")
        local = LocalRay(folder.path, is_wanted=lambda: not self._life.stopped.is_set())
        self._life.guard(local.check)
        ingress = self._config.ingress
        host = reachable_host(ingress.host)
        machine, boot = this_machine()
        running = RunningCluster(
            pid=os.getpid(),
            address=local.address,
            token=token,
            http=f"http://{join_address(host, ingress.port)}",
            grpc=join_address(host, ingress.grpc_port),
            machine=machine,
            boot=boot,
        )
        self._note = Note(running)
        from milliways.cluster.ray.serving import ServedApplication

        try:
            _serve(ServedApplication(self._config), self._config, self._life, is_local=True)
        except Exception:
            # What fails because Ray is gone is not the news.
            local.check_again(GONE_TIMEOUT_S)
            raise

    def _end(self) -> None:
        if self._note is not None:
            self._note.delete()
        with mute_stderr():
            left = end_descendants(END_TIMEOUT_S)
        if left:
            say(f"these processes do not end: {', '.join(map(str, left))}")
        if self._folder is not None:
            self._folder.remove()


class JoinedCluster:
    """A cluster on a Ray that runs already, and stays."""

    def __init__(self, config: ClusterConfig, address: str) -> None:
        self._config = config
        self._address = address
        self._life = ProcessLife()
        # Until we have looked, all is left alone.
        self._application: ServedApplication | None = None
        self._keeps_serve = True

    def run(self) -> None:
        """Serves until a signal or a fault ends it; leaves the process."""
        self._life.run(self._work, self._end)

    def _work(self) -> None:
        be_quiet()
        head_for(self._address)
        # Not earlier: Ray reads its settings when it is imported.
        from milliways.cluster.ray.cluster import join
        from milliways.cluster.ray.serving import ServedApplication, is_serve_running

        join(self._address)
        # If Serve ran before us, it may run other applications: it stays.
        self._keeps_serve = is_serve_running()
        self._application = ServedApplication(self._config)
        _serve(self._application, self._config, self._life, is_local=False)

    def _end(self) -> None:
        # A Ray that is gone has nothing left to stop, and does not answer.
        if self._application is not None and not isinstance(self._life.error, RayGoneError):
            self._application.leave(keeps_serve=self._keeps_serve)


class _PortWatch:
    """Says once if another process begins to listen on a port of the endpoint."""

    def __init__(self, ingress: IngressSettings) -> None:
        self._ingress = ingress
        self._next_s = 0.0
        self._said = ""

    def check(self) -> None:
        now_s = time.monotonic()
        if now_s < self._next_s:
            return
        self._next_s = now_s + PORTS_PERIOD_S
        try:
            check_listeners(self._ingress, descendants())
        except StartupError as error:
            if str(error) != self._said:
                self._said = str(error)
                say(f"warning: {error}, and takes some of the clients")


def _serve(
    application: "ServedApplication", config: ClusterConfig, life: ProcessLife, *, is_local: bool
) -> None:
    """Starts workers and endpoint, says when they are ready, and serves until it is stopped."""
    application.start()
    heartbeat = Heartbeat(application.probe, HEARTBEAT_PERIOD_S)
    heartbeat.start()
    life.guard(lambda: heartbeat.check(SILENCE_LIMIT_S))
    _watch_loading(application, config.workers, life.stopped)
    _wait_until_ready(application, config, life.stopped, is_local=is_local)
    if life.stopped.is_set():
        return
    if is_local:
        check_listeners(config.ingress, descendants())
        life.guard(_PortWatch(config.ingress).check)
    say(greeting(config))
    life.is_serving = True
    life.stopped.wait()
    if life.wish is Wish.FINISH:
        grace_s = config.ingress.grace_s
        say(f"running requests have {grace_s:g} s to end; a second signal ends them now …")
        application.finish_requests(grace_s, owns_proxies=is_local)


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
    said: set[str] = set()
    try:
        while not stopped.is_set():
            progress = application.progress()
            bar.draw(progress["workers"])
            for error in new_errors(progress["workers"], said):
                bar.end()
                say(error)
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


def new_errors(workers: list[dict[str, Any]], said: set[str]) -> list[str]:
    """What went wrong in workers that are not ready, each once: `said` has the earlier ones."""
    errors = {w["last_error"] for w in workers if w["state"] != "ready" and w["last_error"]}
    new = sorted(errors - said)
    said |= errors
    return new


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
    config: ClusterConfig,
    stopped: threading.Event,
    *,
    is_local: bool,
) -> None:
    """Waits until the endpoint can make a token.

    Raises:
        StartupError: that takes too long, or another process has its port; says why.
    """
    ingress, timeout_s = config.ingress, config.workers.start_timeout_s
    until_s = time.monotonic() + timeout_s
    url = f"http://{join_address(reachable_host(ingress.host), ingress.port)}/ready"
    reason = "the endpoint does not answer"
    while not stopped.is_set():
        try:
            with open_url(url, timeout_s=10.0):
                return
        except HTTPError as error:
            reason = _message_of(error)
        except (URLError, OSError):
            if is_local:
                check_listeners(ingress, descendants())
            application.check_endpoint()
        if time.monotonic() > until_s:
            raise StartupError(f"not ready within {timeout_s:g} s: {reason}")
        stopped.wait(POLL_S)


def _message_of(error: HTTPError) -> str:
    try:
        return json.loads(error.read())["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"HTTP {error.code}"
