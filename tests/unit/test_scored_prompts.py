"""Prompts that are scored: each token once, in order, whatever chunks, caches and preemption do."""

import random
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from milliways.model.block_pool import BlockPool
from milliways.model.config import GROK_1
from milliways.model.errors import InvalidRequestError
from milliways.model.sampling import SampledTokens, pack_rows, sample
from milliways.model.sampling_params import INVALID_TOKEN, SampledToken, SampleRow, SamplingParams
from milliways.router.limits import SchedulerLimits
from milliways.router.requests.admission import RoutedRequest, make_sequences
from milliways.router.requests.journal import DeliveredSample, Journal, OutOfOrderError
from milliways.router.requests.request import GenerationRequest
from milliways.router.requests.sequence import (
    FinishReason,
    NoText,
    PromptScores,
    Sequence,
    SequenceStatus,
)
from milliways.router.rows import pack, take_events
from milliways.router.scheduler import Scheduler
from milliways.wire.calls import TokenRows

V = 300
BLOCK = 4


def scored_row(given_id: int | None, params: SamplingParams | None = None) -> SampleRow:
    greedy = SamplingParams(temperature=0.0, num_logprobs=3)
    return SampleRow(
        params=params or greedy, token_ids=(4, 5), num_prompt_tokens=2, given_id=given_id
    )


def drawn(rows: list[SampleRow], logits_BV: np.ndarray) -> SampledTokens:
    return sample(jnp.asarray(logits_BV), pack_rows(rows, V, max_tokens=8))


def random_logits(num_rows: int) -> np.ndarray:
    return np.random.default_rng(3).normal(size=(num_rows, V)).astype(np.float32) * 4


def test_given_token_is_not_drawn_but_has_its_log_probability() -> None:
    logits_BV, given = random_logits(4), [0, 17, V - 1, 100]
    told = drawn([scored_row(token_id) for token_id in given], logits_BV)
    wide_BV = logits_BV.astype(np.float64)
    log_probs_BV = wide_BV - np.log(np.exp(wide_BV).sum(axis=1, keepdims=True))
    assert np.asarray(told.token_B).tolist() == given
    np.testing.assert_allclose(told.logprob_B, log_probs_BV[range(4), given], rtol=1e-5)
    best_BK = np.argsort(-logits_BV, axis=1, kind="stable")[:, :20]
    np.testing.assert_array_equal(told.top_ids_BK, best_BK)
    top_BK = np.take_along_axis(log_probs_BV, best_BK, axis=1)
    np.testing.assert_allclose(told.top_logprobs_BK, top_BK, rtol=1e-5)


def test_given_token_has_the_bits_of_a_drawn_one() -> None:
    logits_BV = random_logits(1)
    penalised = SamplingParams(presence_penalty=1.0, logit_bias={3: 5.0}, seed=2)
    for params in (SamplingParams(seed=1), penalised):
        first = drawn([scored_row(None, params)], logits_BV)
        again = drawn([scored_row(int(first.token_B[0]))], logits_BV)
        for name in ("token_B", "logprob_B", "is_valid_B"):
            ours, theirs = getattr(first, name), getattr(again, name)
            assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


def test_given_token_behind_broken_logits_is_flagged() -> None:
    logits_BV = random_logits(1)
    logits_BV[0, 7] = np.nan
    told = drawn([scored_row(9)], logits_BV)
    assert (bool(told.is_valid_B[0]), int(told.token_B[0])) == (False, INVALID_TOKEN)


def request_for(num_prompt: int = 10, **fields: Any) -> GenerationRequest:
    given = {"max_tokens": 3, "prompt_logprobs": 2} | fields
    return GenerationRequest(prompt_ids=tuple(range(20, 20 + num_prompt)), **given)


def routed(request: GenerationRequest, **fields: Any) -> RoutedRequest:
    return RoutedRequest(request_id="r", request=request, timeout_s=1.0, **fields)


def sequences_of(request: GenerationRequest, **fields: Any) -> list[Sequence]:
    return make_sequences(routed(request, **fields), GROK_1, lambda _: NoText())


def make_scheduler(num_blocks: int = 32, **limits: int) -> Scheduler:
    return Scheduler(BlockPool(num_blocks, BLOCK), SchedulerLimits(**limits))


