"""Runs the Serve application in the Ray cluster that this process has started or joined.

    application = ServedApplication(config)
    application.start()             # workers and endpoint start at the same time
    application.progress()          # what each worker waits for, and bytes read
    application.check_endpoint()    # raises StartupError if Serve gave up on the endpoint

Importing this module imports Ray: do that only after Ray's settings are in the environment
(`cluster/ray/environment.py`).
"""

# Ray's own types are unknown in part.
# pyright: basic

import logging
import time
from contextlib import suppress
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve._private.common import REPLICA_ID_FULL_ID_STR_PREFIX
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE, SERVE_PROXY_NAME
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.schema import APIType
from ray.util import list_named_actors

from milliways.cluster.ray import haproxy
from milliways.cluster.ray.app import APP_NAME, INGRESS_NAME, make_app
from milliways.cluster.ray.declaring import declared_now, make_possible
from milliways.cluster.ray.start_controller import (
    end_controller,
    find_or_start_controller,
    is_controller_running,
)
from milliways.cluster.settings.config import LOOPBACK, ClusterConfig, IngressSettings
from milliways.wire.errors import RayGoneError, StartupError

logger = logging.getLogger(__name__)

PROGRESS_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 5.0
POLL_S = 0.1
# What an answer may take beyond the time that running requests have.
LEAVE_TIMEOUT_S = 15.0


class ServedApplication:
    """The workers, and the endpoint in front of them.

    Invariant: what another process has started is not ours before our own endpoint replaces it.
    """

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._declared = declared_now(config)
        self._is_ours = False
        self._controller: Any = None

    def start(self) -> None:
        """Starts the workers and the endpoint; returns before either is ready.

        If workers run already that cannot serve these settings, others are started beside them, and
        this returns when the endpoint has changed over to these.

        Raises:
            StartupError: Serve cannot listen on the address of the settings.
            ChangeRefusedError: the cluster that runs cannot take the settings.
        """
        self._is_ours = not is_controller_running()
        self._controller = find_or_start_controller(self._config, self._declared.at_s)
        ray.get(self._controller.begin.remote())
        is_change = make_possible(self._declared)
        ray.get(self._controller.declare.remote(self._declared))
        _open_proxy(self._config.ingress)
        self._is_ours = True
        deploy_ingress(self._config, self._declared.at_s)
        if is_change:
            wait_for_ingress(self._config.workers.start_timeout_s)

    def progress(self) -> dict[str, Any]:
        """The start so far, as the controller describes it."""
        progress: Any = ray.get(self._controller.progress.remote(), timeout=PROGRESS_TIMEOUT_S)
        return progress

    def check_endpoint(self) -> None:
        """Raises StartupError if Serve has given up on the endpoint."""
        application = serve.status().applications.get(APP_NAME)
        if application is not None and application.status == "DEPLOY_FAILED":
            raise StartupError(f"the endpoint does not start: {application.message}")

    def probe(self) -> None:
        """Asks Ray and Serve for a sign of life.

        Raises:
            RayGoneError: no node of Ray is alive.
            Exception: whatever else they answer. They may be starting again.
        """
        nodes: Any = ray.nodes()
        if not any(node["Alive"] for node in nodes):
            raise RayGoneError("Ray has given up its last node: the cluster ends")
        serve.status()

    def leave(self, *, keeps_serve: bool) -> None:
        """Ends all that is ours, or takes back what was prepared; then leaves the Ray cluster.

        `keeps_serve` leaves Serve itself running, for its other applications.
        """
        if self._is_ours:
            stop(keeps_serve=keeps_serve)
        elif self._controller is not None:
            self._take_back()
        ray.shutdown()

    def _take_back(self) -> None:
        """Ends workers that were started beside those that serve."""
        try:
            asked = self._controller.abandon.remote(self._declared.values)
            ray.get(asked, timeout=STOP_TIMEOUT_S)
        except RayError as error:
            # Nobody asks for them any more, so they end by themselves.
            logger.warning("the new workers are not taken back: %s", error)

    def finish_requests(self, grace_s: float, *, owns_proxies: bool) -> None:
        """Makes the endpoint take nothing new; returns when what runs has ended, or in `grace_s`.

        Proxies that other applications use as well (not `owns_proxies`) are left alone.
        """
        until_s = time.monotonic() + grace_s
        _quiet_serve()
        # Twice, because a replica may have started meanwhile.
        for _ in range(2):
            left_s = max(0.0, until_s - time.monotonic())
            try:
                handle = serve.get_deployment_handle(INGRESS_NAME, APP_NAME)
                handle.broadcast("leave", left_s).results(timeout_s=left_s + LEAVE_TIMEOUT_S)
            except (RayError, RayServeException, TimeoutError) as error:
                logger.warning("an ingress replica does not leave: %s", error)
        if owns_proxies and haproxy.is_enabled():
            _wait_for_haproxy(until_s)
        elif owns_proxies:
            _drain_proxies(until_s)


