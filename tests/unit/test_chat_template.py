"""Chats become prompts: plainly, or by the model directory's template."""

import json
from pathlib import Path
from typing import Any

import pytest

from milliways.cluster.ingress.chat_template import (
    TEMPLATE_FILE,
    ChatMessage,
    ChatTemplate,
    load_chat_template,
    parse_chat_template,
)
from milliways.model.errors import InvalidRequestError
from milliways.wire.errors import ConfigError

TURNS = [ChatMessage("developer", "Be brief."), ChatMessage("user", "Hi")]
DECLARED = {
    "roles": {"system": {"suffix": "\n\n"}, "user": {"prefix": "Human: ", "suffix": "\n"}},
    "generation_prefix": "Assistant:",
    "stop": ["\nHuman:"],
}


def test_plain_joins_contents_by_newlines() -> None:
    assert ChatTemplate().render(TURNS) == "Be brief.\nHi"


@pytest.mark.parametrize("setting", ["auto", "declared"])
def test_declared_template_wraps_every_message(tmp_path: Path, setting: str) -> None:
    (tmp_path / TEMPLATE_FILE).write_text(json.dumps(DECLARED))
    template = load_chat_template(tmp_path, setting)
    assert template.render(TURNS) == "Be brief.\n\nHuman: Hi\nAssistant:"
    assert template.stop == ("\nHuman:",)
    with pytest.raises(InvalidRequestError, match="role = 'assistant'"):
        template.render([ChatMessage("assistant", "x")])


def test_directory_without_a_template_is_plain_unless_one_is_required(tmp_path: Path) -> None:
    assert load_chat_template(tmp_path) == ChatTemplate()
    with pytest.raises(ConfigError, match=TEMPLATE_FILE):
        load_chat_template(tmp_path, "declared")


def test_plain_ignores_a_declared_template(tmp_path: Path) -> None:
    (tmp_path / TEMPLATE_FILE).write_text(json.dumps(DECLARED))
    assert load_chat_template(tmp_path, "plain") == ChatTemplate()


@pytest.mark.parametrize(
    ("tree", "named"),
    [
        ([], "the template"),
        ({"role": {}}, "role"),
        ({"roles": []}, "roles"),
        ({"roles": {"tool": {}}}, "tool"),
        ({"roles": {"user": "x"}}, "roles.user"),
        ({"roles": {"user": {"prefix": 5}}}, "roles.user.prefix"),
        ({"roles": {"user": {"infix": ""}}}, "infix"),
        ({"generation_prefix": None}, "generation_prefix"),
        ({"stop": "x"}, "stop"),
        ({"stop": [5]}, "stop"),
    ],
)
def test_wrong_template_is_refused_by_name(tree: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse_chat_template(tree)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\udcff"])
def test_unreadable_template_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / TEMPLATE_FILE).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match="readable JSON"):
        load_chat_template(tmp_path)
