"""The bodies of OpenAI's API: their declarations, and how raw bytes become one.

Types are strict: "5" and true are not numbers. pydantic checks fields of one type; `values` parses
those that may have several. What other servers' clients send besides is sifted out before
(`fields`).
"""

from collections.abc import Mapping
from typing import Any, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic_core import ErrorDetails, from_json

from milliways.cluster.ingress.openai.fields import (
    FOREIGN,
    FOREIGN_OF_CHAT,
    FOREIGN_OF_COMPLETIONS,
    FOREIGN_OF_MESSAGES,
    LABELS,
    LABELS_OF_MESSAGES,
    Foreign,
    Sifted,
    sift,
)
from milliways.cluster.ingress.served_model import ServedModel
from milliways.model.errors import InvalidRequestError
from milliways.model.sampling_params import PARAMETERS
from milliways.wire.status_codes import Verbatim, abridged


class StreamOptions(BaseModel):
    """`stream_options`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool | None = None
    # With it, each chunk has the usage so far.
    continuous_usage_stats: bool | None = None
    # Asks for padding that hides the length of tokens on encrypted streams. Changes no token.
    include_obfuscation: bool | None = None


AnyBody = TypeVar("AnyBody", bound=BaseModel)


def with_sampling_fields(kind: type[AnyBody]) -> type[AnyBody]:
    """The body with a field for each sampling parameter that has an option of its own."""
    fields: dict[str, Any] = {}
    for parameter in PARAMETERS:
        if parameter.has_own_option:
            # For the schema only: SamplingParams checks the bounds.
            schema: dict[str, Any] = {"minimum": parameter.least, "maximum": parameter.most}
            json_type = parameter.kind
            if json_type not in (float, int):
                # Keys of a JSON object are strings.
                json_type = dict[str, float]
                schema = {"additionalProperties": {"type": "number"} | schema}
            declared = Field(None, description=parameter.meaning, json_schema_extra=schema)
            fields[parameter.name] = (json_type | None, declared)
    return create_model(
        kind.__name__, __base__=kind, __doc__=kind.__doc__, __module__=__name__, **fields
    )


@with_sampling_fields
class CommonBody(BaseModel):
    """The fields that completions and chat share. Null means left out, as in OpenAI's API."""

    model_config = ConfigDict(strict=True, extra="forbid")

    # One model is served, so it may be left out.
    model: str | None = None
    max_tokens: int | None = None
    n: int | None = None
    best_of: int | None = None
    stop: Any = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Not in OpenAI's API: each choice also lists the ids of its tokens.
    return_token_ids: bool | None = None
    # vLLM's. TokenRules checks their bounds.
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    prompt_logprobs: int | None = None
    priority: int | None = None


class CompletionBody(CommonBody):
    """POST /v1/completions."""

    prompt: Any
    logprobs: int | None = None
    echo: bool | None = None


class MessageBody(BaseModel):
    """One message of a conversation, as clients send back what they got."""

    model_config = ConfigDict(strict=True, extra="forbid")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Any = None
    name: str | None = None
    # Of an assistant's message.
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    function_call: dict[str, Any] | None = None
    # Of a tool's message.
    tool_call_id: str | None = None


class TemplateFields(BaseModel):
    """What is asked of the chat template."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class ChatBody(CommonBody, TemplateFields):
    """POST /v1/chat/completions."""

    messages: list[MessageBody]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class TokenizeBody(TemplateFields):
    """POST /tokenize: a prompt, or a chat."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = None
    prompt: str | None = None
    messages: list[MessageBody] | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(BaseModel):
    """POST /detokenize."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = None
    tokens: list[int]


_FOREIGN_OF: Mapping[type[BaseModel], Mapping[str, Foreign]] = {
    CompletionBody: {**FOREIGN, **FOREIGN_OF_COMPLETIONS},
    ChatBody: {**FOREIGN, **FOREIGN_OF_CHAT},
    TokenizeBody: FOREIGN_OF_CHAT,
}


def _object(raw: bytes) -> dict[str, Any]:
    """The body as an object. The parser itself limits nesting and the length of numbers."""
    try:
        body = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequestError("body", Verbatim("malformed"), f"JSON: {error}") from error
    if not isinstance(body, dict):
        raise InvalidRequestError("body", abridged(body), "a JSON object")
    return cast(dict[str, Any], body)


def read_body(
    kind: type[AnyBody], raw: bytes, model: ServedModel, *, refuses_unknown: bool
) -> tuple[AnyBody, tuple[str, ...]]:
    """A body, and the names of fields that nobody knows.

    Raises:
        InvalidRequestError: a field is invalid or not supported, or unknown and `refuses_unknown`.
        UnknownModelError: another model is meant.
    """
    fields = _object(raw)
    name = fields.get("model")
    if isinstance(name, str):
        # First, because the limits of other fields depend on the model.
        model.check_name(name)
    sifted = _sifted(kind, fields)
    if sifted.unknown and refuses_unknown:
        name = sifted.unknown[0]
        value = abridged(fields[name]) if name in fields else Verbatim("given")
        raise InvalidRequestError(_short(name), value, "left out: there is no such field")
    try:
        return kind.model_validate(sifted.kept), sifted.unknown
    except ValidationError as error:
        raise _named(error.errors(include_url=False, include_context=False)[0]) from None


def _sifted(kind: type[BaseModel], fields: Mapping[str, Any]) -> Sifted:
    """The body without fields of other servers, in its messages and options too."""
    whole = sift(fields, kind.model_fields, _FOREIGN_OF.get(kind, {}), LABELS)
    unknown = list(whole.unknown)
    options = whole.kept.get("stream_options")
    if isinstance(options, dict):
        inner = sift(
            cast(dict[str, Any], options), StreamOptions.model_fields, {}, (), "stream_options."
        )
        whole.kept["stream_options"] = inner.kept
        unknown += inner.unknown
    messages = whole.kept.get("messages")
    if isinstance(messages, list):
        items = cast(list[object], messages)
        whole.kept["messages"] = [_sifted_message(item, unknown) for item in items]
    return Sifted(whole.kept, tuple(unknown))


def _sifted_message(message: object, unknown: list[str]) -> object:
    if not isinstance(message, dict):
        return message
    fields = cast(dict[str, Any], message)
    known = MessageBody.model_fields
    inner = sift(fields, known, FOREIGN_OF_MESSAGES, LABELS_OF_MESSAGES, "messages[].")
    unknown += inner.unknown
    return inner.kept


_LIMITS = {
    "missing": "given",
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "a string",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
}


def _named(fault: ErrorDetails) -> InvalidRequestError:
    """pydantic's error as one of ours."""
    name = ".".join(map(str, fault["loc"]))
    kind = fault["type"]
    value = Verbatim("(absent)") if kind == "missing" else abridged(fault["input"])
    limit = _LIMITS.get(kind, fault["msg"].removeprefix("Input should be "))
    return InvalidRequestError(_short(name), value, limit)


def _short(name: str) -> str:
    return name if len(name) < 100 else abridged(name)