def token_of(row: SampleRow) -> SampledToken:
    token_id = 7 if row.given_id is None else row.given_id
    return SampledToken(token_id=token_id, logprob=-1.0, top_logprobs=(), is_valid=True)


def run_step(scheduler: Scheduler, scores: dict[Sequence, list[int]]) -> list[tuple[int, int, int]]:
    """One step, as if computed; start, length and number of scores of each part."""
    parts: list[tuple[int, int, int]] = []
    for entry in scheduler.schedule():
        sequence = entry.sequence
        parts.append((sequence.num_computed, entry.num_tokens, len(entry.scored)))
        rows = pack([entry])
        check_rows(sequence, rows)
        scheduler.computed(entry)
        for event in take_events(entry, [token_of(row) for row in rows.samples]):
            if isinstance(event, PromptScores):
                had = scores.setdefault(sequence, [])
                assert event.position == len(had) + 1
                had += [token.token_id for token in event.tokens]
            else:
                assert sequence.is_scored
        if sequence.finish_reason is not None:
            scheduler.finish(sequence, SequenceStatus.FINISHED)
    return parts


def check_rows(sequence: Sequence, rows: TokenRows) -> None:
    """A row scores the token behind it, or draws behind the last one."""
    positions = rows.positions_T[rows.logits_rows_W].tolist()
    for position, row in zip(positions, rows.samples, strict=True):
        assert len(row.token_ids) == position + 1
        if row.given_id is None:
            assert position == len(sequence.token_ids) - 1
        else:
            assert row.given_id == sequence.token_ids[position + 1]
            assert position < sequence.num_prompt_tokens - 1


def add(scheduler: Scheduler, sequences: list[Sequence]) -> list[Sequence]:
    for sequence in sequences:
        request = sequence.request
        scheduler.add(sequence, len(request.prompt_ids) + request.max_tokens - 1)
    return sequences


def test_chunks_of_a_prompt_are_scored_as_they_are_computed() -> None:
    scheduler, scores = make_scheduler(max_step_tokens=4), dict[Sequence, list[int]]()
    (sequence,) = add(scheduler, sequences_of(request_for()))
    parts = [run_step(scheduler, scores) for _ in range(4)]
    assert parts == [[(0, 4, 4)], [(4, 4, 4)], [(8, 2, 1)], [(10, 1, 0)]]
    assert scores[sequence] == list(range(21, 30))


def test_cached_prefix_is_used_only_behind_what_is_scored() -> None:
    scheduler, scores = make_scheduler(), dict[Sequence, list[int]]()
    request = request_for()
    for num_scored, start in ((0, 0), (3, 0), (4, 4), (7, 4), (8, 8), (9, 8)):
        (sequence,) = add(scheduler, sequences_of(request, num_scored=num_scored))
        scores[sequence] = list(range(21, 21 + num_scored))
        assert run_step(scheduler, scores) == [(start, 10 - start, 9 - num_scored)]
        assert scores[sequence] == list(range(21, 30))
        while scheduler.has_work:
            run_step(scheduler, scores)


def test_prompt_that_is_only_scored_ends_without_a_token() -> None:
    scheduler, scores = make_scheduler(max_step_tokens=5), dict[Sequence, list[int]]()
    (sequence,) = add(scheduler, sequences_of(request_for(max_tokens=0, num_samples=3)))
    # The last row says what follows, which nobody asks.
    assert [run_step(scheduler, scores) for _ in range(2)] == [[(0, 5, 5)], [(5, 4, 4)]]
    assert (sequence.finish_reason, sequence.status) == (
        FinishReason.LENGTH,
        SequenceStatus.FINISHED,
    )
    assert not scheduler.has_work
    assert scheduler.pool.num_held == 0


def test_nothing_is_computed_of_what_is_scored_already() -> None:
    assert sequences_of(request_for(max_tokens=0), num_scored=9) == []
    assert sequences_of(request_for(num_prompt=1, max_tokens=0)) == []
    assert len(sequences_of(request_for(num_prompt=1, num_samples=2))) == 2


def test_first_sample_scores_for_all_and_the_others_wait() -> None:
    scheduler, scores = make_scheduler(max_step_tokens=8), dict[Sequence, list[int]]()
    first, _ = add(scheduler, sequences_of(request_for(num_samples=2)))
    # All full blocks are there after the first step, but one token is not scored yet.
    assert run_step(scheduler, scores) == [(0, 8, 8)]
    assert run_step(scheduler, scores) == [(8, 2, 1)]
    assert run_step(scheduler, scores) == [(10, 1, 0), (8, 2, 0)]
    while scheduler.has_work:
        run_step(scheduler, scores)
    assert set(scores) == {first}


