"""Which blocks a standby is sent: each once, within limits, and nothing is kept for later."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from milliways.model.block_pool import chain_digest
from milliways.model.sampling_params import SamplingParams
from milliways.router.requests.request import GenerationRequest
from milliways.router.requests.sequence import NoText, Sequence, SequenceStatus
from milliways.router.standby import Run, Standby, StandbyLimits

BLOCK = 4
BLOCK_BYTES = 100
LIMITS = StandbyLimits(max_calls=2, max_bytes=400, max_call_bytes=200, pause_s=1.0)
PEER = ("b", 1)


def running(prompt: tuple[int, ...], num_computed: int, first_block: int = 0) -> Sequence:
    """A sequence so far; its blocks are numbered from `first_block` on."""
    request = GenerationRequest(
        prompt_ids=prompt, max_tokens=100, sampling=SamplingParams(temperature=0.0)
    )
    sequence = Sequence(request, 0, NoText(), 100, eos_token=-1)
    sequence.move(SequenceStatus.RUNNING)
    sequence.num_computed = num_computed
    sequence.block_table = list(range(first_block, first_block + -(-len(prompt) // BLOCK)))
    return sequence


class Bench:
    """A router's sequences, and what of them was sent."""

    def __init__(self, *sequences: Sequence, limits: StandbyLimits = LIMITS) -> None:
        self.sequences = list(sequences)
        self.standby = Standby(BLOCK, limits)
        self.standby.follow(PEER)
        self.now_s = 0.0

    def next(self) -> Run | None:
        alive = [s for s in self.sequences if s.status is SequenceStatus.RUNNING]
        return self.standby.next_run(alive, BLOCK_BYTES, self.now_s)

    def must_next(self) -> Run:
        run = self.next()
        assert run is not None
        return run

    def send_all(self) -> list[tuple[int, ...]]:
        """Has everything stored at once; the blocks of each call."""
        sent: list[tuple[int, ...]] = []
        while (run := self.next()) is not None:
            sent.append(run.block_ids)
            self.standby.stored(run, len(run.digests), self.now_s)
        return sent


def test_only_full_blocks_are_sent_each_with_what_names_it() -> None:
    bench = Bench(running(tuple(range(12)), num_computed=11))
    run = bench.must_next()
    first = chain_digest(b"", range(4))
    assert run.parent == b"" and run.block_ids == (0, 1) and run.token_ids == tuple(range(8))
    assert run.digests == (first, chain_digest(first, range(4, 8)))
    assert run.num_bytes == 2 * BLOCK_BYTES
    assert bench.next() is None
    # The block that becomes full follows on those before.
    bench.sequences[0].num_computed = 12
    following = bench.must_next()
    assert (following.parent, following.block_ids) == (run.digests[-1], (2,))


def test_nothing_is_sent_twice_not_even_an_equal_block_of_another_sequence() -> None:
    prompt = tuple(range(16))
    bench = Bench(running(prompt, 16), running((*prompt[:8], *range(50, 58)), 16, first_block=10))
    assert bench.send_all() == [(0, 1), (2, 3), (12, 13)]
    assert bench.send_all() == []
    assert bench.standby.figures.num_copied == 6
    assert bench.standby.figures.num_copied_bytes == 6 * BLOCK_BYTES


def test_calls_and_bytes_in_flight_are_bounded() -> None:
    bench = Bench(running(tuple(range(40)), 40))
    runs = [bench.must_next(), bench.must_next()]
    assert bench.next() is None and bench.standby.num_calls == 2
    bench.standby.stored(runs[0], 2, 0.0)
    assert bench.must_next().block_ids == (4, 5)
    assert bench.next() is None


def test_a_block_larger_than_the_bounds_goes_alone() -> None:
    limits = replace(LIMITS, max_bytes=50, max_call_bytes=10)
    bench = Bench(running(tuple(range(12)), 12), limits=limits)
    run = bench.must_next()
    assert run.block_ids == (0,) and bench.next() is None
    bench.standby.stored(run, 1, 0.0)
    assert bench.must_next().block_ids == (1,)


def test_the_sequence_that_would_lose_most_comes_first() -> None:
    short, long = running((9,) * 4, 4), running(tuple(range(24)), 24, first_block=5)
    assert Bench(short, long).must_next().sequence is long


def test_standby_without_room_is_left_alone_for_a_while_and_then_sent_the_rest() -> None:
    bench = Bench(running(tuple(range(16)), 16))
    run = bench.must_next()
    bench.standby.stored(run, 1, now_s=5.0)
    bench.now_s = 5.9
    assert bench.next() is None
    bench.now_s = 6.0
    assert bench.send_all() == [(1, 2), (3,)]
    figures = bench.standby.figures
    assert (figures.num_copied, figures.num_dropped) == (4, 1)


