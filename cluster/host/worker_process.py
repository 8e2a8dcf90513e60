"""Builds and connects the parts of a worker: core, shards, router and servers, on two threads.

    compute thread   the core: experts and attention for routers of other processes
    router thread    sequences and steps; calls the shards of this process directly

What belongs to which thread, and what may cross: docs/ARCHITECTURE.md, Threads.

Order of calls: `start` opens the servers, while the core still refuses all calls. `load` reads
shards and makes the worker READY. `publish` gives the router a view of the cluster. `fence` makes
the core refuse calls that act on an older placement. All of these are called from other threads;
they change the core and the router only through the reactors.
"""

import dataclasses
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random

import jax
import jax.numpy as jnp

from milliways.cluster.control.fleet import Existing, Loaded, Spawned
from milliways.cluster.host.local_calls import LocalBlocks, LocalCore
from milliways.cluster.host.local_steps import LocalSteps
from milliways.cluster.host.model_bytes import checkpoint_bytes, kv_tokens_of
from milliways.cluster.host.model_files import ModelFiles
from milliways.cluster.host.peer_parts import PeerParts
from milliways.cluster.host.rates import Rates
from milliways.cluster.host.router_limits import (
    dispatch_limits,
    router_limits,
    with_live_settings,
)
from milliways.cluster.host.shard_settings import cache_size_of, detokenizer_for, kernels_of
from milliways.cluster.settings.config import ClusterConfig
from milliways.cluster.settings.names import flat
from milliways.model.block_pool import BlockPool
from milliways.model.decoder import Decoder
from milliways.model.manifest import EMPTY_MANIFEST, Manifest
from milliways.model.ops.select import select_ops
from milliways.model.small_files import SmallFiles
from milliways.router.block_copies import BlockArrays
from milliways.router.dispatch import Dispatcher
from milliways.router.links.connect import Connector
from milliways.router.links.direct_link import DirectLink
from milliways.router.links.link_table import LinkTable
from milliways.router.pipeline import Pipeline
from milliways.router.requests.admission import RoutedRequest
from milliways.router.router import Listener, Router
from milliways.router.server import RouterServer
from milliways.router.standby import StandbyFigures
from milliways.router.step_exchange import StepExchange
from milliways.runtime.clock import SystemClock
from milliways.runtime.hosted_loop import AsyncioLoop
from milliways.runtime.malloc import keep_freed_blocks
from milliways.runtime.reactor import Reactor
from milliways.runtime.tasks import Pending
from milliways.wire.addresses import join_address
from milliways.wire.exchange import ExchangeNode
from milliways.wire.limits import LinkLimits
from milliways.wire.links import WorkerLink
from milliways.wire.placement import ExpertId, ModelBytes, ShardPlan
from milliways.wire.shm import local_host_id
from milliways.wire.status import DispatchStatus, ProcessStatus, RouterStatus
from milliways.wire.view import ClusterView, Member, WorkerState
from milliways.workers.attention import AttentionShard
from milliways.workers.call_runner import SteppedAttention
from milliways.workers.core import WorkerCore
from milliways.workers.devices import Device, LocalDevices, find_devices
from milliways.workers.experts import ExpertShard
from milliways.workers.held_parts import HeldParts
from milliways.workers.loading import ShardLoader, shares_now
from milliways.workers.native_experts import give_experts, give_fence, make_node
from milliways.workers.servers.intake import RouterSessions
from milliways.workers.servers.reply_dropper import ReplyDropper
from milliways.workers.servers.worker_server import WorkerServer
from milliways.workers.spreading import DeviceShare, PartBytes
from milliways.workers.warm_up import warm_up

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 5.0
DROP_TIMEOUT_S = 5.0
DROP_POLL_S = 0.01
Fault = Callable[[BaseException], None]


@dataclass(slots=True)
class LoadProgress:
    """Bytes of the checkpoint read so far, and bytes to read in all. Other threads may read it."""

    bytes_read: int = 0
    bytes_wanted: int = 0


