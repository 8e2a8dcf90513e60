"""The Ray Serve application.

    serve run milliways.cluster.ray.app:app 'workers={count: 3}'
    serve build milliways.cluster.ray.app:default_app -o FILE

Arguments are the tables of `cluster/settings/config.py`; a file for `serve deploy` has them in its
`args`. The first replica brings up the controller, which brings up the workers; all replicas follow
its view, and go on with the last one while it is away.
"""

# Ray's own types are unknown in part.
# pyright: basic

import asyncio
import logging
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from ray import serve
from ray.exceptions import RayError, RayTaskError

from milliways.cluster.control.changes import other_model
from milliways.cluster.control.generations import Follower
from milliways.cluster.ingress.ingress import Ingress
from milliways.cluster.ingress.leaving import LAST_ERRORS_S, leave
from milliways.cluster.ingress.metrics import IngressMetrics
from milliways.cluster.ingress.openai.app import make_http_app
from milliways.cluster.ingress.public_grpc.server import IngressGrpcServer
from milliways.cluster.ingress.routing.router_choice import RouterInfo
from milliways.cluster.ingress.routing.router_source import RouterSource
from milliways.cluster.ingress.routing.silence import HedgeLimits
from milliways.cluster.ingress.served_model import load_served_model
from milliways.cluster.ingress.worker_metrics import render_metrics
from milliways.cluster.ray.autoscaling import GRPC_CALLS
from milliways.cluster.ray.declaring import declared_now, make_possible
from milliways.cluster.ray.leaving_replica import follow_replica, open_after_leaving_s
from milliways.cluster.ray.serve_loopback import bind_replicas_to_loopback
from milliways.cluster.ray.start_controller import find_controller, find_or_start_controller
from milliways.cluster.settings.config import ClusterConfig
from milliways.cluster.settings.names import changed, flat
from milliways.cluster.settings.sources import gather
from milliways.model.errors import OtherModelError
from milliways.model.manifest import EMPTY_MANIFEST, Manifest, digest_small_files
from milliways.model.model_dir import description_dir, resolve_model_dir
from milliways.model.small_files import SmallFiles
from milliways.wire.errors import ChangeRefusedError, ClusterError, ConfigError, UnavailableError
from milliways.wire.status import GenerationStatus
from milliways.wire.view import EMPTY_VIEW, ClusterView, Declared

logger = logging.getLogger(__name__)

APP_NAME = "milliways"
INGRESS_NAME = "Ingress"
AUTOSCALING_POLICY = "milliways.cluster.ray.autoscaling:replicas_for_requests"
VIEW_TIMEOUT_S = 10.0
# As long as a replica is not healthy: then it tells the controller soon.
STARTING_VIEW_TIMEOUT_S = 1.0
RETRY_S = 0.5
# How long a new replica waits for what workers have read. A controller may have to begin first.
FILES_TIMEOUT_S = 30.0
# How long a replica that leaves tries to say so.
LEAVE_TIMEOUT_S = 2.0
# How long a new replica waits, before its first request, to hear how busy the routers are.
FIRST_LOADS_S = 1.0
# How much later than a replica's own limit Serve kills it.
MARGIN_S = 5.0
# Until one has asked, a dead replica is not replaced.
HEALTH_CHECK_PERIOD_S = 1.0


