"""Compiled steps of a cluster in one thread (`memory_cluster`): the native side, played by tasks.

`StepExchange`, dispatcher and pipeline are the production code. The native side does what
`exchange.h` says, with the same states: it goes by a plan, sends rows over rings, reports what is
missing, and waits. A call over a ring and its answer are a message each, so that a process can die
before either of them.
"""

import dataclasses
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from milliways.model.config import ModelConfig
from milliways.router.dispatch import Dispatcher
from milliways.router.links.link_table import LinkTable
from milliways.router.step_exchange import StepExchange
from milliways.runtime.tasks import Pending, Signal
from milliways.wire.calls import (
    AbandonBatch,
    Abandoned,
    AdvanceBatch,
    BeginBatch,
    Call,
    ExpertInput,
    ExpertOutputs,
    Fence,
    Refusal,
    Result,
    RunExperts,
)
from milliways.wire.errors import RefusalReason
from milliways.wire.exchange import BY_PYTHON, HERE, CallState, ExchangeShape, Missing, RowsCall
from milliways.workers.call_runner import FencedCall
from milliways.workers.core import WorkerCore

if TYPE_CHECKING:
    from tests.memory_cluster import MemoryLink, Process

DTYPE = np.dtype(np.float32)


@dataclass(slots=True, eq=False)
class _Asked:
    """A call over a ring. `is_answered` is set however late the answer is."""

    link: int
    sequence: int
    places: np.ndarray
    asked_s: float
    state: CallState = CallState.OPEN
    refusal: Refusal | None = None
    is_answered: bool = False


@dataclass(slots=True, eq=False)
class _Layer:
    """A layer while its outputs arrive."""

    given: ExpertInput
    outputs_ND: np.ndarray
    is_filled_N: np.ndarray
    calls: list[_Asked] = field(default_factory=list[_Asked])
    number: int = 0
    is_resumed: bool = False


