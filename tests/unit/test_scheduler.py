"""What a step computes: budgets, slots, sharing, preemption."""

import random

import pytest

from milliways.model.block_pool import BlockPool
from milliways.model.errors import InvalidRequestError
from milliways.model.sampling_params import SampledToken
from milliways.router.limits import SchedulerLimits
from milliways.router.requests.request import GenerationRequest
from milliways.router.requests.sequence import NoText, Sequence, SequenceStatus
from milliways.router.scheduler import ScheduledSequence, Scheduler

BLOCK = 4
EOS = 2


def make_scheduler(num_blocks: int = 16, **limits: int) -> Scheduler:
    return Scheduler(BlockPool(num_blocks, BLOCK), SchedulerLimits(**limits))


def add(
    scheduler: Scheduler, prompt: list[int], max_tokens: int = 8, num_samples: int = 1
) -> list[Sequence]:
    request = GenerationRequest(
        prompt_ids=tuple(prompt), max_tokens=max_tokens, num_samples=num_samples
    )
    sequences = [Sequence(request, i, NoText(), max_tokens, EOS) for i in range(num_samples)]
    for sequence in sequences:
        scheduler.add(sequence, len(prompt) + max_tokens - 1)
    return sequences


def run_step(scheduler: Scheduler, token_id: int = 7) -> list[tuple[int, int]]:
    """Schedules, pretends to compute, draws `token_id`; returns (start, length) of each part."""
    scheduled = scheduler.schedule()
    parts = [(entry.sequence.num_computed, entry.num_tokens) for entry in scheduled]
    drawing = [entry.sequence for entry in scheduled if entry.wants_token]
    for entry in scheduled:
        assert_blocks_suffice(entry)
        scheduler.computed(entry)
    for sequence in drawing:
        event = sequence.append(
            SampledToken(token_id=token_id, logprob=0.0, top_logprobs=(), is_valid=True)
        )
        if event.finish_reason:
            scheduler.finish(sequence, SequenceStatus.FINISHED)
    return parts


def assert_blocks_suffice(entry: ScheduledSequence) -> None:
    sequence = entry.sequence
    num_positions = sequence.num_computed + entry.num_tokens
    assert len(sequence.block_table) * BLOCK >= num_positions
    assert len(set(sequence.block_table)) == len(sequence.block_table)


def test_long_prompt_is_prefilled_in_chunks_of_the_token_budget() -> None:
    scheduler = make_scheduler(max_step_tokens=6)
    add(scheduler, list(range(10, 24)))
    assert [run_step(scheduler) for _ in range(4)] == [[(0, 6)], [(6, 6)], [(12, 2)], [(14, 1)]]


def test_decoding_goes_before_prefill_and_is_never_starved_by_it() -> None:
    scheduler = make_scheduler(max_step_tokens=6)
    add(scheduler, [5, 6])
    run_step(scheduler)
    add(scheduler, list(range(30, 50)))
    assert run_step(scheduler) == [(2, 1), (0, 5)]
    assert run_step(scheduler) == [(3, 1), (5, 5)]


def test_running_sequences_are_bounded() -> None:
    scheduler = make_scheduler(max_running=2)
    for i in range(3):
        add(scheduler, [10 + i])
    assert len(run_step(scheduler)) == 2


def test_samples_of_a_request_share_the_blocks_of_its_prompt() -> None:
    scheduler = make_scheduler()
    first, second, third = add(scheduler, list(range(10, 19)), num_samples=3)
    run_step(scheduler)
    run_step(scheduler)
    assert first.block_table[:2] == second.block_table[:2] == third.block_table[:2]
    assert len({first.block_table[2], second.block_table[2], third.block_table[2]}) == 3


def test_latest_sequence_gives_its_blocks_up_and_computes_them_anew() -> None:
    scheduler = make_scheduler(num_blocks=4)
    (early,) = add(scheduler, [10, 11, 12, 13, 14, 15, 16], max_tokens=6)
    (late,) = add(scheduler, [20, 21, 22, 23, 24, 25], max_tokens=6)
    run_step(scheduler)
    statuses = set()
    while scheduler.has_work:
        run_step(scheduler)
        statuses.add((early.status, late.status))
    assert (SequenceStatus.RUNNING, SequenceStatus.PREEMPTED) in statuses
    assert early.token_ids[7:] == [7] * 6 and late.token_ids[6:] == [7] * 6
    assert scheduler.pool.num_held == 0


def test_sequence_that_could_never_run_is_refused_when_added() -> None:
    scheduler = make_scheduler(num_blocks=2)
    with pytest.raises(InvalidRequestError, match="at most 8"):
        add(scheduler, [1, 3, 4], max_tokens=7)


def test_waiting_sequence_can_be_cancelled() -> None:
    scheduler = make_scheduler(max_running=1)
    add(scheduler, [10])
    (waiting,) = add(scheduler, [11])
    run_step(scheduler)
    scheduler.finish(waiting, SequenceStatus.FAILED)
    assert waiting.status is SequenceStatus.FAILED
    assert run_step(scheduler) == [(1, 1)]


def test_whether_a_token_is_wanted_is_settled_when_the_step_is_chosen() -> None:
    scheduler = make_scheduler()
    (sequence,) = add(scheduler, [10, 11, 12])
    [entry] = scheduler.schedule()
    assert entry.wants_token
    scheduler.finish(sequence, SequenceStatus.FAILED)
    assert entry.wants_token


def test_more_samples_than_the_queue_is_long_are_queued_where_nothing_is_ahead() -> None:
    scheduler = make_scheduler(max_running=1, max_waiting=1)
    assert scheduler.can_queue(5)
    add(scheduler, [10], num_samples=5)
    assert not scheduler.can_queue(1)


@pytest.mark.parametrize("seed", range(60))
def test_any_load_ends_and_leaves_no_block_held(seed: int) -> None:
    rng = random.Random(seed)
    scheduler = make_scheduler(
        num_blocks=rng.randint(5, 12),
        max_running=rng.randint(1, 6),
        max_step_tokens=rng.randint(1, 16),
    )
    sequences: list[Sequence] = []
    for _ in range(400):
        if len(sequences) < 12 and rng.random() < 0.5:
            prompt = [rng.randint(10, 12) for _ in range(rng.randint(1, 12))]
            sequences += add(scheduler, prompt, rng.randint(1, 8), rng.randint(1, 3))
        if scheduler.has_work:
            num_tokens = sum(length for _, length in run_step(scheduler))
            assert 0 < num_tokens <= scheduler.limits.max_step_tokens
            scheduler.pool.check_integrity()
    assert not scheduler.has_work
    assert scheduler.pool.num_held == 0
    for sequence in sequences:
        assert sequence.status is SequenceStatus.FINISHED
        assert sequence.token_ids[: sequence.num_prompt_tokens] == [*sequence.request.prompt_ids]
