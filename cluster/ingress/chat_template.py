"""Turns a conversation into a prompt, by a template in Jinja, as other servers do.

A model directory has its template in `chat_template.jinja`, or as `chat_template` of
`tokenizer_config.json`. Without one, the prompt is the messages' contents joined by newlines: a
base model knows no turns.

A template is a program. It runs in the sandbox that transformers uses: it cannot change what it is
given, nor reach anything else. Its output and its time are bounded. It sees no clock, because a
prompt must be the same when a stream is resumed.

A template may write the tokens that begin and end a sequence. For it these are characters that no
text may have, so that a message cannot write them.
"""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, cast

from jinja2 import Template, TemplateError, TemplateSyntaxError, Undefined
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from milliways.model.errors import InvalidRequestError
from milliways.wire.errors import ConfigError
from milliways.wire.status_codes import Verbatim, abridged

TEMPLATE_FILE = "chat_template.jinja"
CONFIG_FILE = "tokenizer_config.json"
# The form of earlier versions.
OLD_FILE = "chat_template.json"
AUTO = "auto"
PLAIN = "plain"
PLAIN_SOURCE = "{{ messages | map(attribute='content') | join('\\n') }}"
# Unicode keeps these for programs' own use: no text has them.
BOS, EOS, _FINAL = "\ufdd0", "\ufdd1", "\ufdd2"
_OWN = (BOS, EOS, _FINAL)
# OpenAI's newer name for the system role, which most templates do not know.
_DEVELOPER, _SYSTEM = "developer", "system"
_MAX_FILE_BYTES = 1 << 20
_MAX_PROMPT_CHARS = 16 << 20
_TIMEOUT_S = 2.0
# What a template is given anyway; a client's variables do not replace it.
_GIVEN = frozenset(
    {"messages", "add_generation_prompt", "bos_token", "eos_token", "tools", "documents"}
)
# What a template's own code can raise, besides Jinja's errors.
_FAULTS = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a conversation; `more` are its other fields, as the client sent them."""

    role: str
    content: str
    more: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """How a template is used.

    With `continues_final`, the prompt ends where the last message's content does, and the answer
    goes on with that message. `variables` are more names that the template sees.
    """

    adds_generation_prompt: bool = True
    continues_final: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def check(self) -> None:
        """Raises InvalidRequestError if the options contradict each other or the template."""
        if self.continues_final and self.adds_generation_prompt:
            limit = "false with continue_final_message"
            raise InvalidRequestError("add_generation_prompt", True, limit)
        for name in self.variables:
            if name in _GIVEN:
                limit = f"without {name}, which the server sets"
                raise InvalidRequestError("chat_template_kwargs", abridged(name), limit)


@dataclass(frozen=True)
class ChatTemplate:
    """A template; the text of one without a model's own joins contents by newlines.

    Raises:
        ConfigError: the source is not a template.
    """

    source: str = PLAIN_SOURCE

    def __post_init__(self) -> None:
        try:
            assert self._template
        except TemplateSyntaxError as error:
            limit = f"a template in Jinja: line {error.lineno}: {error.message}"
            raise ConfigError("model.chat_template", Verbatim("the model's"), limit) from error

    @cached_property
    def _template(self) -> Template:
        # Its types are unknown in part.
        environment: Any = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], undefined=Undefined
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        return environment.from_string(self.source)

    def render(self, messages: Sequence[ChatMessage], options: ChatOptions | None = None) -> str:
        """The prompt of a conversation. BOS and EOS stand for the tokens of these names.

        Raises:
            InvalidRequestError: the template refuses the conversation, takes too long, or makes too
                much of it; or an option contradicts another.
        """
        options = options or ChatOptions(adds_generation_prompt=True)
        options.check()
        shown = [self._shown(message) for message in messages]
        _check_strings("messages", shown)
        _check_strings("chat_template_kwargs", dict(options.variables))
        if options.continues_final:
            shown[-1]["content"] += _FINAL
        variables = {
            **options.variables,
            "messages": shown,
            "add_generation_prompt": options.adds_generation_prompt,
            "bos_token": BOS,
            "eos_token": EOS,
        }
        try:
            prompt = _joined(self._template.generate(variables))
        except _FAULTS as error:
            limit = f"a conversation that the chat template takes: {error}"
            raise InvalidRequestError("messages", Verbatim("refused"), limit) from error
        if options.continues_final:
            return _up_to_final(prompt)
        return prompt

    def _shown(self, message: ChatMessage) -> dict[str, Any]:
        """A message as the template sees it."""
        knows_developer = _DEVELOPER in self.source
        is_system = message.role == _DEVELOPER and not knows_developer
        fields: dict[str, Any] = {"role": _SYSTEM if is_system else message.role}
        fields["content"] = message.content
        more = dict(message.more)
        if isinstance(more.get("tool_calls"), list):
            calls = cast(list[Mapping[str, Any]], more["tool_calls"])
            more["tool_calls"] = [_with_parsed_arguments(call) for call in calls]
        return fields | more


def _check_strings(field: str, value: Any) -> None:
    """Refuses characters that stand for control tokens, wherever a client has put them."""
    left = [value]
    while left:
        part = left.pop()
        if isinstance(part, str) and any(char in part for char in _OWN):
            limit = "Unicode without noncharacters"
            raise InvalidRequestError(field, Verbatim("U+FDD0..U+FDD2"), limit)
        if isinstance(part, Mapping):
            mapping = cast(Mapping[Any, Any], part)
            left += [*mapping, *mapping.values()]
        elif isinstance(part, list | tuple):
            left += cast(Sequence[Any], part)


def split_at_tokens(prompt: str) -> list[str]:
    """The texts of a prompt, with BOS and EOS as items of their own."""
    for char in (BOS, EOS):
        prompt = prompt.replace(char, f"{_FINAL}{char}{_FINAL}")
    return [part for part in prompt.split(_FINAL) if part]


def load_chat_template(model_dir: Path, setting: str = AUTO) -> ChatTemplate:
    """Loads the template that `ModelSettings.chat_template` asks for.

    Raises:
        ConfigError: a file is invalid, or missing although the setting requires it.
    """
    paths = [model_dir / name for name in (TEMPLATE_FILE, CONFIG_FILE)]
    is_read = setting != PLAIN
    contents = {path.name: _read(path) for path in paths if is_read and path.is_file()}
    return choose_chat_template(contents, model_dir, setting)


def choose_chat_template(
    contents: Mapping[str, bytes], model_dir: Path, setting: str = AUTO
) -> ChatTemplate:
    """The template that `ModelSettings.chat_template` asks for; `contents` are those of files.

    Raises:
        ConfigError: a content is invalid, or missing although the setting requires it.
    """
    if setting == PLAIN:
        return ChatTemplate()
    source = _declared(contents, model_dir)
    if source is not None:
        return ChatTemplate(source)
    old = model_dir / OLD_FILE
    if old.is_file():
        limit = f"{PLAIN!r}, or a model with {TEMPLATE_FILE}: {old} is not read any more"
        raise ConfigError("model.chat_template", setting, limit)
    if setting != AUTO:
        limit = f"{AUTO!r} or {PLAIN!r}, because {model_dir / TEMPLATE_FILE} does not exist"
        raise ConfigError("model.chat_template", setting, limit)
    return ChatTemplate()


def _declared(contents: Mapping[str, bytes], model_dir: Path) -> str | None:
    if TEMPLATE_FILE in contents:
        return _text(contents[TEMPLATE_FILE], model_dir / TEMPLATE_FILE)
    if CONFIG_FILE not in contents:
        return None
    path = model_dir / CONFIG_FILE
    try:
        config: Any = json.loads(_text(contents[CONFIG_FILE], path))
    except (ValueError, RecursionError) as error:
        raise ConfigError(str(path), "", f"a readable JSON file: {error}") from error
    template: Any = cast(dict[str, Any], config).get("chat_template") if _is_dict(config) else None
    if isinstance(template, list):
        # Several, by name.
        named = [each for each in cast(list[Any], template) if _is_dict(each)]
        template = next((t.get("template") for t in named if t.get("name") == "default"), None)
    if template is not None and not isinstance(template, str):
        raise ConfigError(f"{path}: chat_template", abridged(template), "a string")
    return template


def _is_dict(value: object) -> bool:
    return isinstance(value, dict)


def _text(content: bytes, path: Path) -> str:
    try:
        return content.decode()
    except ValueError as error:
        raise ConfigError(str(path), "", f"text in UTF-8: {error}") from error


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ConfigError(str(path), path.stat().st_size, f"at most {_MAX_FILE_BYTES} bytes")
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(str(path), "", f"a readable file: {error}") from error


def _joined(pieces: Iterable[str]) -> str:
    """The output of a template, within its limits; raises ValueError beyond them."""
    deadline_s = time.monotonic() + _TIMEOUT_S
    kept: list[str] = []
    num_chars = 0
    for piece in pieces:
        kept.append(piece)
        num_chars += len(piece)
        if num_chars > _MAX_PROMPT_CHARS:
            raise ValueError(f"it makes more than {_MAX_PROMPT_CHARS} characters of it")
        if time.monotonic() > deadline_s:
            raise ValueError(f"it takes longer than {_TIMEOUT_S:g} s")
    return "".join(kept)


def _up_to_final(prompt: str) -> str:
    before, found, _ = prompt.rpartition(_FINAL)
    if not found:
        limit = "false: the chat template does not show the last message"
        raise InvalidRequestError("continue_final_message", True, limit)
    return before.replace(_FINAL, "")


def _with_parsed_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call whose arguments are an object, as templates expect, if they are JSON."""
    function = call.get("function")
    if not isinstance(function, Mapping):
        return dict(call)
    fields = dict(cast(Mapping[str, Any], function))
    try:
        parsed: Any = json.loads(fields["arguments"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return dict(call)
    return dict(call) | {"function": fields | {"arguments": parsed}}


def _to_json(value: Any, indent: int | None = None, **_: Any) -> str:
    """Jinja's own filter would write HTML's entities."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
