"""Takes a micro-batch through the layers: attention shard, experts, attention shard, to its tokens.

This is the step of DESIGN's list, and reads like it. Which process computes a part does not matter
to the bits, so neither does which replica answered.
"""

from collections.abc import Sequence

from milliways.model.sampling_params import SampledToken
from milliways.router.dispatch import Dispatcher
from milliways.router.links.link_table import LinkTable
from milliways.runtime.tasks import Cancelled, Tasks
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
# What stands in the way of a call now, and not for ever.
_NOT_YET = (RefusalReason.OVERLOADED, RefusalReason.STALE_EPOCH)


class ShardLostError(ClusterError):
    """An attention shard of the chain is gone, and with it keys and values: to be computed anew."""

    def __init__(self, cause: PeerError) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Pipeline:
    """Owns the way of a router's batches through the shards of its chain."""

    def __init__(
        self,
        num_layers: int,
        links: LinkTable,
        dispatcher: Dispatcher,
        tasks: Tasks,
        timeout_s: float,
    ) -> None:
        self.chain: Sequence[Member] = ()
        self._num_layers = num_layers
        self._links = links
        self._dispatcher = dispatcher
        self._tasks = tasks
        self._timeout_s = timeout_s

    def obstacle(self) -> str:
        """Why no step can be finished now; empty where nothing is known to be in the way."""
        shut = [m.worker_id for m in self.chain if not self._links.is_open(m.worker_id)]
        if not self.chain:
            return "there is no attention shard"
        if shut:
            return f"no way to the attention shards of {', '.join(shut)}"
        return "no worker holds experts that are needed" if self._dispatcher.is_parked else ""

    @property
    def is_whole(self) -> bool:
        """Whether the chain has all layers, and the ends; while a cluster comes up it may not."""
        layer = 0
        for member in self.chain:
            if member.num_layers and member.first_layer == layer:
                layer += member.num_layers
        return layer == self._num_layers and any(member.has_ends for member in self.chain)

    async def run(
        self, step: int, batch_id: int, tokens: TokenRows, caution_s: float | None = None
    ) -> Sequence[SampledToken]:
        """The tokens drawn at the end of all layers, one for each sample.

        `caution_s` as for `Dispatcher.run_experts`.

        Raises:
            ShardLostError: keys and values are lost.
            RefusedError: workers fail to compute it, again and again.
            RowsKilledWorkersError: they die of it.
        """
        # As it was: a new chain is taken up by the next step, since keys and values are lost.
        chain = self.chain
        shard, call = self._shard_at(chain, 0), BeginBatch(batch_id, 0, tokens)
        try:
            while True:
                turn = await self._ask(shard, step, call)
                while isinstance(turn, ExpertInput):
                    outputs_TAD = await self._dispatcher.run_experts(step, turn, caution_s)
                    turn = await self._ask(
                        shard, step, AdvanceBatch(batch_id, turn.layer, outputs_TAD)
                    )
                if isinstance(turn, Drawn):
                    return turn.tokens
                layer = shard.first_layer + shard.num_layers
                if layer == self._num_layers and not tokens.samples:
                    return ()
                shard = self._shard_at(chain, layer)
                call = BeginBatch(batch_id, layer, tokens, turn.hidden_TD)
        except (Cancelled, ClusterError):
            self._links.ask(
                shard.worker_id, AbandonBatch(batch_id), step=step, timeout_s=self._timeout_s
            )
            raise

    def _shard_at(self, chain: Sequence[Member], layer: int) -> Member:
        """The shard that begins with a layer; after the last one, that with the output head."""
        for member in chain:
            is_end = layer == self._num_layers and member.has_ends
            if is_end or (member.first_layer == layer and member.num_layers):
                return member
        raise ShardLostError(PeerLostError("nobody", f"holds attention from layer {layer} on"))

    async def _ask(self, shard: Member, step: int, call: Call) -> Turn:
        """One turn of a shard; there is no other that could answer, so no reply is a loss."""
        while True:
            result = await self._answer(shard, step, call)
            if not isinstance(result, Refusal):
                assert isinstance(result, ExpertInput | Departure | Drawn)
                return result
            if result.reason not in _NOT_YET:
                refused = RefusedError(shard.worker_id, result.reason, result.message)
                raise ShardLostError(refused)
            # It was not computed, so keys and values are as they were: the same is asked again, for
            # as long as it takes. To start over would only give a busy worker more to do.
            wait_s = BACK_OFF_S if result.reason is RefusalReason.OVERLOADED else 10 * BACK_OFF_S
            await self._tasks.wait_for(self._links.changed.wait(), wait_s)

    async def _answer(self, shard: Member, step: int, call: Call) -> Result:
        timeout_s = self._timeout_s * self._links.slowness(shard.worker_id)
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
