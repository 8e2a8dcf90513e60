"""A worker without a model, served over every transport, in a thread or a process of its own.

Its answers can be checked by hand. An expert e returns its row times e + 1. A batch begins at the
experts of its layer, with its tokens and positions as rows, and departs with the sum of their
outputs; at `LOGITS_LAYER` the number of tokens so far is drawn.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from milliways.model.sampling_params import SampledToken
from milliways.runtime.clock import SystemClock
from milliways.runtime.hosted_loop import AsyncioLoop
from milliways.runtime.reactor import Reactor
from milliways.wire.calls import (
    AbandonBatch,
    Abandoned,
    AdvanceBatch,
    BeginBatch,
    BlocksStored,
    Call,
    Departure,
    Drawn,
    ExpertInput,
    ExpertOutputs,
    Fence,
    Refusal,
    Result,
    RunExperts,
    StoreBlocks,
)
from milliways.wire.errors import RefusalReason
from milliways.wire.exchange import ExchangeNode
from milliways.wire.limits import LinkLimits
from milliways.wire.shm import local_host_id
from milliways.wire.tls import TlsSettings
from milliways.wire.transports import AUTO
from milliways.wire.view import Member, WorkerState
from milliways.workers.servers.intake import RouterSessions
from milliways.workers.servers.shm_server import ShmServer
from milliways.workers.servers.worker_server import WorkerServer

WORKER_ID = "echo"
INCARNATION = 7
LOGITS_LAYER = 64
# A call of HELD_LAYER is answered after the next call; a call of LOST_LAYER never.
HELD_LAYER = 1000
LOST_LAYER = 1001
FAULTY_LAYER = 1002


class EchoCore:
    """A worker core whose results can be computed by hand."""

    def __init__(self) -> None:
        self.routers_gone: list[str] = []
        # Copies of all blocks received.
        self.stored: list[StoreBlocks] = []
        self._held: list[Callable[[], None]] = []
        self._num_tokens: dict[int, int] = {}

    def submit(self, call: Call, fence: Fence, reply: Callable[[Result], None]) -> None:
        layer = getattr(call, "layer", 0)
        if layer == LOST_LAYER:
            return
        if layer == FAULTY_LAYER:
            raise RuntimeError("a fault of the core")
        if layer == HELD_LAYER:
            self._held.append(lambda: reply(self._compute(call, fence)))
            return
        reply(self._compute(call, fence))
        held, self._held = self._held, []
        for answer in held:
            answer()

    def router_gone(self, router_id: str) -> None:
        self.routers_gone.append(router_id)

    def _compute(self, call: Call, fence: Fence) -> Result:
        if fence.incarnation != INCARNATION:
            return Refusal(
                RefusalReason.STALE_INCARNATION, "another incarnation", fence.placement_epoch
            )
        match call:
            case RunExperts():
                return ExpertOutputs(expert_outputs(call.rows_TD, call.expert_ids_TA))
            case BeginBatch():
                self._num_tokens[call.batch_id] = call.tokens.num_rows
                return self._begin(call)
            case AdvanceBatch():
                if call.batch_id not in self._num_tokens:
                    return Refusal(RefusalReason.UNKNOWN_BATCH, str(call.batch_id))
                return Departure(np.sum(call.outputs_TAD.astype(np.float32), axis=1))
            case AbandonBatch():
                self._num_tokens.pop(call.batch_id, None)
                return Abandoned()
            case StoreBlocks():
                kept = StoreBlocks(
                    first_layer=call.first_layer,
                    parent=call.parent,
                    token_ids_CP=call.token_ids_CP.copy(),
                    keys_CLPRK=call.keys_CLPRK.copy(),
                    values_CLPRK=call.values_CLPRK.copy(),
                )
                self.stored.append(kept)
                return BlocksStored(len(call.token_ids_CP))

    def _begin(self, call: BeginBatch) -> Result:
        tokens = call.tokens
        if call.layer == LOGITS_LAYER:
            return Drawn(tuple(drawn_token(len(row.token_ids)) for row in tokens.samples))
        rows_TD = np.stack([tokens.token_ids_T, tokens.positions_T], axis=1).astype(np.float32)
        ids_TA = np.stack([tokens.slots_T, tokens.slots_T + 1], axis=1)
        return ExpertInput(call.layer, rows_TD, ids_TA)


def drawn_token(token_id: int) -> SampledToken:
    """The token that the core draws, with this id."""
    return SampledToken(
        token_id=token_id, logprob=-0.5, top_logprobs=((3, -1.5), (4, -2.5)), is_valid=True
    )


def expert_outputs(rows_TD: np.ndarray, expert_ids_TA: np.ndarray) -> np.ndarray:
    """One row for each id that is not -1: the token's row times (id + 1)."""
    rows_T, chosen_A = np.nonzero(expert_ids_TA >= 0)
    factors_N = (expert_ids_TA[rows_T, chosen_A] + 1).astype(rows_TD.dtype)
    return rows_TD[rows_T] * factors_N[:, None]


class EchoServer:
    """Serves the core over all transports, in a reactor's thread."""

    def __init__(
        self,
        *,
        transport: str = AUTO,
        tls: TlsSettings | None = None,
        limits: LinkLimits | None = None,
        node: ExchangeNode | None = None,
    ) -> None:
        self.reactor = Reactor(SystemClock(), make_loop=AsyncioLoop, name="worker")
        self.core = EchoCore()
        self.host_id = local_host_id()
        self.sessions = RouterSessions(self.core)
        self._server = WorkerServer(
            self.reactor,
            self.sessions,
            worker_id=WORKER_ID,
            incarnation=INCARNATION,
            transport=transport,
            tls=tls,
            limits=limits,
            node=node,
        )

    @property
    def shm(self) -> ShmServer:
        server = self._server.transports["shm"]
        assert isinstance(server, ShmServer)
        return server

    def start(self, host: str = "127.0.0.1") -> str:
        """Starts to serve in a thread; returns the address."""
        self.reactor.start()
        return self.reactor.ask(lambda: self._server.start(f"{host}:0"), 10.0)

    def close(self) -> None:
        self.reactor.ask(self._server.stop, 10.0)
        self.reactor.close()


def member_at(address: str) -> Member:
    return Member(
        worker_id=WORKER_ID, incarnation=INCARNATION, address=address, state=WorkerState.READY
    )


@contextmanager
def serving(
    *,
    transport: str = AUTO,
    tls: TlsSettings | None = None,
    limits: LinkLimits | None = None,
    node: ExchangeNode | None = None,
) -> Iterator[tuple[EchoServer, Member]]:
    """A server in a thread, and what a router has to know to reach it."""
    server = EchoServer(transport=transport, tls=tls, limits=limits, node=node)
    host = "localhost" if tls else "127.0.0.1"
    try:
        yield server, member_at(server.start(host))
    finally:
        server.close()


if __name__ == "__main__":
    server = EchoServer()
    print(server.start(), server.host_id, flush=True)
    sys.stdin.read()
