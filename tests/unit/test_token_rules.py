"""Rules for tokens: what may be drawn, what ends a sequence, what it shows, from tokens alone."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from milliways.model.errors import InvalidRequestError
from milliways.model.sampling_params import SampledToken, SamplingParams
from milliways.router.requests.messages import rules_from_wire, rules_to_wire
from milliways.router.requests.request import GenerationRequest
from milliways.router.requests.rules import TokenRules
from milliways.router.requests.sequence import FinishReason, Sequence, TokenEvent
from milliways.router.requests.stop import StopMatcher
from milliways.v1 import sampling_pb2
from tests.unit.test_sequence import EOS, LetterDetokenizer, letters

ENDS = (EOS, 7)


def sequence_of(rules: TokenRules, **fields: Any) -> Sequence:
    request = GenerationRequest(prompt_ids=(65,), max_tokens=99, rules=rules, **fields)
    return Sequence(request, 0, LetterDetokenizer(), 99, EOS)


def run(sequence: Sequence, token_ids: list[int]) -> list[TokenEvent]:
    tokens = (
        SampledToken(token_id=i, logprob=0, top_logprobs=(), is_valid=True) for i in token_ids
    )
    return [sequence.append(token) for token in tokens]


def test_what_ends_a_sequence_is_forbidden_until_it_has_enough_tokens() -> None:
    rules = TokenRules(min_tokens=2)
    assert [rules.forbidden(range(n), ENDS) for n in range(4)] == [ENDS, ENDS, (), ()]


def test_bad_word_is_forbidden_at_its_last_token_only() -> None:
    rules = TokenRules(bad_words=((5,), (8, 9), (8, 8, 3)))
    assert rules.forbidden([], ()) == (5,)
    assert rules.forbidden([8], ()) == (5, 9)
    assert rules.forbidden([1, 8, 8], ()) == (3, 5, 9)
    assert rules.forbidden([8, 1], ()) == (5,)


def test_bad_words_do_not_forbid_everything_that_is_allowed() -> None:
    rules = TokenRules(allowed_token_ids=(5, 9), bad_words=((5,), (8, 9)), min_tokens=1)
    assert rules.forbidden([4], ENDS) == (5,)
    assert rules.forbidden([8], ENDS) == ()


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_stop_token_ends_a_sequence_and_says_so(ignore_eos: bool) -> None:
    rules = TokenRules(stop_token_ids=(ord("b"),))
    *_, last = run(sequence_of(rules, ignore_eos=ignore_eos), letters("ab"))
    assert (last.text, last.finish_reason, last.stop_reason) == ("", FinishReason.STOP, ord("b"))
    (last,) = run(sequence_of(rules), [EOS])
    assert (last.finish_reason, last.stop_reason) == (FinishReason.STOP, None)


def test_stop_string_ends_a_sequence_and_says_so() -> None:
    *_, last = run(sequence_of(TokenRules(), stop=("zz", "bc")), letters("abc"))
    assert (last.finish_reason, last.stop_reason) == (FinishReason.STOP, "bc")


def test_what_ended_a_sequence_is_shown_when_asked_for() -> None:
    rules = TokenRules(includes_stop=True, stop_token_ids=(ord("!"),))
    events = run(sequence_of(rules, stop=("bc",)), letters("abc"))
    assert "".join(event.text for event in events) == "abc"
    events = run(sequence_of(rules), letters("ab!"))
    assert "".join(event.text for event in events) == "ab!"


def test_stop_strings_are_not_looked_for_in_the_first_tokens() -> None:
    events = run(sequence_of(TokenRules(min_tokens=2), stop=("a",)), letters("aabab"))
    assert "".join(event.text for event in events) == "aab"
    assert events[3].finish_reason is FinishReason.STOP


# The first example is slow on a busy machine.
@settings(deadline=None)
@given(
    st.lists(st.sampled_from([*letters("ab!"), EOS]), max_size=12),
    st.integers(0, 12),
    st.integers(0, 5),
    st.booleans(),
)
def test_sequence_that_is_taken_over_goes_on_as_it_was(
    token_ids: list[int], at: int, min_tokens: int, includes_stop: bool
) -> None:
    rules = TokenRules(
        min_tokens=min_tokens,
        stop_token_ids=(ord("!"),),
        bad_words=(tuple(letters("ab")), tuple(letters("bba"))),
        includes_stop=includes_stop,
    )
    whole = sequence_of(rules, stop=("ab", "bba"))
    events: list[TokenEvent] = []
    forbidden: list[tuple[int, ...]] = []
    for token_id in token_ids:
        forbidden.append(whole.forbidden_ids())
        events += run(whole, [token_id])
        if whole.finish_reason:
            break
    at = min(at, max(0, len(events) - 1))
    taken = sequence_of(rules, stop=("ab", "bba"))
    taken.replay(event.token_id for event in events[:at])
    for event, ids in zip(events[at:], forbidden[at:], strict=True):
        assert taken.forbidden_ids() == ids
        assert run(taken, [event.token_id]) == [event]


@settings(deadline=None)
@given(
    st.builds(
        TokenRules,
        min_tokens=st.integers(0, 2**31 - 1),
        stop_token_ids=st.tuples(st.integers(0, 2**31)),
        allowed_token_ids=st.lists(st.integers(0, 2**31), max_size=5).map(tuple),
        bad_words=st.lists(st.tuples(st.integers(0, 9)), max_size=3).map(tuple),
        includes_stop=st.booleans(),
        shows_special=st.booleans(),
        spaces_special=st.booleans(),
    )
)
def test_rules_cross_the_wire(rules: TokenRules) -> None:
    message = rules_to_wire(rules).SerializeToString()
    assert rules_from_wire(sampling_pb2.TokenRules.FromString(message)) == rules


def test_rules_of_an_older_ingress_are_none() -> None:
    assert rules_from_wire(sampling_pb2.TokenRules()) == TokenRules()


@pytest.mark.parametrize(
    ("field", "rules"),
    [
        ("min_tokens", {"min_tokens": -1}),
        ("min_tokens", {"min_tokens": 100}),
        ("stop_token_ids", {"stop_token_ids": (1,) * 129}),
        ("allowed_token_ids", {"allowed_token_ids": (1,) * 301}),
        ("bad_words", {"bad_words": ((1,),) * 257}),
        ("bad_words", {"bad_words": ((1,) * 65,)}),
        ("bad_words", {"bad_words": ((),)}),
        ("logit_bias", {"bad_words": ((1,),)}),
        ("logit_bias", {"min_tokens": 1}),
    ],
)
def test_impossible_rules_are_refused_by_name(field: str, rules: dict[str, Any]) -> None:
    biases = dict.fromkeys(range(300), 1.0) if field == "logit_bias" else {}
    with pytest.raises(InvalidRequestError) as caught:
        sequence_of(TokenRules(**rules), sampling=SamplingParams(logit_bias=biases))
    assert caught.value.field == field


@pytest.mark.parametrize("keeps", [False, True])
def test_first_stop_string_of_the_first_place_is_found(keeps: bool) -> None:
    matcher = StopMatcher(("xyz", "bc", "b"), keeps_match=keeps)
    assert matcher.push("abcd") == ("abc" if keeps else "a")
    assert matcher.matched == "bc"
    assert matcher.push("more") == ""