class WorkerProcess:
    """Owns everything of one incarnation of a worker.

    Its own two threads must not call it, because it waits for them. Any other thread may.

    `memory_bytes` limits the memory of all its devices together; 0 means no limit. `devices` are
    the devices that it computes on; by default it finds as many as the settings say. `sizes` are
    those of the model's parts; by default all files are scanned for them. `small_files` are those
    of the model, if other workers have read them.

    Invariant: once set, `_attention` is never replaced. Only the thread that calls `load` uses it
    until `_hand_over_attention` gives it to another thread; then only that thread uses it.
    """

    def __init__(
        self,
        config: ClusterConfig,
        worker_id: str,
        incarnation: int,
        host: str,
        on_fault: Fault,
        memory_bytes: int = 0,
        devices: Sequence[Device] | None = None,
        sizes: ModelBytes | None = None,
        small_files: SmallFiles | None = None,
    ) -> None:
        self.worker_id = worker_id
        self.incarnation = incarnation
        self.progress = LoadProgress()
        self._config = config
        self._host = host
        keep_freed_blocks()
        # Otherwise XLA would run each small program in another thread, and this one would wait.
        jax.config.update("jax_cpu_enable_async_dispatch", False)  # pyright: ignore[reportUnknownMemberType]
        self._files = ModelFiles(config.model.path, small_files)
        model = self._files.config
        self._cache_size = cache_size_of(config, model)
        ops, loader = select_ops(kernels_of(config))
        self._decoder = Decoder(config=model, dtype=jnp.dtype(config.model.dtype), ops=ops)
        sizes = sizes or checkpoint_bytes(self._files.checkpoint, self._decoder.dtype.itemsize)
        self._local = LocalDevices(
            devices=tuple(devices or find_devices(config.workers.gpus_each)),
            parts=PartBytes.of(sizes, kv_tokens_of(config.workers, model.sequence_len)),
            memory_bytes=memory_bytes,
        )
        self._loader = ShardLoader(
            self._files.tensors, self._decoder, loader, self._note_read, self._local
        )
        self._node = make_node(
            self._decoder, loader, self._local.devices, config.router.max_step_tokens
        )
        self._experts = ExpertShard(
            self._decoder, len(self._local.devices) > 1, partial(give_experts, self._node)
        )
        self._attention: AttentionShard | None = None
        self._held_parts = HeldParts(model, self._experts, lambda: self._attention)
        self._shards: ShardPlan | None = None
        # Held by `load`, which sets `_shards` and `_attention`: one load at a time.
        self._loading = threading.Lock()
        # Held by `drop_replies`: one call at a time.
        self._dropping = threading.Lock()
        self._rates = Rates()
        clock = SystemClock()
        self._compute = Reactor(
            clock, make_loop=AsyncioLoop, on_fault=on_fault, name=f"{worker_id}-compute"
        )
        self._routing = Reactor(
            clock, make_loop=AsyncioLoop, on_fault=on_fault, name=f"{worker_id}-router"
        )
        self._core = WorkerCore(worker_id, incarnation, self._experts, None, self._compute.tasks)
        self._core.fence.on_change = partial(give_fence, self._node, self._core.fence)
        self._steps = (
            LocalSteps(self._node, self._core, self._routing, on_fault)
            if self._node is not None
            else None
        )
        self._router, self._links = self._make_router()
        if config.workers.kv_standby:
            own_blocks = LocalBlocks(self._router, self._compute, self._routing)
            self._core.attach_copies(own_blocks.keep)

    def start(self) -> Spawned:
        """Opens the servers; returns their addresses."""
        self._compute.start()
        self._routing.start()
        address, router_address = self._start_servers()
        self._compute.call(lambda: self._compute.tasks.start_service(self._core.serve()))
        self._routing.call(lambda: self._routing.tasks.start_service(self._router.serve()))
        return Spawned(
            address=address,
            router_address=router_address,
            node_id="",
            pid=os.getpid(),
            memory_bytes=self._local.plannable_bytes,
        )

    def load(
        self,
        shards: ShardPlan,
        bytes_wanted: int = 0,
        wanted: Manifest = EMPTY_MANIFEST,
        peers: Sequence[Member] = (),
    ) -> Loaded:
        """Reads the parts of the shards that are missing here, then makes the core READY.

        This may take minutes. `wanted` has the digests of the parts that are known already; the
        result has those of all that was ever loaded here. A part whose file cannot be read comes
        from one of the `peers` that hold it. What was loaded before an error is kept.

        Raises:
            CheckpointError: a file cannot be read, or its bytes are not the wanted ones.
            PlacementError: a device has too little memory for its part of the shards.
            StartupError: what this process has read before is of another model: it must end.
        """
        with self._loading:
            self.progress.bytes_wanted = bytes_wanted
            others = PeerParts(peers, self._config.tls, Random())
            self._files.expect(wanted, others.fetch)
            if self._shards is None and self._attention is None:
                self._local.check(shards)
                self._attention = self._loader.load_attention(
                    shards, self._experts, self._cache_size, self._node
                )
            missing = shards.experts - self._experts.held
            is_ready = self._core.state is not WorkerState.LOADING
            for layer, groups in self._loader.load_experts(missing, self._shares_now(), is_ready):
                self._compute.call(lambda to=layer, new=groups: self._experts.add(to, new))
            self._shards = shards
            if self._core.state is WorkerState.LOADING:
                self._warm_up()
                self._hand_over_attention()
                self._compute.call(lambda: self._core.fence.move(WorkerState.READY))
            files = self._files
            return Loaded(files.loaded, tuple(files.faults), files.small_files)

    def _hand_over_attention(self) -> None:
        """Gives the attention shard to the one thread that uses it from now on.

        A router runs in the process that has the output head of its chain of shards. If this shard
        has the head, this process's router calls it, in the router thread. Otherwise routers of
        other processes call it, through the compute thread.
        """
        if self._attention is None:
            return
        shard = SteppedAttention(self._attention)
        if self._attention.has_ends and self._steps is not None:
            self._steps.take_shard(shard, self._attention.has_exchange)
        elif self._attention.has_ends:
            self._routing.call(lambda: self._core.direct.attach(shard))
        else:
            self._compute.call(lambda: self._core.queued.attach(shard))

    def _kv_now(self) -> BlockArrays | None:
        """The arrays that the router's block ids index; None if this process does not have them."""
        shard = self._attention
        if shard is None or not shard.has_ends:
            return None
        return self._steps.blocks_of(shard.kv) if self._steps is not None else shard.kv

    def _shares_now(self) -> list[DeviceShare]:
        return shares_now(self._local, self._attention, self._experts)

    def _warm_up(self) -> None:
        if not self._config.workers.warm_up:
            return
        started_s = time.monotonic()
        warm_up(
            self._decoder,
            self._attention,
            self._experts,
            self._local.devices,
            self._config.router.max_step_tokens,
            self._core.max_merged_rows,
            copies_blocks=self._config.workers.kv_standby,
        )
        logger.info("%s: warm in %.1f s", self.worker_id, time.monotonic() - started_s)

    def unload(self, kept: frozenset[ExpertId]) -> None:
        """Drops the experts of each group that has none of `kept`.

        The caller makes sure that routers know not to ask for experts outside `kept`.
        """
        self._compute.call(lambda: self._experts.keep_only(kept))

    def publish(self, view: ClusterView) -> None:
        """Gives the router a view, and the limits that are declared in it."""
        config = with_live_settings(self._config, view.declared.values)

        def take() -> None:
            if config != self._config:
                self._take_limits(config)
            self._links.update(view)
            self._router.chain_changed()

        self._routing.call(take)

    def _take_limits(self, config: ClusterConfig) -> None:
        self._config, settings = config, config.router
        self._router.take_limits(router_limits(settings))
        self._dispatcher.limits = dispatch_limits(settings)
        self._pipeline.timeout_s = settings.step_timeout_s
        self._router_server.request_timeout_s = settings.request_timeout_s

    def fence(self, placement_epoch: int) -> None:
        """Makes the core refuse calls that act on an older placement."""
        self._compute.call(lambda: self._core.fence.raise_epoch(placement_epoch))

    def drain(self) -> None:
        """Makes a READY core DRAINING, and the router hand its requests over to other routers."""
        self._compute.call(self._begin_to_drain)
        self._routing.call(self._router.drain)

    def drop_replies(self, count: int) -> int:
        """Drops the replies to the next `count` calls of other processes: a fault for tests.

        Waits at most DROP_TIMEOUT_S for these calls; returns how many replies were dropped.
        """
        with self._dropping:
            dropper = ReplyDropper(self._sessions, count, self._rings())
            until_s = time.monotonic() + DROP_TIMEOUT_S
            self._compute.call(dropper.install)
            while dropper.num_left and time.monotonic() < until_s:
                time.sleep(DROP_POLL_S)
            return count - self._compute.call(dropper.remove)

    def _rings(self) -> ExchangeNode | None:
        """The node, if routers of other processes call experts through it."""
        return self._node if self._node is not None and self._node.num_rings else None

    def submit(self, routed: RoutedRequest, listener: Listener) -> None:
        """Gives the router a request without gRPC. The listener is called in the router thread.

        Raises:
            ClusterError, InvalidRequestError: the request is not admitted; the error says why.
        """
        self._routing.call(lambda: self._router.submit(routed, listener))

    def stop(self) -> None:
        """Stops the servers and ends the threads."""
        self._routing.ask(self._router_server.stop, STOP_TIMEOUT_S)
        self._compute.ask(self._server.stop, STOP_TIMEOUT_S)
        if self._steps is not None:
            self._steps.close()
        for reactor in (self._routing, self._compute):
            reactor.close()
        if self._node is not None:
            self._node.close()
        self._files.close()

    def describe(self, spawned: Spawned) -> Existing | None:
        """All that a new controller must know of this worker; None if it must be replaced."""
        shards = self._shards
        if self._core.state is not WorkerState.READY or shards is None:
            return None
        # These values are replaced as a whole, so they can be read without waiting for the threads
        # that replace them.
        view, held = self._links.view, self._experts.held
        return Existing(
            worker_id=self.worker_id,
            incarnation=self.incarnation,
            spawned=spawned,
            shards=dataclasses.replace(shards, experts=held),
            held=held,
            view=view,
            manifest=self._files.loaded,
            small_files=self._files.small_files,
            settings=flat(self._config),
        )

    def status(self) -> ProcessStatus:
        """What `milliways status` shows of this worker."""
        router = self._routing.call(self._router_status)
        return self._compute.call(lambda: self._status(router))

    def _begin_to_drain(self) -> None:
        if self._core.state is WorkerState.READY:
            self._core.fence.move(WorkerState.DRAINING)

    def _status(self, router: RouterStatus) -> ProcessStatus:
        shards, core = self._shards, self._core
        exchanged = self._node.counts() if self._node is not None else (0, 0, 0)
        return ProcessStatus(
            placement_epoch=core.fence.placement_epoch,
            layers=(shards.first_layer, shards.num_layers) if shards else (0, 0),
            has_ends=bool(shards and shards.has_ends),
            num_experts=len(self._experts.held),
            devices=self._local.status(self._shares_now()),
            bytes_read=self._loader.bytes_read,
            bytes_wanted=self.progress.bytes_wanted,
            calls=core.num_calls + exchanged[0],
            merged_calls=core.num_merged_calls + exchanged[1],
            rows=core.num_rows + exchanged[2],
            waiting_calls=core.num_waiting,
            router=router,
        )

    def _router_status(self) -> RouterStatus:
        router, scheduler, dispatcher = self._router, self._router.scheduler, self._dispatcher
        figures, copies = router.figures, router.copies
        copied = copies.standby.figures if copies is not None else StandbyFigures()
        return RouterStatus(
            requests=figures.num_requests,
            tokens=figures.num_tokens,
            tokens_per_s=round(self._rates.per_s(figures.num_tokens), 2),
            positions=figures.num_positions,
            steps=figures.num_steps,
            replays=figures.num_replays,
            active_requests=router.num_active,
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            placement_epoch=self._links.view.placement_epoch,
            kv_blocks_used=scheduler.pool.num_held,
            kv_blocks_total=scheduler.pool.num_blocks,
            transports=self._links.transports(),
            dispatch=DispatchStatus(
                resent_rows=dispatcher.num_resent,
                hedged_calls=dispatcher.num_hedged,
                parked=dispatcher.num_parked,
            ),
            standby=router.standby_id,
            standby_blocks_copied=copied.num_copied,
            standby_bytes_copied=copied.num_copied_bytes,
            standby_blocks_dropped=copied.num_dropped,
            standby_blocks_kept=copies.num_kept if copies is not None else 0,
        )

    def _start_servers(self) -> tuple[str, str]:
        tls = self._config.tls
        self._sessions = RouterSessions(self._core)
        self._server = WorkerServer(
            self._compute,
            self._sessions,
            worker_id=self.worker_id,
            incarnation=self.incarnation,
            transport=self._config.workers.transport,
            tls=tls,
            read_held=self._held_parts.read,
            node=self._node,
        )
        self._router_server = RouterServer(
            self._routing,
            self._router,
            request_timeout_s=self._config.router.request_timeout_s,
            tls=tls,
        )
        any_port = join_address(self._host, 0)
        return (
            self._compute.ask(lambda: self._server.start(any_port), START_TIMEOUT_S),
            self._routing.ask(lambda: self._router_server.start(any_port), START_TIMEOUT_S),
        )

    def _make_router(self) -> tuple[Router, LinkTable]:
        settings, tasks = self._config.router, self._routing.tasks
        model = self._files.config
        connector = Connector(
            self._routing,
            router_id=self.worker_id,
            host_id=local_host_id(),
            wanted=self._config.workers.transport,
            tls=self._config.tls,
            limits=LinkLimits(),
            node=self._node,
        )

        own_core = LocalCore(self._core, self._compute, self._routing, self._steps)

        def connect(member: Member) -> Pending[WorkerLink]:
            if member.worker_id != self.worker_id:
                return connector.connect(member)
            opened: Pending[WorkerLink] = Pending()
            opened.resolve(DirectLink(self.worker_id, own_core, self.worker_id))
            return opened

        links = LinkTable(self.worker_id, self.incarnation, connect, tasks)
        self._dispatcher = Dispatcher(links, dispatch_limits(settings), tasks)
        exchange = None
        if self._node is not None and self._steps is not None:
            exchange = StepExchange(self._node, links, self._dispatcher, tasks, self._decoder.dtype)
            self._steps.attach(exchange)
        self._pipeline = Pipeline(
            model.num_layers, links, self._dispatcher, tasks, settings.step_timeout_s, exchange
        )
        pool = BlockPool(self._cache_size.num_blocks, self._cache_size.block_size)
        router = Router(
            model,
            pool,
            router_limits(settings),
            links,
            self._pipeline,
            lambda request: detokenizer_for(self._files.tokenizer, request),
            tasks,
            self._kv_now if self._config.workers.kv_standby else None,
        )
        return router, links

    def _note_read(self, bytes_read: int) -> None:
        self.progress.bytes_read = bytes_read
