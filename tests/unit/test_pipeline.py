"""The way of a batch through a chain of attention shards."""

import pytest

from cluster.calls import TokenRows
from cluster.clock import FakeClock
from cluster.tasks import Pending, Tasks
from cluster.view import Member, WorkerState
from router.dispatch import Dispatcher, DispatchLimits
from router.link_table import LinkTable
from router.pipeline import Pipeline, ShardLostError

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
