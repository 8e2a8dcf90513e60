"""Two nodes of an exchange in this process: a router's and a worker's, for tests."""

import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from milliways.model.checkpoint import Checkpoint
from milliways.model.decoder import Decoder
from milliways.model.ops import native
from milliways.model.params import load_experts
from milliways.wire.calls import RunExperts
from milliways.wire.exchange import BY_PYTHON, HERE, CallState, ExchangeNode, Missing
from milliways.wire.shm import make_file
from milliways.workers.experts import ExpertGroup, ExpertShard
from milliways.workers.native_experts import exchange_shape, give_experts
from tests.runners import kernels_of

LAYER = 1
NEAR, FAR = (0, 1, 2, 3), (4, 5, 6, 7)
INCARNATION, EPOCH = 3, 5
TIMEOUT_S = 20.0
T = TypeVar("T")
PATIENCE_S = 5.0
MAX_ROWS = 32


@jax.jit
def exchange(rows_TD: jax.Array, ids_TA: jax.Array, where_2: jax.Array) -> jax.Array:
    return native.exchange(rows_TD, ids_TA, where_2, 0)


class Side:
    """A worker's experts of one layer, for native threads, and as JAX computes them."""

    def __init__(
        self, model_dir: Path, dtype: str, expert_ids: Sequence[int], max_rows: int = MAX_ROWS
    ) -> None:
        ops, loader = kernels_of("native")
        with Checkpoint.open(model_dir) as checkpoint:
            decoder = Decoder(config=checkpoint.config, dtype=jnp.dtype(dtype), ops=ops)
            self.node = ExchangeNode(exchange_shape(decoder), max_rows, 1 << 26)
            self.shard = ExpertShard(
                decoder, on_change=lambda groups: give_experts(self.node, groups)
            )
            params = load_experts(checkpoint, LAYER, loader, list(expert_ids))
        self.shard.add(LAYER, [ExpertGroup(tuple(expert_ids), params, jax.devices()[0])])
        self.node.set_fence(EPOCH, INCARNATION, True)


class Pair:
    """A router and a worker that share a ring."""

    def __init__(
        self,
        model_dir: Path,
        dtype: str = "float32",
        *,
        serves: bool = True,
        max_rows: int = MAX_ROWS,
    ) -> None:
        self.router = Side(model_dir, dtype, NEAR, max_rows)
        self.worker = Side(model_dir, dtype, FAR, max_rows)
        self.dtype = np.dtype(jnp.dtype(dtype))
        self.num_selected = self.router.node.shape.num_selected
        self.width = self.router.node.shape.width
        self.ring_fd = make_file(self.router.node.ring_shape.num_bytes)
        self.ring = 0
        self.link = self.connect()
        if serves:
            self.serve()
        self.router.node.set_patience(self.link, PATIENCE_S)
        self.plan(HERE, self.link)
        self._num_batches = 0

    def connect(self) -> int:
        """Opens the router's end of the ring."""
        return self.router.node.open_link(self.ring_fd, self.worker.node.bell_fd, INCARNATION)

    def serve(self) -> None:
        """The worker takes calls off the ring from now on."""
        node = self.router.node
        self.ring = self.worker.node.attach(self.ring_fd, node.bell_fd, node.ring_shape)

    def plan(self, near: int, far: int, epoch: int = EPOCH) -> None:
        shape = self.router.node.shape
        targets_LE = np.full((shape.num_layers, shape.num_experts), BY_PYTHON, np.int64)
        targets_LE[:, list(NEAR)], targets_LE[:, list(FAR)] = near, far
        self.router.node.set_plan(epoch, targets_LE)

    def rows(self, num_rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Rows, and ids of experts of both sides; some places have no expert."""
        rng = np.random.default_rng(seed)
        rows_TD = rng.standard_normal((num_rows, self.width)).astype(self.dtype)
        ids_TA = np.stack(
            [rng.permutation(len(NEAR) + len(FAR))[: self.num_selected] for _ in range(num_rows)]
        ).astype(np.int32)
        ids_TA[rng.random(ids_TA.shape) < 0.2] = -1
        ids_TA[0, :2] = (FAR[0], NEAR[0])
        return rows_TD, ids_TA

    def expected(self, rows_TD: np.ndarray, ids_TA: np.ndarray) -> np.ndarray:
        """As JAX computes them."""
        outputs = np.zeros((*ids_TA.shape, self.width), self.dtype)
        for side, held in ((self.router, NEAR), (self.worker, FAR)):
            its_ids_TA = np.where(np.isin(ids_TA, held), ids_TA, -1)
            if (its_ids_TA >= 0).any():
                outputs[its_ids_TA >= 0] = side.shard.run(RunExperts(LAYER, rows_TD, its_ids_TA))
        return outputs

    def begin(self, rows_TD: np.ndarray, ids_TA: np.ndarray, *, is_cautious: bool = False) -> "Run":
        self._num_batches += 1
        self.router.node.begin(self._num_batches, is_cautious)
        return Run(self, self._num_batches, rows_TD, ids_TA)

    def complete(self, missing: Missing, outputs_TAD: np.ndarray) -> None:
        """Fills what is missing, as Python does, and lets the layer go on."""
        places = np.flatnonzero(missing.is_missing_N)
        self.router.node.fill(missing.number, places, outputs_TAD.reshape(-1, self.width)[places])
        self.router.node.resume(missing.number)

    def give_up(self, run: "Run") -> None:
        """Gives a batch up, and waits for its end."""
        self.router.node.give_up(run.batch)
        run.outputs()

    def close(self) -> None:
        self.router.node.close()
        self.worker.node.close()
        os.close(self.ring_fd)


class Run:
    """A compiled exchange in a thread, as in a step."""

    def __init__(self, pair: Pair, batch: int, rows_TD: np.ndarray, ids_TA: np.ndarray) -> None:
        self.batch = batch
        self._node = pair.router.node
        self._outputs: np.ndarray | None = None
        where_2 = np.array((self._node.number, LAYER), np.int32)

        def compute() -> None:
            self._outputs = np.asarray(exchange(rows_TD, ids_TA, where_2))

        self._thread = threading.Thread(target=compute, daemon=True)
        self._thread.start()

    def outputs(self) -> np.ndarray:
        self._thread.join(TIMEOUT_S)
        assert self._outputs is not None, "the exchange does not end"
        return self._outputs

    def missing(self) -> Missing:
        """Waits until Python is asked."""
        return until(self._node.missing)

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()


def until(look: Callable[[], T | None]) -> T:
    until_s = time.monotonic() + TIMEOUT_S
    while time.monotonic() < until_s:
        found = look()
        if found is not None:
            return found
        time.sleep(0.002)
    raise TimeoutError


def the_call(pair: Pair, missing: Missing, state: CallState) -> None:
    """Waits until the only call of a missing layer is in a state."""

    def look() -> bool | None:
        call = pair.router.node.call(missing.number, 0, missing.is_missing_N.size)
        return True if call is not None and call.state is state else None

    assert missing.num_calls == 1
    until(look)