def test_what_follows_on_a_run_that_failed_is_sent_again_after_it() -> None:
    bench = Bench(running(tuple(range(16)), 16))
    first, second = bench.must_next(), bench.must_next()
    bench.standby.failed(first, 0.0)
    bench.standby.stored(second, 2, 0.0)
    bench.now_s = 1.0
    # The standby has the second run already.
    assert bench.send_all() == [(0, 1)]


def test_a_gap_has_the_whole_sequence_sent_anew() -> None:
    bench = Bench(running(tuple(range(16)), 12))
    assert bench.send_all() == [(0, 1), (2,)]
    bench.sequences[0].num_computed = 16
    bench.standby.found_gap(bench.must_next(), 0.0)
    bench.now_s = 1.0
    assert bench.send_all() == [(0, 1), (2, 3)]


def test_another_standby_is_sent_what_runs_then_and_nothing_else() -> None:
    ended, live = running((7,) * 8, 8, first_block=20), running(tuple(range(8)), 8)
    bench = Bench(ended, live)
    bench.send_all()
    late = running(tuple(range(30, 38)), 8, first_block=30)
    bench.sequences.append(late)
    on_its_way = bench.must_next()
    ended.move(SequenceStatus.FINISHED)
    bench.standby.follow(("c", 1))
    assert not bench.standby.is_in_use
    # The old one's answers mean nothing any more.
    bench.standby.stored(on_its_way, 2, 0.0)
    assert sorted(bench.send_all()) == [(0, 1), (30, 31)]


def test_without_a_standby_nothing_is_sent() -> None:
    bench = Bench(running(tuple(range(8)), 8))
    bench.standby.follow(None)
    assert bench.next() is None


def test_what_is_preempted_goes_on_where_it_was_when_it_runs_again() -> None:
    bench = Bench(running(tuple(range(16)), 12))
    bench.send_all()
    (sequence,) = bench.sequences
    sequence.move(SequenceStatus.PREEMPTED)
    sequence.num_computed, sequence.block_table = 0, []
    assert bench.next() is None
    sequence.move(SequenceStatus.RUNNING)
    sequence.num_computed, sequence.block_table = 8, [40, 41]
    assert bench.next() is None
    sequence.num_computed, sequence.block_table = 16, [40, 41, 42, 43]
    assert bench.send_all() == [(43,)]


def test_nothing_is_kept_of_a_sequence_that_ended() -> None:
    bench = Bench(running(tuple(range(40)), 40))
    run = bench.must_next()
    bench.sequences[0].move(SequenceStatus.FINISHED)
    assert bench.next() is None and not bench.standby.is_in_use
    assert bench.standby.figures.num_dropped == 8
    bench.standby.failed(run, 0.0)
    assert bench.standby.num_calls == 0


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 3)), max_size=60))
def test_bounds_hold_and_what_is_there_is_whole_whatever_happens(
    happenings: list[tuple[int, int]],
) -> None:
    prompts = [tuple(range(40)), (*range(20), *range(60, 80)), tuple(range(80, 120))]
    bench = Bench(*(running(prompt, 0, 100 * i) for i, prompt in enumerate(prompts)))
    flying: list[Run] = []
    # The standby's blocks, by digest: what it was sent must follow on what it has.
    there: set[bytes] = {b""}
    for what, which in happenings:
        bench.now_s += 0.4
        match what:
            case 0 | 1:
                sequence = bench.sequences[which % 3]
                sequence.num_computed = min(40, sequence.num_computed + 3 + 2 * which)
            case 2 | 3:
                if (run := bench.next()) is not None:
                    flying.append(run)
            case 4 if flying:
                run = flying.pop(0)
                if run.parent in there:
                    num_blocks = max(1, len(run.digests) - which)
                    there.update(run.digests[:num_blocks])
                    bench.standby.stored(run, num_blocks, bench.now_s)
                else:
                    bench.standby.found_gap(run, bench.now_s)
            case 5 if flying:
                bench.standby.failed(flying.pop(0), bench.now_s)
            case 6 if which == 0:
                there = {b""}
            case _:
                pass
        assert bench.standby.num_calls == len(flying) <= LIMITS.max_calls
        assert sum(run.num_bytes for run in flying) <= LIMITS.max_bytes
    _settle(bench, flying, there)
    for sequence in bench.sequences:
        digest = b""
        for start in range(0, sequence.num_computed - BLOCK + 1, BLOCK):
            digest = chain_digest(digest, sequence.token_ids[start : start + BLOCK])
            assert digest in there or 6 in {what for what, _ in happenings}


def _settle(bench: Bench, flying: list[Run], there: set[bytes]) -> None:
    """Has everything stored that is sent, until nothing more is."""
    for _ in range(100):
        bench.now_s += 2.0
        run = flying.pop(0) if flying else bench.next()
        if run is None:
            return
        if run.parent in there:
            there.update(run.digests)
            bench.standby.stored(run, len(run.digests), bench.now_s)
        else:
            bench.standby.found_gap(run, bench.now_s)
    pytest.fail("it never ends")