@pytest.mark.parametrize("seed", range(60))
def test_any_load_scores_every_token_once(seed: int) -> None:
    rng = random.Random(seed)
    scores: dict[Sequence, list[int]] = {}
    scheduler = make_scheduler(
        num_blocks=rng.randint(5, 12),
        max_running=rng.randint(1, 6),
        max_step_tokens=rng.randint(1, 16),
    )
    firsts: list[Sequence] = []
    for _ in range(400):
        if len(firsts) < 8 and rng.random() < 0.5:
            request = GenerationRequest(
                prompt_ids=tuple(rng.randint(10, 12) for _ in range(rng.randint(1, 12))),
                max_tokens=rng.choice((0, 1, 5)),
                num_samples=rng.randint(1, 3),
                prompt_logprobs=1,
            )
            firsts += add(scheduler, sequences_of(request))[:1]
        if rng.random() < 0.05:
            scheduler.start_over()
        if scheduler.has_work:
            run_step(scheduler, scores)
            scheduler.pool.check_integrity()
    assert not scheduler.has_work
    for sequence in firsts:
        assert scores.get(sequence, []) == [*sequence.request.prompt_ids[1:]]


@pytest.mark.parametrize(
    "fields",
    [
        {"num_scored": 10},
        {"num_scored": 8, "delivered": {0: (7,)}},
        {"num_scored": 0, "finished": frozenset({0})},
    ],
)
def test_delivery_that_cannot_be_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        sequences_of(request_for(num_samples=2), **fields)
    assert caught.value.field == "num_delivered_prompt_logprobs"


def test_sequence_with_a_broken_score_fails() -> None:
    scheduler = make_scheduler()
    (sequence,) = add(scheduler, sequences_of(request_for()))
    (entry,) = scheduler.schedule()
    broken = SampledToken(token_id=INVALID_TOKEN, logprob=0.0, top_logprobs=(), is_valid=False)
    (event,) = take_events(entry, [broken] * entry.num_logits)
    assert not isinstance(event, PromptScores)
    assert event.finish_reason is sequence.finish_reason is FinishReason.ERROR


def journal_for(num_scored: int = 0, **fields: Any) -> Journal:
    return Journal(request_for(4, **fields), num_scored=num_scored)


def test_journal_takes_each_score_once() -> None:
    journal = journal_for(max_tokens=0)
    told = [(1, 21), (1, 21), (2, 22), (1, 21), (3, 23)]
    assert [journal.try_score(*one) for one in told] == [True, False, True, False, True]
    assert (journal.num_scored, journal.is_complete, journal.has_begun) == (3, True, True)


def test_journal_goes_on_behind_scores_of_elsewhere() -> None:
    journal = journal_for(num_scored=2)
    assert not journal.try_score(2, 22)
    assert journal.try_score(3, 23)
    assert not journal.is_complete
    assert journal.try_deliver(0, 0, 9, is_finished=True)
    assert journal.is_complete
    assert journal.delivered() == [DeliveredSample(0, (9,), True)]


@pytest.mark.parametrize("told", [(0, 20), (2, 22), (1, 22), (4, 24)])
def test_journal_refuses_scores_that_do_not_follow_on(told: tuple[int, int]) -> None:
    journal = journal_for()
    with pytest.raises(OutOfOrderError):
        journal.try_score(*told)
    assert journal.num_scored == 0


def test_journal_refuses_a_token_before_the_scores() -> None:
    journal = journal_for()
    journal.try_score(1, 21)
    with pytest.raises(OutOfOrderError):
        journal.try_deliver(0, 0, 9, is_finished=False)
    with pytest.raises(OutOfOrderError):
        Journal(GenerationRequest(prompt_ids=(1, 2), max_tokens=1)).try_score(1, 2)


def test_only_a_prompt_that_is_scored_may_want_no_token() -> None:
    assert GenerationRequest(prompt_ids=(1, 2), max_tokens=0, prompt_logprobs=0).num_to_score == 1
    with pytest.raises(InvalidRequestError, match="log-probabilities of the prompt"):
        GenerationRequest(prompt_ids=(1, 2), max_tokens=0)