def _quiet_serve() -> None:
    """Serve has a remark for everybody who asks for a deployment, or deletes one."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)


def _drain_proxies(until_s: float) -> None:
    """Waits until the proxies have handed over what replicas gave them."""
    proxies = _actors_of_serve(SERVE_PROXY_NAME)
    try:
        ray.get([proxy.update_draining.remote(True) for proxy in proxies], timeout=LEAVE_TIMEOUT_S)
        while time.monotonic() < until_s:
            asked = [proxy.is_drained.remote() for proxy in proxies]
            if all(ray.get(asked, timeout=LEAVE_TIMEOUT_S)):
                return
            time.sleep(POLL_S)
    except RayError as error:
        logger.warning("a proxy does not say whether it is idle: %s", error)


def _wait_for_haproxy(until_s: float) -> None:
    """As `_drain_proxies`. Serve would wait for idle connections as well, a minute and more."""
    while haproxy.num_open_requests() and time.monotonic() < until_s:
        time.sleep(POLL_S)


def _actors_of_serve(prefix: str) -> list[Any]:
    """The actors of Serve whose names begin so."""
    found: list[Any] = []
    entries: Any = list_named_actors(all_namespaces=True)
    for entry in entries:
        if entry["namespace"] == SERVE_NAMESPACE and entry["name"].startswith(prefix):
            # It may have ended since it was listed.
            with suppress(ValueError):
                found.append(ray.get_actor(entry["name"], namespace=SERVE_NAMESPACE))
    return found


def deploy_ingress(config: ClusterConfig, declared_at_s: float) -> None:
    """Makes Serve run the ingress with these settings; returns before its replicas are ready."""
    application = make_app(config, declared_at_s)
    target = serve.RunTarget(target=application, name=APP_NAME, route_prefix="/")
    serve.run_many(
        [target],
        wait_for_ingress_deployment_creation=False,
        wait_for_applications_running=False,
    )


def wait_for_ingress(timeout_s: float) -> None:
    """Waits until Serve has replaced all replicas of the ingress.

    Raises:
        StartupError: it gave up, or takes too long.
    """
    until_s = time.monotonic() + timeout_s
    while True:
        application = serve.status().applications[APP_NAME]
        if application.status == "RUNNING":
            return
        if application.status == "DEPLOY_FAILED" or time.monotonic() > until_s:
            raise StartupError(f"the endpoint does not start: {application.message}")
        time.sleep(POLL_S)


def is_deployed_from_file() -> bool:
    """Whether the application came by `serve deploy` (or KubeRay), whose file then counts."""
    client: Any = _get_global_client()
    details = client.get_serve_details()
    return details["applications"].get(APP_NAME, {}).get("source") == APIType.DECLARATIVE


def is_serve_running() -> bool:
    """Whether the joined Ray cluster runs Serve already."""
    try:
        ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return False
    return True


def stop(*, keeps_serve: bool) -> None:
    """Ends application, workers and controller, and Serve itself unless it is to be kept."""
    if is_serve_running():
        _quiet_serve()
        serve.delete(APP_NAME, _blocking=False)
        # Serve would give their requests the time of a planned change.
        for replica in _actors_of_serve(f"{REPLICA_ID_FULL_ID_STR_PREFIX}{APP_NAME}#"):
            ray.kill(replica)
        if keeps_serve:
            serve.delete(APP_NAME)
        else:
            serve.shutdown()
    end_controller(STOP_TIMEOUT_S)


def _open_proxy(ingress: IngressSettings) -> None:
    """Makes Serve listen, or checks that it listens on the same address already.

    Raises:
        StartupError: the proxy does not start, or listens on another address.
    """
    # HAProxy listens at the host of the settings; all else of Serve, on this machine alone.
    host = LOOPBACK if haproxy.is_enabled() else ingress.host
    options = {"host": host, "port": ingress.port}
    try:
        serve.start(proxy_location="HeadOnly", http_options=options)
        client: Any = _get_global_client()
    except RayError as error:
        reason = str(error).partition("\n")[0]
        raise StartupError(f"the proxy of Ray Serve does not start: {reason}") from error
    actual = client.http_config
    if (actual.host, actual.port) != (host, ingress.port):
        listening = f"Ray Serve already listens on {actual.host}:{actual.port}"
        raise StartupError(f"{listening}: set --host and --port to that address")