class Directory:
    """A `RouterDirectory` that follows the controller's view."""

    def __init__(
        self, config: ClusterConfig, declared_at_s: float, files: Manifest = EMPTY_MANIFEST
    ) -> None:
        """`files` has the digests of the files of the model that this replica reads itself."""
        self._config = config
        self._declared = Declared(values=flat(config), at_s=declared_at_s)
        self._view: ClusterView = EMPTY_VIEW
        self._changed = asyncio.Event()
        self._files = files
        # Why requests cannot be served here, whatever the workers do; empty if they can.
        self.obstacle = ""
        self._id = secrets.token_hex(8)
        self._joined = asyncio.Event()
        self._has_left = False
        # Why there are no workers for this replica; None if there are.
        self._refused: str | None = None
        # Whether this replica has ever been healthy. Until then it keeps no generation serving.
        self.is_healthy = False

    @property
    def view(self) -> ClusterView:
        return self._view

    @property
    def weights(self) -> str:
        """The identity of the weights that are served; empty while it is not known."""
        return self._view.manifest.identity if self._view.manifest_is_whole else ""

    def check_model(self) -> None:
        """Raises OtherModelError if this replica has read files of another model than is served."""
        for name in self._view.manifest.differing(self._files):
            wanted = self._view.manifest.digests[name]
            path = description_dir(resolve_model_dir(self._config.model.path)) / name
            raise OtherModelError(path, name, self._files.digests[name], wanted)

    def routers(self) -> Sequence[RouterInfo]:
        is_known = self._view.manifest_is_whole and not self._view.manifest.differing(self._files)
        if self.obstacle or not is_known:
            return []
        return [RouterInfo(m.worker_id, m.router_address) for m in self._view.routers()]

    def controller(self) -> Any:
        """The controller; if there is none, a new one, with the newest settings known here."""
        newest = max(self._declared, self._view.declared, key=lambda declared: declared.at_s)
        return find_or_start_controller(changed(self._config, newest.values), newest.at_s)

    async def changed(self) -> None:
        await self._changed.wait()

    async def joined(self) -> None:
        """Waits until the generation of this replica is complete, if the cluster had another one.

        Raises:
            UnavailableError: there is no such generation; says why.
        """
        await self._joined.wait()
        if self._refused is not None:
            raise UnavailableError(self._refused)

    async def follow(self) -> None:
        """Asks for newer views until the replica leaves; starts a controller if there is none."""
        while not self._has_left:
            try:
                controller = self.controller()
                await controller.begin.remote(self._view)
                await self._declare(controller)
                if not self._joined.is_set():
                    await self._prepare(controller)
                    self._joined.set()
                while not self._has_left:
                    known_epoch, follower = self._view.placement_epoch, self._follower()
                    timeout_s = VIEW_TIMEOUT_S if self.is_healthy else STARTING_VIEW_TIMEOUT_S
                    self._take(await controller.view.remote(known_epoch, timeout_s, follower))
            except RayError as error:
                logger.warning("the controller does not answer: %s", error)
                await asyncio.sleep(RETRY_S)

    async def leave(self) -> None:
        """Tells the controller that this replica needs no worker any more."""
        self._has_left = True
        try:
            async with asyncio.timeout(LEAVE_TIMEOUT_S):
                await find_controller().unfollow.remote(self._id)
        except (RayError, ValueError, TimeoutError) as error:
            logger.info("nobody hears that this replica leaves: %s", error)

    def _follower(self) -> Follower:
        return Follower(
            follower_id=self._id,
            values=self._declared.values,
            generation=self._view.generation,
            is_healthy=self.is_healthy,
        )

    async def _declare(self, controller: Any) -> None:
        """Tells the controller the settings of this replica; it takes them if they are newer."""
        try:
            await controller.declare.remote(self._declared)
        except RayTaskError as error:
            if not isinstance(error.cause, ClusterError):
                raise
            logger.warning("the cluster keeps its settings: %s", error.cause)

    async def _prepare(self, controller: Any) -> None:
        """Has the workers of this replica's generation started, if other ones serve."""
        try:
            while not self._has_left:
                status: GenerationStatus = await controller.prepare.remote(
                    self._declared, VIEW_TIMEOUT_S
                )
                if status.is_complete or status.serves:
                    await self._declare(controller)
                    return
            self._refused = "this replica leaves"
        except RayTaskError as error:
            if not isinstance(error.cause, (ChangeRefusedError, ConfigError)):
                raise
            self._refused = str(error.cause)

    def _take(self, view: ClusterView) -> None:
        differs = other_model(self._declared.values, view.declared.values)
        self.obstacle = f"another model is served: {differs}" if differs else ""
        is_newer = view.placement_epoch > self._view.placement_epoch
        if is_newer or view.generation != self._view.generation:
            self._view = view
            changed, self._changed = self._changed, asyncio.Event()
            changed.set()


