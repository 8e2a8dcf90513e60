"""Stop strings in a text that arrives in pieces."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from milliways.router.requests.stop import StopMatcher


def run(stop: list[str], pieces: list[str]) -> str:
    matcher = StopMatcher(stop)
    return "".join([*(matcher.push(piece) for piece in pieces), matcher.flush()])


@pytest.mark.parametrize(
    ("stop", "pieces", "expected"),
    [
        (["."], ["One", ". Two"], "One"),
        (["END"], ["the E", "N", "D of it"], "the "),
        (["END"], ["the E", "N", "vy"], "the ENvy"),
        (["abab"], ["ab", "acab", "ab!"], "abac"),
        (["long one", "on"], ["a lon"], "a l"),
        (["b", "a"], ["xab"], "x"),
        ([], ["any", "thing"], "anything"),
    ],
)
def test_text_ends_before_the_first_stop_string(
    stop: list[str], pieces: list[str], expected: str
) -> None:
    assert run(stop, pieces) == expected


def test_text_is_shown_as_soon_as_no_stop_string_can_begin_there() -> None:
    matcher = StopMatcher(["END"])
    assert [matcher.push(piece) for piece in ("a", "E", "x", "EN")] == ["a", "", "Ex", ""]


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.text("ab", max_size=5), max_size=8),
)
def test_pieces_give_what_the_whole_text_gives(stop: list[str], pieces: list[str]) -> None:
    text = "".join(pieces)
    shown = run(stop, pieces)
    # The first match to be complete ends the text; nothing of it is shown.
    ends = {s: text.find(s) + len(s) for s in stop if s in text}
    if not ends:
        assert shown == text
    else:
        assert text.startswith(shown)
        assert not any(s in shown for s in stop)
        assert any(text.startswith(s, len(shown)) for s in stop)
