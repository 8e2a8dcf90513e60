"""Turns a conversation into a prompt. A template is data, never code.

A base model knows no turns. Without a template, the prompt is the messages' contents joined by
newlines, and the completion follows directly. A model directory can declare a template in
`chat_template.json`:

    {
      "roles": {
        "system":    {"prefix": "",             "suffix": "\\n\\n"},
        "user":      {"prefix": "Human: ",      "suffix": "\\n"},
        "assistant": {"prefix": "Assistant: ",  "suffix": "\\n"}
      },
      "generation_prefix": "Assistant: ",
      "stop": ["\\nHuman:"]
    }

Then each message becomes prefix + content + suffix, and `generation_prefix` ends the prompt. The
strings of `stop` are added to the request's own stop strings.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from milliways.model.errors import InvalidRequestError
from milliways.wire.errors import ConfigError

TEMPLATE_FILE = "chat_template.json"
AUTO = "auto"
PLAIN = "plain"
ROLES = ("system", "user", "assistant", "tool", "function")
# OpenAI's newer name for the system role.
_ALIASES = {"developer": "system"}
_MAX_FILE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class RoleAffixes:
    """The text before and after each message of a role."""

    prefix: str = ""
    suffix: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTemplate:
    """How messages become one text. Without roles, their contents are joined by newlines."""

    roles: Mapping[str, RoleAffixes] = field(default_factory=dict[str, RoleAffixes])
    generation_prefix: str = ""
    stop: tuple[str, ...] = ()

    @property
    def source(self) -> str | None:
        """The template in Jinja, which is what other programs know."""
        return None

    def render(self, messages: Iterable[ChatMessage]) -> str:
        """Builds the prompt of a conversation.

        Raises:
            InvalidRequestError: the template does not have the role of a message.
        """
        if not self.roles:
            return "\n".join(message.content for message in messages) + self.generation_prefix
        return "".join(map(self._render_message, messages)) + self.generation_prefix

    def _render_message(self, message: ChatMessage) -> str:
        affixes = self.roles.get(_ALIASES.get(message.role, message.role))
        if affixes is None:
            raise InvalidRequestError("role", message.role, f"one of {', '.join(self.roles)}")
        return affixes.prefix + message.content + affixes.suffix


def load_chat_template(model_dir: Path, setting: str = AUTO) -> ChatTemplate:
    """Loads the template that `ModelSettings.chat_template` asks for.

    Raises:
        ConfigError: the file is invalid, or missing although the setting requires it.
    """
    path = model_dir / TEMPLATE_FILE
    is_read = setting != PLAIN and path.is_file()
    return choose_chat_template(_read(path) if is_read else None, path, setting)


def choose_chat_template(content: bytes | None, path: Path, setting: str) -> ChatTemplate:
    """The template that `ModelSettings.chat_template` asks for; `content` is that of the file.

    Raises:
        ConfigError: the content is invalid, or missing although the setting requires it.
    """
    if setting == PLAIN or (setting == AUTO and content is None):
        return ChatTemplate()
    if content is None:
        limit = f"{AUTO!r} or {PLAIN!r}, because {path} does not exist"
        raise ConfigError("model.chat_template", setting, limit)
    try:
        tree = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(str(path), "", f"a readable JSON file: {error}") from error
    return parse_chat_template(tree)


def parse_chat_template(tree: object) -> ChatTemplate:
    """Builds the template of a parsed file.

    Raises:
        ConfigError: a field is invalid; the error names it, its value and limit.
    """
    fields = _table("the template", tree, ("roles", "generation_prefix", "stop"))
    roles = _table("roles", fields.get("roles", {}), ROLES)
    stop = fields.get("stop", [])
    if not isinstance(stop, list):
        raise ConfigError(f"{TEMPLATE_FILE}: stop", stop, "a list of strings")
    return ChatTemplate(
        roles={role: _affixes(role, affixes) for role, affixes in roles.items()},
        generation_prefix=_text("generation_prefix", fields.get("generation_prefix", "")),
        stop=tuple(_text("stop", text) for text in cast(list[object], stop)),
    )


def _affixes(role: str, tree: object) -> RoleAffixes:
    fields = _table(f"roles.{role}", tree, ("prefix", "suffix"))
    return RoleAffixes(
        **{name: _text(f"roles.{role}.{name}", text) for name, text in fields.items()}
    )


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ConfigError(str(path), path.stat().st_size, f"at most {_MAX_FILE_BYTES} bytes")
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(str(path), "", f"a readable JSON file: {error}") from error


def _table(name: str, tree: object, allowed: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(tree, dict):
        raise ConfigError(f"{TEMPLATE_FILE}: {name}", tree, "an object")
    table = cast(dict[str, Any], tree)
    for key in table:
        if key not in allowed:
            raise ConfigError(f"{TEMPLATE_FILE}: {name}", key, f"one of {', '.join(allowed)}")
    return table


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{TEMPLATE_FILE}: {name}", value, "a string")
    return value
