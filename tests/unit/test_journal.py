"""The journal: every token once, in order, whatever routers repeat or leave out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from milliways.router.requests.journal import DeliveredSample, Journal, OutOfOrderError
from milliways.router.requests.request import GenerationRequest


def journal(num_samples: int = 1) -> Journal:
    return Journal(GenerationRequest(prompt_ids=(1,), max_tokens=9, num_samples=num_samples))


def test_new_token_is_delivered_and_a_repeated_one_is_not() -> None:
    book = journal()
    assert book.try_deliver(0, 0, 50, is_finished=False)
    assert not book.try_deliver(0, 0, 50, is_finished=False)
    assert book.try_deliver(0, 1, 51, is_finished=True)
    assert book.delivered() == [DeliveredSample(0, (50, 51), True)]
    assert (book.num_delivered, book.is_complete) == (2, True)


def test_what_was_delivered_elsewhere_counts_as_delivered() -> None:
    had = [DeliveredSample(1, (60, 61), True), DeliveredSample(0, (50,), False)]
    request = GenerationRequest(prompt_ids=(1,), max_tokens=9, num_samples=2)
    book = Journal(request, had)
    assert (book.delivered(), book.num_delivered) == (had[::-1], 3)
    assert not book.try_deliver(0, 0, 50, is_finished=False)
    assert book.try_deliver(0, 1, 51, is_finished=True)
    assert book.is_complete


def test_samples_end_by_themselves() -> None:
    book = journal(num_samples=3)
    book.try_deliver(2, 0, 50, is_finished=True)
    book.try_deliver(1, 0, 60, is_finished=False)
    assert not book.is_complete
    assert book.delivered() == [DeliveredSample(1, (60,), False), DeliveredSample(2, (50,), True)]


@pytest.mark.parametrize(
    ("sample_index", "index", "token_id"),
    [(0, 2, 5), (0, 0, 6), (2, 0, 5), (1, 1, 5)],
    ids=["gap", "another token", "no such sample", "after the end"],
)
def test_stream_that_does_not_follow_on_is_refused(
    sample_index: int, index: int, token_id: int
) -> None:
    book = journal(num_samples=2)
    book.try_deliver(0, 0, 5, is_finished=False)
    book.try_deliver(1, 0, 5, is_finished=True)
    before = book.delivered()
    with pytest.raises(OutOfOrderError):
        book.try_deliver(sample_index, index, token_id, is_finished=False)
    assert book.delivered() == before


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(1, 8)), max_size=12))
def test_any_breaks_and_repeats_give_the_tokens_once(attempts: list[tuple[int, int]]) -> None:
    tokens = [100 + i for i in range(8)]
    book, given = journal(), list[int]()
    # Each attempt begins somewhere at or before what was delivered, and breaks somewhere.
    for back, length in [*attempts, (0, 8)]:
        start = max(0, book.num_delivered - back)
        for index in range(start, min(8, start + length)):
            if book.try_deliver(0, index, tokens[index], is_finished=index == 7):
                given.append(tokens[index])
    assert given == tokens
    assert book.is_complete
