"""Takes a micro-batch through the layers: attention shard, experts, attention shard, to its tokens.

This is the step of DESIGN's list, and reads like it. Which process computes a part does not matter
to the bits, so neither does which replica answered.
"""

from collections.abc import Sequence

from cluster.calls import (
    AbandonBatch,
    AdvanceBatch,
    BeginBatch,
    Call,
    Departure,
    Drawn,
    ExpertInput,
    Refusal,
    TokenRows,
    Turn,
)
from cluster.errors import ClusterError, PeerError, PeerSilentError, RefusedError
from cluster.tasks import Cancelled, Tasks
from cluster.view import Member
from model.runner import SampledToken
from router.dispatch import Dispatcher
from router.link_table import LinkTable


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

    async def run(self, step: int, batch_id: int, tokens: TokenRows) -> Sequence[SampledToken]:
        """The tokens drawn at the end of all layers, one for each sample.

        Raises:
            ShardLostError: keys and values are lost.
            RefusedError: workers fail to compute it, again and again.
        """
        shard, call = self._shard_at(0), BeginBatch(batch_id, 0, tokens)
        try:
            while True:
                turn = await self._ask(shard, step, call)
                while isinstance(turn, ExpertInput):
                    outputs_TAD = await self._dispatcher.run_experts(step, turn)
                    turn = await self._ask(
                        shard, step, AdvanceBatch(batch_id, turn.layer, outputs_TAD)
                    )
                if isinstance(turn, Drawn):
                    return turn.tokens
                layer = shard.first_layer + shard.num_layers
                if layer == self._num_layers and not tokens.samples:
                    return ()
                shard = self._shard_at(layer)
                call = BeginBatch(batch_id, layer, tokens, turn.hidden_TD)
        except (Cancelled, ClusterError):
            self._links.ask(
                shard.worker_id, AbandonBatch(batch_id), step=step, timeout_s=self._timeout_s
            )
            raise

    def _shard_at(self, layer: int) -> Member:
        """The shard that begins with a layer; after the last one, that with the output head."""
        if layer == self._num_layers:
            return next(member for member in self.chain if member.has_ends)
        return next(
            member for member in self.chain if member.first_layer == layer and member.num_layers
        )

    async def _ask(self, shard: Member, step: int, call: Call) -> Turn:
        """One turn of a shard; there is no other that could answer, so no reply is a loss."""
        pending = self._links.ask(
            shard.worker_id, call, step=step, timeout_s=self._timeout_s, num_rows=0
        )
        if not pending.is_done and not await self._tasks.wait_for(pending, self._timeout_s):
            self._links.give_up(shard.worker_id)
            raise ShardLostError(PeerSilentError(shard.worker_id, "no reply in time"))
        try:
            result = pending.result()
        except PeerError as error:
            raise ShardLostError(error) from error
        if isinstance(result, ExpertInput | Departure | Drawn):
            return result
        assert isinstance(result, Refusal)
        refused = RefusedError(shard.worker_id, result.reason, result.message)
        raise ShardLostError(refused)