class MemoryNode:
    """The native side of a router: a `Node` for `StepExchange`.

    Invariant: `_links` has the open links that have a ring.
    """

    def __init__(self, process: "Process", config: ModelConfig) -> None:
        self.shape = ExchangeShape(
            num_layers=config.num_layers,
            num_experts=config.num_experts,
            num_selected=config.num_selected_experts,
            width=config.emb_size,
            item_bytes=DTYPE.itemsize,
        )
        self.given_up = -1
        # Layers that waited for Python, and calls over rings, since the start.
        self.num_missing = self.num_asked = 0
        # Called in a turn of its own, as the router's thread would be woken.
        self.on_missing: Callable[[], None] = lambda: None
        # Set by `attach_exchange`.
        self.own_link: SteppedLink | None = None
        self._process = process
        self._links: dict[int, MemoryLink] = {}
        self._patience_s: dict[int, float] = {}
        self._latencies: dict[int, list[float]] = {}
        self._plan: tuple[int, np.ndarray] | None = None
        self._batch = -1
        self._is_cautious = False
        self._fence: Fence | None = None
        self._missing: _Layer | None = None
        self._num_links = 0
        self._unanswered: dict[int, _Asked] = {}
        self._changed = Signal()

    def open_link(self, link: "MemoryLink") -> int:
        """A ring beside a link that was opened just now."""
        self._num_links += 1
        self._links[self._num_links] = link
        return self._num_links

    def close_link(self, number: int) -> None:
        """Calls in flight are lost."""
        self._links.pop(number, None)
        for asked in [a for a in self._unanswered.values() if a.link == number]:
            del self._unanswered[asked.sequence]
            self._settle(asked, CallState.LOST)

    def set_plan(self, placement_epoch: int, targets_LE: np.ndarray) -> None:
        self._plan = (placement_epoch, targets_LE)

    def set_patience(self, link: int, patience_s: float) -> None:
        self._patience_s[link] = patience_s

    def take_latency(self, link: int) -> tuple[float, int]:
        latencies = self._latencies.pop(link, [])
        return max(latencies, default=0.0), len(latencies)

    def begin(self, batch: int, is_cautious: bool, fence: Fence) -> None:
        self._batch, self._is_cautious, self._fence = batch, is_cautious, fence

    def give_up(self, batch: int) -> None:
        self.given_up = max(self.given_up, batch)
        self._changed.notify()

    def missing(self) -> Missing | None:
        layer = self._missing
        if layer is None:
            return None
        return Missing(
            number=layer.number,
            batch=self._batch,
            layer=layer.given.layer,
            rows_TB=layer.given.rows_TD.copy().view(np.uint8),
            expert_ids_TA=layer.given.expert_ids_TA,
            is_missing_N=~layer.is_filled_N,
            num_calls=len(layer.calls),
        )

    def call(self, number: int, index: int, num_places: int) -> RowsCall | None:
        layer = self._missing
        if layer is None or layer.number != number:
            return None
        asked, refusal = layer.calls[index], layer.calls[index].refusal
        is_answered = asked.state is CallState.ANSWERED
        return RowsCall(
            link=asked.link,
            slot=0,
            sequence=asked.sequence,
            state=asked.state,
            status=refusal.reason.value if refusal is not None else 0,
            placement_epoch=refusal.placement_epoch if refusal is not None else 0,
            waited_s=self._now_s() - asked.asked_s,
            places=asked.places,
            rows_NB=layer.outputs_ND[asked.places].view(np.uint8) if is_answered else None,
        )

    def fill(self, number: int, places: np.ndarray, rows: np.ndarray) -> None:
        layer = self._missing
        if layer is not None and layer.number == number:
            layer.outputs_ND[places] = rows
            layer.is_filled_N[places] = True

    def resume(self, number: int) -> None:
        if self._missing is not None and self._missing.number == number:
            self._missing.is_resumed = True
            self._changed.notify()

    def is_unanswered(self, call: RowsCall) -> bool:
        return call.sequence in self._unanswered

    async def run(self, given: ExpertInput) -> np.ndarray:
        """Outputs [T, A, D] of a layer; anything if the batch is given up."""
        shape = (*given.expert_ids_TA.shape, given.rows_TD.shape[1])
        ids_N = given.expert_ids_TA.reshape(-1)
        layer = _Layer(given, np.zeros((len(ids_N), shape[2]), DTYPE), ids_N < 0)
        if not self._is_given_up():
            self._ask(layer, ids_N)
            await self._wait_for_answers(layer)
        if not layer.is_filled_N.all() and not self._is_given_up():
            await self._wait_for_python(layer)
        return layer.outputs_ND.reshape(shape)

    def _ask(self, layer: _Layer, ids_N: np.ndarray) -> None:
        if self._is_cautious or self._plan is None:
            return
        epoch, targets_LE = self._plan
        targets_N = np.where(ids_N >= 0, targets_LE[layer.given.layer][ids_N], BY_PYTHON)
        for number in np.unique(targets_N[targets_N > HERE]).tolist():
            if number in self._links:
                self._send(layer, number, np.flatnonzero(targets_N == number), epoch)
        own = np.flatnonzero(targets_N == HERE)
        if own.size:
            core, fence = self._process.core, self._fence
            assert core is not None and fence is not None
            (result,) = core.in_steps.run([FencedCall(_rows_of(layer.given, own), fence)])
            if isinstance(result, ExpertOutputs):
                layer.outputs_ND[own] = result.rows_ND
                layer.is_filled_N[own] = True

    def _send(self, layer: _Layer, number: int, places: np.ndarray, epoch: int) -> None:
        link, call = self._links[number], _rows_of(layer.given, places)
        self.num_asked += 1
        asked = _Asked(number, self.num_asked, places, self._now_s())
        layer.calls.append(asked)
        self._unanswered[asked.sequence] = asked
        core = link.server.core
        assert core is not None and self._fence is not None
        fence = dataclasses.replace(
            self._fence, placement_epoch=epoch, incarnation=core.incarnation, timeout_s=0.0
        )

        def serve() -> None:
            result = core.queued.compute_now(call, fence)
            link.back.send(lambda: self._take(layer, asked, result), call)

        link.there.send(serve, call)

    def _take(self, layer: _Layer, asked: _Asked, result: Result) -> None:
        if self._unanswered.pop(asked.sequence, None) is None:
            return
        took_s = self._now_s() - asked.asked_s
        if took_s <= self._patience_s[asked.link]:
            self._latencies.setdefault(asked.link, []).append(took_s)
        if isinstance(result, ExpertOutputs):
            layer.outputs_ND[asked.places] = result.rows_ND
            layer.is_filled_N[asked.places] = True
            self._settle(asked, CallState.ANSWERED)
        else:
            assert isinstance(result, Refusal)
            asked.refusal = result
            self._settle(asked, CallState.REFUSED)

    def _settle(self, asked: _Asked, state: CallState) -> None:
        asked.state = state
        self._changed.notify()
        if self._missing is not None and asked in self._missing.calls:
            self._notify()

    async def _wait_for_answers(self, layer: _Layer) -> None:
        while not self._is_given_up():
            still_open = [asked for asked in layer.calls if asked.state is CallState.OPEN]
            late_s = [a.asked_s + self._patience_s[a.link] for a in still_open]
            if not late_s or min(late_s) <= self._now_s():
                return
            left_s = min(late_s) - self._now_s()
            await self._process.tasks.wait_for(self._changed.wait(), left_s)

    async def _wait_for_python(self, layer: _Layer) -> None:
        self.num_missing += 1
        layer.number, self._missing = self.num_missing, layer
        self._notify()
        while not layer.is_resumed and not self._is_given_up():
            await self._changed.wait()
        self._missing = None

    def _notify(self) -> None:
        self._process.tasks.call_later(0.0, lambda: self.on_missing())

    def _is_given_up(self) -> bool:
        return self.given_up >= self._batch

    def _now_s(self) -> float:
        return self._process.tasks.clock.now_s()


