"""One token stream: what each drawn token means for its text and its end."""

from collections.abc import Sequence as Items

import pytest

from milliways.model.sampling_params import SampledToken
from milliways.router.requests.request import GenerationRequest
from milliways.router.requests.sequence import (
    ALLOWED_MOVES,
    FinishReason,
    Sequence,
    SequenceStatus,
    TokenEvent,
)

EOS = 2
HALF_CHARACTER = 300


class LetterDetokenizer:
    """Token i is the letter chr(i); HALF_CHARACTER shows only once another token follows."""

    def __init__(self) -> None:
        self.held = ""

    def push(self, token_id: int) -> str:
        held, self.held = self.held, "é" if token_id == HALF_CHARACTER else ""
        return held if self.held else held + chr(token_id)

    def flush(self) -> str:
        return "\ufffd" if self.held else ""

    def copy(self) -> "LetterDetokenizer":
        other = LetterDetokenizer()
        other.held = self.held
        return other


def make(max_tokens: int = 99, stop: tuple[str, ...] = (), ignore_eos: bool = False) -> Sequence:
    request = GenerationRequest(
        prompt_ids=(65,), max_tokens=max_tokens, stop=stop, ignore_eos=ignore_eos
    )
    return Sequence(request, 0, LetterDetokenizer(), max_tokens, EOS)


def run(sequence: Sequence, token_ids: Items[int]) -> list[TokenEvent]:
    sampled = [
        SampledToken(token_id=i, logprob=-1.0, top_logprobs=(), is_valid=True) for i in token_ids
    ]
    return [sequence.append(token) for token in sampled]


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def test_text_arrives_with_its_tokens() -> None:
    events = run(make(), letters("abc"))
    assert [event.text for event in events] == ["a", "b", "c"]
    assert all(event.finish_reason is None for event in events)


def test_end_of_sequence_has_no_text_and_ends() -> None:
    event = run(make(), [97, EOS])[-1]
    assert (event.text, event.finish_reason, event.token_id) == ("", FinishReason.STOP, EOS)


def test_end_of_sequence_can_be_ignored() -> None:
    assert run(make(ignore_eos=True), [EOS, 97])[-1].finish_reason is None


def test_stop_string_over_several_tokens_is_not_shown() -> None:
    events = run(make(stop=("END",)), letters("xEND"))
    assert [event.text for event in events] == ["x", "", "", ""]
    assert events[-1].finish_reason is FinishReason.STOP


def test_text_held_for_a_stop_string_is_shown_when_the_length_ends_it() -> None:
    events = run(make(max_tokens=3, stop=("END",)), letters("xEN"))
    assert "".join(event.text for event in events) == "xEN"
    assert events[-1].finish_reason is FinishReason.LENGTH


def test_half_a_character_is_shown_as_broken_only_at_the_end() -> None:
    events = run(make(max_tokens=2), [97, HALF_CHARACTER])
    assert [event.text for event in events] == ["a", "\ufffd"]


def test_half_a_character_is_held_back_before_end_of_sequence() -> None:
    events = run(make(), [HALF_CHARACTER, EOS])
    assert [event.text for event in events] == ["", "\ufffd"]


def test_logits_without_a_token_end_the_sequence_as_an_error() -> None:
    sequence = make()
    broken = SampledToken(token_id=-1, logprob=0.0, top_logprobs=(), is_valid=False)
    assert sequence.append(broken).finish_reason is FinishReason.ERROR
    assert sequence.token_ids == [65]


@pytest.mark.parametrize("start", SequenceStatus)
@pytest.mark.parametrize("end", SequenceStatus)
def test_only_listed_moves_are_possible(start: SequenceStatus, end: SequenceStatus) -> None:
    sequence = make()
    sequence.status = start
    if end in ALLOWED_MOVES[start]:
        sequence.move(end)
        assert sequence.status is end
    else:
        with pytest.raises(AssertionError):
            sequence.move(end)
