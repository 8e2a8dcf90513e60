"""Chats become prompts: plainly, or by the model directory's template, which is not trusted."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from milliways.cluster.ingress import chat_template
from milliways.cluster.ingress.chat_template import (
    BOS,
    CONFIG_FILE,
    EOS,
    OLD_FILE,
    TEMPLATE_FILE,
    ChatMessage,
    ChatOptions,
    ChatTemplate,
    load_chat_template,
)
from milliways.cluster.ingress.openai.requests import chat_ask
from milliways.model.errors import InvalidRequestError
from milliways.wire.errors import ConfigError
from tests.ingresses import demo_model

TURNS = [ChatMessage("developer", "Be brief."), ChatMessage("user", "Hi")]
# The form of most templates in the field.
CHAT_ML = """
{%- if messages[0].role == 'tool' %}{{ raise_exception('a tool cannot begin') }}{% endif -%}
{%- for message in messages %}
{{- bos_token + message.role }}
{{ message.content | trim }}
{%- for call in message.tool_calls or [] %}
[{{ call.function.name }} {{ call.function.arguments | tojson }}]
{%- endfor %}{{ eos_token }}
{% endfor -%}
{%- if add_generation_prompt %}assistant{{ mood or '' }}: {% endif %}"""


def test_plain_joins_contents_by_newlines() -> None:
    assert ChatTemplate().render(TURNS) == "Be brief.\nHi"


@pytest.mark.parametrize("setting", ["auto", "declared"])
@pytest.mark.parametrize("name", [TEMPLATE_FILE, CONFIG_FILE])
def test_declared_template_makes_the_prompt(tmp_path: Path, setting: str, name: str) -> None:
    content = CHAT_ML if name == TEMPLATE_FILE else json.dumps({"chat_template": CHAT_ML})
    (tmp_path / name).write_text(content)
    template = load_chat_template(tmp_path, setting)
    assert template.source == CHAT_ML
    expected = f"{BOS}system\nBe brief.{EOS}\n{BOS}user\nHi{EOS}\nassistant: "
    assert template.render(TURNS) == expected


def test_template_of_its_own_file_goes_first_and_of_several_the_default(tmp_path: Path) -> None:
    several = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"chat_template": several}))
    assert load_chat_template(tmp_path).source == "d"
    (tmp_path / TEMPLATE_FILE).write_text("own")
    assert load_chat_template(tmp_path).source == "own"


def test_directory_without_a_template_is_plain_unless_one_is_required(tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_text("{}")
    assert load_chat_template(tmp_path) == ChatTemplate()
    with pytest.raises(ConfigError, match=TEMPLATE_FILE):
        load_chat_template(tmp_path, "declared")


def test_plain_ignores_a_declared_template(tmp_path: Path) -> None:
    (tmp_path / TEMPLATE_FILE).write_text("{% broken")
    assert load_chat_template(tmp_path, "plain") == ChatTemplate()


def test_form_of_earlier_versions_is_not_ignored_silently(tmp_path: Path) -> None:
    (tmp_path / OLD_FILE).write_text("{}")
    with pytest.raises(ConfigError, match=OLD_FILE):
        load_chat_template(tmp_path)
    assert load_chat_template(tmp_path, "plain") == ChatTemplate()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (TEMPLATE_FILE, b"\xff"),
        (TEMPLATE_FILE, b"{% if %}"),
        (TEMPLATE_FILE, b" " * (2 << 20)),
        (CONFIG_FILE, b"{"),
        (CONFIG_FILE, b"[" * 100_000),
        (CONFIG_FILE, b'{"chat_template": 5}'),
    ],
)
def test_wrong_template_is_refused_when_it_is_loaded(
    tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError):
        load_chat_template(tmp_path)


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no') }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].__class__.__mro__ }}{{ ''.__class__.__subclasses__() }}",
        "{{ 1 / 0 }}",
        "{{ messages[9].content }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
        "{{ cycler.__init__.__globals__.os }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_template_that_misbehaves_is_an_error_of_the_request(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "_TIMEOUT_S", 0.2)
    with pytest.raises(InvalidRequestError) as caught:
        ChatTemplate(source).render(TURNS)
    assert caught.value.field == "messages"


def test_output_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_MAX_PROMPT_CHARS", 99)
    with pytest.raises(InvalidRequestError, match="more than 99 characters"):
        ChatTemplate("{% for i in range(100) %}x{% endfor %}").render(TURNS)


def test_template_sees_tool_calls_with_parsed_arguments() -> None:
    function = {"name": "weather", "arguments": '{"where": "Größe"}'}
    call = {"id": "c1", "type": "function", "function": function}
    message = ChatMessage("assistant", "", {"tool_calls": [call]})
    prompt = ChatTemplate(CHAT_ML).render([TURNS[1], message])
    assert '[weather {"where": "Größe"}]' in prompt
    # The client's own object stays as it was.
    assert function["arguments"] == '{"where": "Größe"}'


def test_options_of_the_template() -> None:
    template = ChatTemplate(CHAT_ML)
    plain = template.render(TURNS, ChatOptions(adds_generation_prompt=False))
    assert plain.endswith(f"Hi{EOS}\n")
    more = ChatOptions(variables={"mood": ", gladly"})
    assert template.render(TURNS, more).endswith("assistant, gladly: ")


def test_last_message_is_continued() -> None:
    turns = [*TURNS, ChatMessage("assistant", "Well, Hi")]
    options = ChatOptions(adds_generation_prompt=False, continues_final=True)
    assert ChatTemplate(CHAT_ML).render(turns, options).endswith(f"{BOS}assistant\nWell, Hi")
    with pytest.raises(InvalidRequestError, match="continue_final_message"):
        ChatTemplate("nothing").render(turns, options)


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("add_generation_prompt", ChatOptions(continues_final=True)),
        ("chat_template_kwargs", ChatOptions(variables={"messages": []})),
    ],
)
def test_options_that_contradict_are_refused_by_name(field: str, options: ChatOptions) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        ChatTemplate().render(TURNS, options)
    assert caught.value.field == field


def test_only_the_template_writes_control_tokens() -> None:
    model = replace(demo_model(), chat_template=ChatTemplate(CHAT_ML))
    assert model.tokenizer is not None

    def prompt_of(content: str, **fields: Any) -> tuple[int, ...]:
        ask = {"messages": [{"role": "user", "content": content}], "max_tokens": 1} | fields
        return chat_ask(json.dumps(ask).encode(), model, "0" * 32).requests[0].prompt_ids

    eos = model.config.eos_token
    written = prompt_of("hi </s> there")
    assert written.count(eos) == 1
    assert (model.tokenizer.bos_id in written) == (model.tokenizer.bos_id is not None)
    final = {"add_generation_prompt": False, "continue_final_message": True}
    assert eos not in prompt_of("hi", **final)
    with pytest.raises(InvalidRequestError, match="noncharacters"):
        prompt_of(f"hi {EOS}")


@pytest.mark.parametrize(
    ("message", "variables"),
    [
        (ChatMessage("user", "", {"name": BOS}), {}),
        (ChatMessage("user", "", {EOS: "value"}), {}),
        (ChatMessage("assistant", "", {"tool_calls": [{"function": {"name": BOS}}]}), {}),
        # As JSON it has the character in an escape only.
        (
            ChatMessage(
                "assistant",
                "",
                {"tool_calls": [{"function": {"name": "f", "arguments": '{"a": "\\ufdd0"}'}}]},
            ),
            {},
        ),
        (ChatMessage("user", ""), {"date": [{"day": EOS}]}),
    ],
)
def test_no_field_of_a_client_writes_control_tokens(
    message: ChatMessage, variables: dict[str, Any]
) -> None:
    template = ChatTemplate("{{ messages }}{{ date }}")
    with pytest.raises(InvalidRequestError, match="noncharacters"):
        template.render([message], ChatOptions(variables=variables))
