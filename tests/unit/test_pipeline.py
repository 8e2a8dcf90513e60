"""The way of a batch through a chain of attention shards."""

import pytest

from milliways.router.dispatch import Dispatcher
from milliways.router.limits import DispatchLimits
from milliways.router.links.link_table import LinkTable
from milliways.router.pipeline import Pipeline, ShardLostError
from milliways.runtime.clock import FakeClock
from milliways.runtime.tasks import Pending, Tasks
from milliways.wire.calls import TokenRows
from milliways.wire.view import Member, WorkerState

PART = Member(
    worker_id="w", incarnation=1, address="", state=WorkerState.READY, first_layer=1, num_layers=1
)


@pytest.mark.parametrize("chain", [(), (PART,)], ids=["empty", "without a beginning"])
def test_a_chain_lost_before_a_batch_sets_out_is_a_lost_shard(chain: tuple[Member, ...]) -> None:
    tasks = Tasks(FakeClock())
    links = LinkTable("r", 1, lambda member: Pending(), tasks)
    pipeline = Pipeline(2, links, Dispatcher(links, DispatchLimits(), tasks), tasks, 1.0)
    pipeline.chain = chain
    nothing = TokenRows.__new__(TokenRows)
    task = tasks.start(pipeline.run(1, 1, nothing))
    tasks.run_ready()
    with pytest.raises(ShardLostError, match="from layer 0 on"):
        task.result()