class SteppedLink:
    """A link to the core of the same process, whose attention computes compiled steps.

    One after the other, as the thread of steps does; the router goes on meanwhile.
    """

    transport = "direct"
    is_local = True
    exchange_link = 0

    def __init__(self, core: WorkerCore, node: MemoryNode, exchange: StepExchange) -> None:
        self._core = core
        self._node = node
        self._exchange = exchange
        self._waiting: deque[tuple[BeginBatch, Fence, bool, Pending[Result]]] = deque()
        self._arrived = Signal()

    def ask(self, call: Call, fence: Fence) -> Pending[Result]:
        answer: Pending[Result] = Pending()
        if isinstance(call, BeginBatch):
            self._waiting.append((call, fence, self._exchange.is_cautious, answer))
            self._arrived.notify()
        elif isinstance(call, AbandonBatch):
            self._node.give_up(call.batch_id)
            answer.resolve(Abandoned())
        else:
            answer.resolve(self._core.direct.compute_now(call, fence))
        return answer

    def close(self) -> None:
        pass

    async def serve(self) -> None:
        """Computes steps, for ever."""
        while True:
            while self._waiting:
                call, fence, is_cautious, answer = self._waiting.popleft()
                answer.resolve(await self._compute(call, fence, is_cautious))
            await self._arrived.wait()

    async def _compute(self, call: BeginBatch, fence: Fence, is_cautious: bool) -> Result:
        expired = Refusal(RefusalReason.EXPIRED, "the batch was given up")
        if self._node.given_up >= call.batch_id:
            return expired
        self._node.begin(call.batch_id, is_cautious, fence)
        turn = self._core.direct.compute_now(call, fence)
        while isinstance(turn, ExpertInput):
            outputs_TAD = await self._node.run(turn)
            advance = AdvanceBatch(call.batch_id, turn.layer, outputs_TAD)
            # Within a program no fence is looked at.
            (turn,) = self._core.direct.run([FencedCall(advance, fence)])
        return expired if self._node.given_up >= call.batch_id else turn


def attach_exchange(
    process: "Process", links: LinkTable, dispatcher: Dispatcher, config: ModelConfig
) -> StepExchange:
    """Makes the router of a process compute compiled steps, in two services."""
    assert process.core is not None
    node = process.node = MemoryNode(process, config)
    exchange = StepExchange(node, links, dispatcher, process.tasks, DTYPE)
    node.on_missing = exchange.look
    node.own_link = SteppedLink(process.core, node, exchange)
    process.tasks.start_service(exchange.serve())
    process.tasks.start_service(node.own_link.serve())
    return exchange


def own_link(process: "Process") -> SteppedLink | None:
    """The link of a router to its own worker, if it computes compiled steps."""
    return process.node.own_link if process.node is not None else None


def _rows_of(given: ExpertInput, places: np.ndarray) -> RunExperts:
    num_selected = given.expert_ids_TA.shape[1]
    rows = np.unique(places // num_selected)
    is_wanted_N = np.zeros(given.expert_ids_TA.size, bool)
    is_wanted_N[places] = True
    ids_TA = np.where(is_wanted_N.reshape(-1, num_selected), given.expert_ids_TA, -1)
    return RunExperts(given.layer, given.rows_TD[rows], ids_TA[rows].astype(np.int32))