@serve.deployment(name=INGRESS_NAME, max_ongoing_requests=512)
@serve.ingress()
class IngressReplica:
    """A replica: HTTP through Serve's proxy, gRPC on a port shared by all replicas of a node."""

    async def __init__(self, config: ClusterConfig, declared_at_s: float = 0.0) -> None:
        bind_replicas_to_loopback()
        self._config = config
        known = await known_files(config, declared_at_s)
        model = load_served_model(config.model, lambda: self._directory.weights, known)
        files = known.manifest if known else read_digests(config)
        self._directory = Directory(config, declared_at_s, files)
        self._follower = asyncio.get_running_loop().create_task(self._directory.follow())
        settings, metrics = config.ingress, IngressMetrics()
        self._source = RouterSource(
            self._directory,
            tls=config.tls,
            hedging=HedgeLimits(
                after_s_min=settings.hedge_after_s_min, after_s_max=settings.hedge_after_s_max
            ),
            on_hedge=metrics.hedges.inc,
        )
        self._source.start()
        self._ingress = Ingress(
            model,
            self._source,
            settings,
            request_timeout_s=config.router.request_timeout_s,
            metrics=metrics,
            obstacle=lambda: self._directory.obstacle,
        )
        self._grpc: IngressGrpcServer | None = None
        self._loop = asyncio.get_running_loop()
        self._starting = self._loop.create_task(self._start())
        self._leaving: asyncio.Task[None] | None = None
        follow_replica(
            on_leaving=lambda: self._loop.call_soon_threadsafe(
                self._leave, settings.grace_s, open_after_leaving_s()
            ),
            num_calls=self._num_calls,
        )

    def __serve_build_asgi_app__(self) -> Any:
        # Serve itself echoes request ids.
        return make_http_app(self._ingress, self._metrics_of_workers, echoes_request_id=False)

    async def check_health(self) -> None:
        """Raises if the replica does not follow the controller any more; Serve then replaces it.

        So it does if the replica has read other files than the workers, or if there are no workers
        of its generation, neither of which it can repair.

        Serve asks for the first time before it sends requests here, and before old replicas leave.
        By then the replica knows how busy the routers are, unless there is no cluster yet.
        """
        await self._starting
        self._directory.check_model()
        if self._directory.obstacle:
            raise UnavailableError(self._directory.obstacle)
        if self._follower.done():
            self._follower.result()
        self._directory.is_healthy = True

    async def record_autoscaling_stats(self) -> dict[str, int]:
        """What Serve's autoscaler does not count itself."""
        return {GRPC_CALLS: self._num_calls()}

    def _num_calls(self) -> int:
        return self._grpc.num_calls if self._grpc is not None else 0

    async def leave(self, grace_s: float) -> None:
        """The whole endpoint stops: refuses what is new; returns when nothing runs any more.

        What still runs after `grace_s` ends with an error that names the cursor for a resume.
        """
        self._ingress.leave("the endpoint is stopping")
        await self._leave(grace_s)

    async def __del__(self) -> None:
        """Serve calls it before it ends the replica, and waits for it."""
        await self._leave(self._config.ingress.grace_s)

    def _leave(self, grace_s: float, open_s: float = 0.0) -> "asyncio.Task[None]":
        """Begins to leave, once. Requests that Serve has sent here already are still taken."""
        if self._leaving is None:
            self._leaving = self._loop.create_task(self._leave_within(grace_s, open_s))
        return self._leaving

    async def _leave_within(self, grace_s: float, open_s: float) -> None:
        await leave(self._ingress, self._grpc, self._source, grace_s, open_s)
        await self._directory.leave()

    async def _start(self) -> None:
        await self._directory.joined()
        try:
            async with asyncio.timeout(FIRST_LOADS_S):
                await self._directory.changed()
                await self._source.first_loads()
        except TimeoutError:
            logger.info("the loads of routers are not known yet")
        settings = self._config.ingress
        # Not earlier: from then on the kernel gives it connections to the shared port.
        self._grpc = IngressGrpcServer(
            self._ingress,
            host=settings.host,
            port=settings.grpc_port,
            tls=self._config.tls,
            # With the other replicas on this node.
            shares_port=True,
        )
        await self._grpc.start()

    async def _metrics_of_workers(self) -> str:
        try:
            status = await self._directory.controller().status.remote()
        except RayError as error:
            logger.warning("no metrics of workers: %s", error)
            return ""
        return render_metrics(status)


