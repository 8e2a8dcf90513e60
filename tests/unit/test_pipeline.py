"""The way of a batch through a chain of attention shards."""

import numpy as np
import pytest

from milliways.model.sampling_params import SampledToken, SampleRow, SamplingParams
from milliways.router.dispatch import Dispatcher
from milliways.router.limits import DispatchLimits
from milliways.router.links.link_table import LinkTable
from milliways.router.pipeline import Pipeline, ShardLostError
from milliways.runtime.clock import FakeClock
from milliways.runtime.tasks import Pending, Tasks
from milliways.wire.calls import Call, Drawn, Fence, Result, TokenRows
from milliways.wire.links import WorkerLink
from milliways.wire.view import ClusterView, Member, WorkerState

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


class FakeLink:
    """To a shard that draws so many tokens, whatever it is asked for."""

    transport = "fake"
    is_local = False
    exchange_link = 0

    def __init__(self, num_drawn: int) -> None:
        self._num_drawn = num_drawn

    def ask(self, call: Call, fence: Fence) -> Pending[Result]:
        token = SampledToken(token_id=1, logprob=0.0, top_logprobs=(), is_valid=True)
        answered = Pending[Result]()
        answered.resolve(Drawn((token,) * self._num_drawn))
        return answered

    def close(self) -> None:
        pass


@pytest.mark.parametrize(("num_drawn", "num_samples"), [(0, 1), (1, 0), (2, 1), (1, 1), (0, 0)])
def test_a_token_for_each_sample_or_keys_and_values_are_lost(
    num_drawn: int, num_samples: int
) -> None:
    """Positions of a step that ended without its tokens must not count as computed."""
    whole = Member(
        worker_id="w",
        incarnation=1,
        address="",
        state=WorkerState.READY,
        first_layer=0,
        num_layers=2,
        has_ends=True,
    )
    tasks = Tasks(FakeClock())
    opened: Pending[WorkerLink] = Pending()
    opened.resolve(FakeLink(num_drawn))
    links = LinkTable("r", 1, lambda member: opened, tasks)
    links.update(ClusterView(placement_epoch=1, members={"w": whole}))
    tasks.run_ready()
    pipeline = Pipeline(2, links, Dispatcher(links, DispatchLimits(), tasks), tasks, 1.0)
    pipeline.chain = (whole,)
    row = SampleRow(params=SamplingParams(), token_ids=(1,), num_prompt_tokens=1)
    tokens = TokenRows(
        token_ids_T=np.ones(1, np.int32),
        positions_T=np.zeros(1, np.int32),
        slots_T=np.zeros(1, np.int32),
        block_tables_BM=np.zeros((1, 1), np.int32),
        logits_rows_W=np.zeros(num_samples, np.int32),
        samples=(row,) * num_samples,
    )
    task = tasks.start(pipeline.run(1, 1, tokens))
    tasks.run_ready()
    if num_drawn == num_samples:
        assert len(task.result()) == num_samples
    else:
        with pytest.raises(ShardLostError, match="samples"):
            task.result()
