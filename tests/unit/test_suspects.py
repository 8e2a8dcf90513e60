"""A sequence that is suspected of killing workers is forgotten when it ends, however it ends."""

from typing import Any, cast

from milliways.model.block_pool import BlockPool
from milliways.model.config import GROK_1
from milliways.model.sampling_params import INVALID_TOKEN, SampledToken
from milliways.router.limits import RouterLimits, SchedulerLimits
from milliways.router.links.link_table import LinkTable
from milliways.router.pipeline import Pipeline
from milliways.router.requests.admission import RoutedRequest
from milliways.router.requests.request import GenerationRequest
from milliways.router.requests.sequence import NoText
from milliways.router.router import Router
from milliways.router.suspects import PAUSE_S, RowsKilledWorkersError
from milliways.runtime.clock import FakeClock
from milliways.runtime.tasks import Pending, Task, Tasks
from milliways.wire.calls import TokenRows
from milliways.wire.errors import ClusterError, ModelFaultError

BROKEN = SampledToken(token_id=INVALID_TOKEN, logprob=0.0, top_logprobs=(), is_valid=False)


class FakePipeline:
    """Workers die of the first micro-batch; the logits of the next ones are not finite."""

    computes_at_once = False

    def __init__(self) -> None:
        self.num_batches = 0

    async def run(
        self, step: int, batch_id: int, tokens: TokenRows, caution_s: float | None
    ) -> tuple[SampledToken, ...]:
        self.num_batches += 1
        if self.num_batches == 1:
            raise RowsKilledWorkersError(["w1", "w2"])
        return (BROKEN,) * len(tokens.samples)


class Listener:
    """Keeps the error with which a request ended."""

    error: ClusterError | None = None

    def ended(self, error: ClusterError | None) -> None:
        self.error = error

    def scored(self, scores: object) -> None: ...

    def tokens(self, events: object) -> None: ...

    def moved(self) -> None: ...


def test_suspect_whose_scores_are_broken_in_the_middle_of_its_prompt_is_forgotten() -> None:
    clock = FakeClock()
    tasks = Tasks(clock)
    links = LinkTable("r", 1, lambda member: Pending(), tasks)
    limits = RouterLimits(scheduler=SchedulerLimits(max_step_tokens=4))
    pipeline = cast("Pipeline", cast("Any", FakePipeline()))
    pool = BlockPool(8, 4)
    router = Router(GROK_1, pool, limits, links, pipeline, lambda _: NoText(), tasks)
    request = GenerationRequest(prompt_ids=tuple(range(10)), max_tokens=1, prompt_logprobs=0)
    listener = Listener()
    router.submit(RoutedRequest(request_id="a", request=request, timeout_s=60.0), listener)

    def step() -> Task[None]:
        task = tasks.start(router.step())
        tasks.run_ready()
        clock.advance_to(clock.now_s() + PAUSE_S)
        tasks.run_ready()
        assert task.is_done
        return task

    assert isinstance(step().error, RowsKilledWorkersError)
    assert step().error is None
    assert isinstance(listener.error, ModelFaultError)
    assert step().error is None
    assert pool.num_held == 0 and not router.scheduler.has_work