async def known_files(config: ClusterConfig, declared_at_s: float) -> SmallFiles | None:
    """The files beside the tensors, as workers with these settings have read them.

    None if no worker has, or if there is no controller to ask: then the replica's own files count.
    """
    try:
        controller = find_or_start_controller(config, declared_at_s)
        async with asyncio.timeout(FILES_TIMEOUT_S):
            await controller.begin.remote()
            return await controller.small_files.remote(flat(config))
    except (RayError, TimeoutError) as error:
        logger.info("what workers have read is not known: %s", error)
        return None


def read_digests(config: ClusterConfig) -> Manifest:
    """The digests of the files beside the tensors that this replica reads itself."""
    return digest_small_files(description_dir(resolve_model_dir(config.model.path)))


def make_app(config: ClusterConfig, declared_at_s: float = 0.0) -> serve.Application:
    """The application of some settings, and when these were declared."""
    settings = config.ingress
    # Serve's own classes have no types.
    deployment: Any = IngressReplica
    return deployment.options(
        max_ongoing_requests=2 * settings.max_ongoing_requests,
        ray_actor_options={"num_cpus": 0.1},
        autoscaling_config={
            "min_replicas": settings.min_replicas,
            "initial_replicas": settings.min_replicas,
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": settings.target_ongoing_requests,
            "policy": {"policy_function": AUTOSCALING_POLICY},
        },
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        # After this time Serve kills the replica. It ends its requests itself before.
        graceful_shutdown_timeout_s=(
            open_after_leaving_s() + settings.grace_s + LAST_ERRORS_S + MARGIN_S
        ),
        graceful_shutdown_wait_loop_s=0.5,
        # A redeploy starts the new replicas before it ends the old ones.
        max_surge_percent=100,
    ).bind(config, declared_at_s)


def app(args: dict[str, Any]) -> serve.Application:
    """The builder that Serve calls with its arguments.

    If the settings need other workers than those that run, it returns when these are complete.

    Raises:
        ConfigError: names the table, field, value and limit that do not fit.
        ChangeRefusedError: the cluster that runs cannot take these settings. Serve then keeps the
            application that it has.
    """
    config = config_from_args(args)
    declared = declared_now(config)
    make_possible(declared)
    return make_app(config, declared.at_s)


# What `serve build` wants: an application with its settings.
default_app = make_app(ClusterConfig())


def config_from_args(args: Mapping[str, Any]) -> ClusterConfig:
    """Settings from Serve's arguments: tables, or YAML text if a command line gave them.

    Variables of the environment in which Serve builds the application override them.
    """
    tree: dict[str, Any] = {}
    for name, value in args.items():
        if name == "config":
            if len(args) > 1:
                raise ConfigError("config", value, "the only argument, the path of a TOML file")
            return gather(file=Path(str(value)), reads_environment=True).config
        tree[name] = yaml.safe_load(value) if isinstance(value, str) else value
    return gather(given=tree, reads_environment=True).config
