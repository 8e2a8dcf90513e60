"""What is done with fields that were meant for other servers: a table, looked at as a whole."""

import json
from typing import Any

import pytest

from milliways.cluster.ingress.openai.bodies import ChatBody, CompletionBody, MessageBody
from milliways.cluster.ingress.openai.fields import (
    FOREIGN,
    FOREIGN_OF_CHAT,
    FOREIGN_OF_COMPLETIONS,
    FOREIGN_OF_MESSAGES,
    LABELS,
    LABELS_OF_MESSAGES,
    Foreign,
    ignored_fields_header,
    sift,
)
from milliways.cluster.ingress.openai.requests import Ask, chat_ask, completion_ask
from milliways.cluster.ingress.served_model import ServedModel
from milliways.model.errors import InvalidRequestError
from tests.ingresses import demo_model

REQUEST_ID = "0" * 32
MESSAGE = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def model() -> ServedModel:
    return demo_model()


def completed(served: ServedModel, *, refuses_unknown: bool = False, **fields: Any) -> Ask:
    raw = json.dumps({"prompt": [7], "max_tokens": 3} | fields).encode()
    return completion_ask(raw, served, REQUEST_ID, refuses_unknown=refuses_unknown)


def chatted(model: ServedModel, **fields: Any) -> Ask:
    raw = json.dumps({"messages": [MESSAGE], "max_tokens": 3} | fields).encode()
    return chat_ask(raw, model, REQUEST_ID)


def test_no_field_is_in_two_tables() -> None:
    ours = {*CompletionBody.model_fields, *ChatBody.model_fields}
    assert not ours & LABELS
    assert not ours & set(FOREIGN)
    assert not set(FOREIGN) & LABELS
    assert not set(ChatBody.model_fields) & set(FOREIGN_OF_CHAT)
    of_messages = set(MessageBody.model_fields)
    assert not of_messages & (LABELS_OF_MESSAGES | set(FOREIGN_OF_MESSAGES))


@pytest.mark.parametrize("name", FOREIGN_OF_COMPLETIONS)
def test_fields_of_chat_are_refused_in_a_completion(model: ServedModel, name: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        completed(model, **{name: 5})
    assert caught.value.field == name


@pytest.mark.parametrize(("name", "foreign"), [*FOREIGN.items(), *FOREIGN_OF_CHAT.items()])
def test_neutral_values_change_nothing_and_others_are_refused_by_name(
    model: ServedModel, name: str, foreign: Foreign
) -> None:
    usual = chatted(model)
    for value in (None, *foreign.neutral):
        assert chatted(model, **{name: value}) == usual
    with pytest.raises(InvalidRequestError) as caught:
        chatted(model, **{name: {"anything": 1}})
    assert caught.value.field == name
    assert foreign.why in str(caught.value)


@pytest.mark.parametrize("name", sorted(LABELS))
def test_labels_are_ignored_whatever_they_say(model: ServedModel, name: str) -> None:
    assert completed(model, **{name: {"anything": 1}}) == completed(model)


def test_field_may_depend_on_the_temperature(model: ServedModel) -> None:
    assert completed(model, do_sample=False, temperature=0).ignored_fields == ()
    with pytest.raises(InvalidRequestError, match="do_sample = False"):
        completed(model, do_sample=False)


def test_unknown_fields_are_named_or_refused(model: ServedModel) -> None:
    options = {"include_usage": True, "more": 1}
    ask = completed(model, no_such=1, stream=True, stream_options=options, logprobs=None)
    assert ask.ignored_fields == ("no_such", "stream_options.more")
    ask = chatted(model, messages=[MESSAGE | {"color": 1}] * 3)
    assert ignored_fields_header(ask.ignored_fields) == {
        "x-milliways-ignored-fields": "messages[].color"
    }
    with pytest.raises(InvalidRequestError) as caught:
        completed(model, no_such=1, refuses_unknown=True)
    assert caught.value.field == "no_such"


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        ([], None),
        (["a", "b", "a"], "a, b"),
        (["x\r\ny: z", "é", "\ud800"], "xyz"),
        (["a" * 999], "a" * 64),
    ],
)
def test_header_holds_only_what_a_header_may_hold(names: list[str], shown: str | None) -> None:
    header = ignored_fields_header(names)
    assert header.get("x-milliways-ignored-fields") == shown
    many = ignored_fields_header(f"field-{i}" for i in range(1000))
    assert len(many["x-milliways-ignored-fields"]) < 500


def test_values_of_other_servers_mean_ours(model: ServedModel) -> None:
    assert completed(model, top_k=-1).requests == completed(model, top_k=0).requests
    # A bool is no number, although it equals one.
    assert sift({"top_k": True}, ["top_k"], {}, ()).kept == {"top_k": True}


HISTORY = [
    {"role": "user", "content": "What is the weather?", "id": "m1", "type": "message"},
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "I should ask.",
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "rain"}]},
    {"role": "function", "name": "weather", "content": "rain", "metadata": {"a": 1}},
    {"role": "assistant", "content": "It rains.", "refusal": None, "tool_calls": []},
    {"role": "user", "content": [{"type": "input_text", "text": "Thanks"}]},
]


def test_history_with_tools_and_reasoning_is_taken(model: ServedModel) -> None:
    ask = chatted(model, messages=HISTORY)
    assert ask.ignored_fields == ()
    prompt = model.decode(ask.requests[0].prompt_ids)
    assert prompt == "What is the weather?\n\nrain\nrain\nIt rains.\nThanks"


@pytest.mark.parametrize("content", [None, 5])
def test_message_of_a_user_needs_content(model: ServedModel, content: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        chatted(model, messages=[{"role": "user", "content": content}])
    assert caught.value.field == "messages.0.content"


def test_model_may_be_left_out(model: ServedModel) -> None:
    assert completed(model) == completed(model, model=None) == completed(model, model="demo")
