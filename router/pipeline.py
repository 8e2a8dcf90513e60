"""Takes a micro-batch through attention shards and experts, layer by layer, to its next tokens.

The bits do not depend on which process computes a part, nor on which replica answers.
"""

from collections.abc import Sequence

from milliways.model.sampling_params import SampledToken
from milliways.router.dispatch import Dispatcher
from milliways.router.links.link_table import LinkTable
from milliways.router.step_exchange import StepExchange
from milliways.runtime.tasks import Cancelled, Pending, Tasks
from milliways.wire.calls import (
    AbandonBatch,
    AdvanceBatch,
    BeginBatch,
    Call,
    Departure,
    Drawn,
    ExpertInput,
    Refusal,
    Result,
    TokenRows,
    Turn,
)
from milliways.wire.errors import (
    ClusterError,
    PeerError,
    PeerLostError,
    PeerSilentError,
    RefusalReason,
    RefusedError,
)
from milliways.wire.view import Member

BACK_OFF_S = 0.005
# These reasons are temporary: the same call is sent again.
_TEMPORARY = (RefusalReason.OVERLOADED, RefusalReason.STALE_EPOCH)


class ShardLostError(ClusterError):
    """An attention shard of the chain is gone; its keys and values have to be computed again."""

    def __init__(self, cause: PeerError) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Pipeline:
    """Owns the path of a router's micro-batches through the attention shards of its chain.

    `chain` may change at any time; a micro-batch that began goes on with the chain of its start.
    With an `exchange`, a shard of this process that has all layers computes them in one turn, and
    the exchange sends rows to experts.
    """

    def __init__(
        self,
        num_layers: int,
        links: LinkTable,
        dispatcher: Dispatcher,
        tasks: Tasks,
        timeout_s: float,
        exchange: StepExchange | None = None,
    ) -> None:
        self.chain: Sequence[Member] = ()
        self._num_layers = num_layers
        self._links = links
        self._dispatcher = dispatcher
        self._tasks = tasks
        self.timeout_s = timeout_s
        self._exchange = exchange

    @property
    def computes_at_once(self) -> bool:
        """Whether a step is one turn, so that several micro-batches would only wait in line."""
        return self._exchange_of(self.chain) is not None

    def _exchange_of(self, chain: Sequence[Member]) -> StepExchange | None:
        is_here = len(chain) == 1 and chain[0].worker_id == self._links.router_id
        return self._exchange if is_here else None

    def obstacle(self) -> str:
        """The reason why no step can be finished now; empty if no reason is known."""
        unreachable = [m.worker_id for m in self.chain if not self._links.is_open(m.worker_id)]
        if not self.chain:
            return "there is no attention shard"
        if unreachable:
            return f"no connection to the attention shards of {', '.join(unreachable)}"
        return "no worker holds experts that are needed" if self._dispatcher.is_parked else ""

    @property
    def is_whole(self) -> bool:
        """Whether the chain has all layers and the ends. It may not, while a cluster starts."""
        layer = 0
        for member in self.chain:
            if member.num_layers and member.first_layer == layer:
                layer += member.num_layers
        return layer == self._num_layers and any(member.has_ends for member in self.chain)

    async def run(
        self, step: int, batch_id: int, tokens: TokenRows, caution_s: float | None = None
    ) -> tuple[SampledToken, ...]:
        """The tokens drawn at the end of all layers, one for each sample.

        `caution_s` is that of `Dispatcher.run_experts`.

        Raises:
            ShardLostError: keys and values are lost.
            RefusedError: workers failed to compute it several times.
            RowsKilledWorkersError: workers died of it.
        """
        # Kept to the end: with a new chain, keys and values are lost, so the next step takes it.
        chain = self.chain
        shard, call = self._shard_at(chain, 0), BeginBatch(batch_id, 0, tokens)
        exchange, failure, is_done = self._exchange_of(chain), None, False
        if exchange is not None:
            failure = exchange.begin(step, batch_id, caution_s)
        try:
            while True:
                turn = await self._ask(shard, step, call, failure)
                while isinstance(turn, ExpertInput):
                    outputs_TAD = await self._dispatcher.run_experts(step, turn, caution_s)
                    turn = await self._ask(
                        shard, step, AdvanceBatch(batch_id, turn.layer, outputs_TAD), failure
                    )
                if isinstance(turn, Drawn):
                    _check_drawn(shard, turn, tokens)
                    is_done = True
                    return turn.tokens
                layer = shard.first_layer + shard.num_layers
                if layer == self._num_layers and not tokens.samples:
                    is_done = True
                    return ()
                shard = self._shard_at(chain, layer)
                call = BeginBatch(batch_id, layer, tokens, turn.hidden_TD)
        except (Cancelled, ClusterError):
            self._links.ask(
                shard.worker_id, AbandonBatch(batch_id), step=step, timeout_s=self.timeout_s
            )
            raise
        finally:
            if exchange is not None:
                exchange.end(batch_id, is_done=is_done)

    def _shard_at(self, chain: Sequence[Member], layer: int) -> Member:
        """The shard that begins with a layer; after the last one, that with the output head."""
        for member in chain:
            is_end = layer == self._num_layers and member.has_ends
            if is_end or (member.first_layer == layer and member.num_layers):
                return member
        raise ShardLostError(PeerLostError("nobody", f"holds attention from layer {layer} on"))

    async def _ask(
        self, shard: Member, step: int, call: Call, failure: Pending[None] | None
    ) -> Turn:
        """One turn of a shard. No other worker has this shard: without a reply it is lost.

        A `failure` is that of the exchange: its error is raised.
        """
        while True:
            if failure is not None:
                result = await self._answer_at_once(shard, step, call, failure)
            else:
                result = await self._answer(shard, step, call)
            if not isinstance(result, Refusal):
                assert isinstance(result, ExpertInput | Departure | Drawn)
                return result
            if result.reason not in _TEMPORARY:
                refused = RefusedError(shard.worker_id, result.reason, result.message)
                raise ShardLostError(refused)
            # Nothing was computed, so keys and values are unchanged: the same call is sent again,
            # without limit. To compute everything again would only load a busy worker more.
            wait_s = BACK_OFF_S if result.reason is RefusalReason.OVERLOADED else 10 * BACK_OFF_S
            await self._tasks.wait_for(self._links.changed.wait(), wait_s)

    async def _answer_at_once(
        self, shard: Member, step: int, call: Call, failure: Pending[None]
    ) -> Result:
        """As `_answer`, without a time limit: the shard waits for experts within this turn."""
        pending = self._links.ask(shard.worker_id, call, step=step, timeout_s=0.0)
        if not pending.is_done:
            await self._tasks.first_done((pending, failure))
        if failure.is_done:
            failure.result()
        try:
            return pending.result()
        except PeerError as error:
            raise ShardLostError(error) from error

    async def _answer(self, shard: Member, step: int, call: Call) -> Result:
        timeout_s = self.timeout_s * self._links.slowness(shard.worker_id)
        pending = self._links.ask(shard.worker_id, call, step=step, timeout_s=timeout_s)
        try:
            is_done = pending.is_done or await self._tasks.wait_for(pending, timeout_s)
        finally:
            if not pending.is_done:
                self._links.abandon(shard.worker_id, pending, 2 * timeout_s)
        if not is_done:
            self._links.give_up(shard.worker_id)
            raise ShardLostError(PeerSilentError(shard.worker_id, "no reply in time"))
        try:
            return pending.result()
        except PeerError as error:
            raise ShardLostError(error) from error


def _check_drawn(shard: Member, turn: Drawn, tokens: TokenRows) -> None:
    """Raises ShardLostError unless there is a token for each sample.

    Otherwise positions would count as computed whose keys and values may be anything.
    """
    if len(turn.tokens) != len(tokens.samples):
        text = f"{len(turn.tokens)} tokens for {len(tokens.samples)} samples"
        raise ShardLostError(RefusedError(shard.worker_id, RefusalReason.FAULT, text))
