"""Request ids and event ids, with which a client resumes a stream."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from milliways.cluster.ingress.request_id import (
    created_s_of,
    is_request_id,
    new_request_id,
    seed_of,
)
from milliways.cluster.ingress.resume import LAST_EVENT_ID, event_id, parse_event_id
from milliways.model.errors import InvalidRequestError
from milliways.router.requests.request import GenerationRequest

ID = "019f00000000aaaaaaaaaaaaaaaaaaaa"
FINGERPRINT = "fp_0123456789ab"


def test_request_ids_are_unique_and_hold_their_time() -> None:
    ids = {new_request_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(map(is_request_id, ids))
    assert 1_700_000_000 < created_s_of(ids.pop()) < 10_000_000_000


def test_event_id_without_a_fingerprint_is_taken() -> None:
    """Clients that began before fingerprints were part of it."""
    assert parse_event_id(f"{ID}/3.4").fingerprint == ""


def test_seed_of_an_id_and_prompt_never_changes() -> None:
    assert seed_of(ID) == 5931965612091260968
    seeds = {seed_of(ID, prompt_index) for prompt_index in range(64)}
    assert len(seeds) == 64
    assert all(0 <= seed < 2**63 for seed in seeds)


@given(st.lists(st.integers(0, 10**9 - 1), min_size=1, max_size=128), st.booleans())
def test_event_id_says_what_was_received(counts: list[int], has_usage: bool) -> None:
    point = parse_event_id(event_id(ID, counts, FINGERPRINT, has_usage=has_usage))
    assert (point.request_id, point.has_usage) == (ID, has_usage)
    assert point.fingerprint == FINGERPRINT
    assert [received.num_tokens for received in point.received] == counts


@pytest.mark.parametrize(
    "text",
    [
        "",
        ID,
        f"{ID}/",
        f"/{ID}/1",
        f"{ID}/1.",
        f"{ID}/.1",
        f"{ID}/-1",
        f"{ID}/1 ",
        f"{ID}/1,2",
        f"{ID}/1/2",
        f"{ID}/1/usage/usage",
        f"{ID}/1/fp_",
        f"{ID}/1/fp_0123456789AB",
        f"{ID}/1/{FINGERPRINT}/{FINGERPRINT}",
        f"{ID}/1234567890",
        f"{ID}/\u0661",
        f"{ID.upper()}/1",
        f"{ID[1:]}/1",
        f"{ID}\n/1",
        "0" * 100_000,
    ],
)
def test_malformed_event_id_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_event_id(text)
    assert caught.value.field == LAST_EVENT_ID


@pytest.mark.parametrize("counts", [[0], [3], [1, 1, 1], [1, 4]])
def test_impossible_counts_are_refused(counts: list[int]) -> None:
    request = GenerationRequest(prompt_ids=(1,), max_tokens=3, num_samples=2)
    with pytest.raises(InvalidRequestError) as caught:
        parse_event_id(event_id(ID, counts, FINGERPRINT)).check_fits([request])
    assert caught.value.field == LAST_EVENT_ID
