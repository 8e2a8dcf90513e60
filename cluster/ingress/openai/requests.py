"""Reads bodies of OpenAI's API as requests. Checks types first, then values, then the model.

Types are strict: "5" and true are not numbers. pydantic checks fields of one type. Fields that may
have several types (`prompt`, `stop`, `content`) are parsed by hand, so that an error names the one
place that is wrong, instead of all types that would have been right.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic_core import ErrorDetails, from_json

from milliways.cluster.ingress.chat_template import ChatMessage
from milliways.cluster.ingress.openai.fields import drop_foreign_fields
from milliways.cluster.ingress.request_id import seed_of
from milliways.cluster.ingress.served_model import ServedModel
from milliways.model.detokenizer import text_offsets
from milliways.model.errors import InvalidRequestError
from milliways.model.sampling_params import MAX_LOGPROBS, PARAMETERS, SamplingParams
from milliways.router.requests.request import MAX_SAMPLES, GenerationRequest
from milliways.wire.status_codes import Verbatim, abridged

DEFAULT_MAX_TOKENS = 16
MAX_PROMPTS = 64
MAX_CHOICES = 128
MAX_MESSAGES = 4096
# Log-probabilities of prompts, in all choices of an answer together: some 30 MB of JSON.
MAX_ECHOED_LOGPROBS = 1 << 20


class StreamOptions(BaseModel):
    """`stream_options`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool | None = None
    # Asks for padding that hides the length of tokens on encrypted streams. Changes no token.
    include_obfuscation: bool | None = None


AnyBody = TypeVar("AnyBody", bound="CommonBody")


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

    model: str
    max_tokens: int | None = None
    n: int | None = None
    best_of: int | None = None
    stop: Any = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Not in OpenAI's API: each choice also lists the ids of its tokens.
    return_token_ids: bool | None = None


class CompletionBody(CommonBody):
    """POST /v1/completions."""

    prompt: Any
    logprobs: int | None = None
    echo: bool | None = None


class MessageBody(BaseModel):
    """One message of a conversation. Fields that only answers have may be null."""

    model_config = ConfigDict(strict=True, extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: Any
    name: str | None = None
    refusal: None = None
    tool_calls: None = None
    function_call: None = None
    audio: None = None
    annotations: list[Any] | None = None


class ChatBody(CommonBody):
    """POST /v1/chat/completions."""

    messages: list[MessageBody]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request for each prompt of a body, and the form of the answer.

    Choice `i` is sample `i % n` of prompt `i // n`.
    """

    requests: tuple[GenerationRequest, ...]
    # For each prompt, the text before its completions: the prompt if the client wants it, or "".
    echoes: tuple[str, ...]
    # For each prompt, where its tokens begin in its echo; empty unless the prompt is scored.
    echo_offsets: tuple[tuple[int, ...], ...]
    wants_logprobs: bool
    wants_token_ids: bool
    stream: bool
    include_usage: bool

    @property
    def num_samples(self) -> int:
        return self.requests[0].num_samples

    @property
    def draws_nothing(self) -> bool:
        """Whether prompts are only scored."""
        return self.requests[0].max_tokens == 0

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(request.prompt_ids) for request in self.requests)


def completion_ask(raw: bytes, model: ServedModel, request_id: str) -> Ask:
    """Reads the body of a completion. Long prompts take long: do not call it in the event loop.

    Raises:
        InvalidRequestError: a field is invalid; the error names it, its value and limit.
        UnknownModelError: another model is meant.
    """
    body = _validated(CompletionBody, _object(raw), model)
    _check_range("logprobs", body.logprobs, 0, MAX_LOGPROBS)
    prompts = parse_prompts(body.prompt)
    prompt_ids = [model.encode(p) if isinstance(p, str) else p for p in prompts]
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    echoes = [p if isinstance(p, str) else model.echo(_known(p, model)) for p in prompts]
    ask = _ask(
        body,
        model,
        request_id,
        prompt_ids,
        max_tokens=[max_tokens] * len(prompts),
        stop=parse_stop(body.stop),
        num_logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
        echoes=echoes if body.echo else [""] * len(prompts),
    )
    if ask.requests[0].prompt_logprobs is None:
        return ask
    _check_echo(ask, ask.requests[0].prompt_logprobs)
    return replace(ask, echo_offsets=tuple(_echo_offsets(ask, model)))


def chat_ask(raw: bytes, model: ServedModel, request_id: str) -> Ask:
    """Reads the body of a chat completion. Do not call it in the event loop either.

    Raises:
        InvalidRequestError: a field is invalid; the error names it, its value and limit.
        UnknownModelError: another model is meant.
    """
    body = _validated(ChatBody, _object(raw), model)
    _check_range("top_logprobs", body.top_logprobs, 0, MAX_LOGPROBS)
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequestError("top_logprobs", body.top_logprobs, "left out without logprobs")
    if not 0 < len(body.messages) <= MAX_MESSAGES:
        limit = f"1 to {MAX_MESSAGES} messages"
        raise InvalidRequestError("messages", Verbatim(f"{len(body.messages)} of them"), limit)
    messages = [
        ChatMessage(message.role, parse_content(f"messages.{i}.content", message.content))
        for i, message in enumerate(body.messages)
    ]
    prompt_ids = model.encode(model.chat_template.render(messages))
    max_tokens = body.max_tokens
    if body.max_completion_tokens is not None:
        max_tokens = body.max_completion_tokens
        _check_range("max_completion_tokens", max_tokens, 1, None)
    if max_tokens is None:
        max_tokens = max(1, model.config.sequence_len - len(prompt_ids))
    return _ask(
        body,
        model,
        request_id,
        [prompt_ids],
        max_tokens=[max_tokens],
        stop=(*parse_stop(body.stop), *model.chat_template.stop),
        num_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=None,
        echoes=[""],
    )


def _ask(
    body: CommonBody,
    model: ServedModel,
    request_id: str,
    prompts: Sequence[tuple[int, ...]],
    *,
    max_tokens: Sequence[int],
    stop: tuple[str, ...],
    num_logprobs: int | None,
    prompt_logprobs: int | None,
    echoes: Sequence[str],
) -> Ask:
    num_samples = _num_samples(body, len(prompts))
    if body.stream_options is not None and not body.stream:
        raise InvalidRequestError("stream_options", "given", "left out without stream")
    requests = tuple(
        GenerationRequest(
            prompt_ids=prompt_ids,
            # More tokens than the context holds cannot be drawn.
            max_tokens=min(max_tokens, model.config.sequence_len),
            sampling=_sampling(body, num_logprobs or 0, seed_of(request_id, i)),
            num_samples=num_samples,
            stop=stop,
            ignore_eos=body.ignore_eos or False,
            prompt_logprobs=prompt_logprobs,
        )
        for i, (prompt_ids, max_tokens) in enumerate(zip(prompts, max_tokens, strict=True))
    )
    for request in requests:
        request.check_fits(model.config)
    return Ask(
        requests=requests,
        echoes=tuple(echoes),
        echo_offsets=(),
        wants_logprobs=num_logprobs is not None,
        wants_token_ids=body.return_token_ids or False,
        stream=body.stream or False,
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
    )


def _check_echo(ask: Ask, num_logprobs: int) -> None:
    """Limits the answer's size: every choice repeats the log-probabilities of its prompt."""
    number = ask.num_prompt_tokens * ask.num_samples * (1 + num_logprobs)
    if number > MAX_ECHOED_LOGPROBS:
        limit = f"at most {MAX_ECHOED_LOGPROBS} of the prompts in all choices of an answer"
        raise InvalidRequestError("logprobs", Verbatim(f"{number} of the prompts"), limit)


def _echo_offsets(ask: Ask, model: ServedModel) -> Iterator[tuple[int, ...]]:
    """Token offsets in each echo. The tokens of a text may decode to a slightly different text."""
    for request, echo in zip(ask.requests, ask.echoes, strict=True):
        offsets = text_offsets(model.echo_pieces(request.prompt_ids))
        yield tuple(min(offset, len(echo)) for offset in offsets)


def _num_samples(body: CommonBody, num_prompts: int) -> int:
    num_samples = 1 if body.n is None else body.n
    _check_range("n", num_samples, 1, min(MAX_SAMPLES, MAX_CHOICES // num_prompts))
    if body.best_of is not None and body.best_of != num_samples:
        raise InvalidRequestError("best_of", body.best_of, f"n = {num_samples}, or left out")
    return num_samples


def _sampling(body: CommonBody, num_logprobs: int, own_seed: int) -> SamplingParams:
    # The seed is chosen here: every process that takes the request over needs the same one.
    fields: dict[str, Any] = {"seed": own_seed, "num_logprobs": num_logprobs}
    for parameter in PARAMETERS:
        value = getattr(body, parameter.name, None)
        if value is not None:
            is_mapping = parameter.kind not in (float, int)
            fields[parameter.name] = parse_logit_bias(value) if is_mapping else value
    return SamplingParams(**fields)


def parse_prompts(value: object) -> list[str | tuple[int, ...]]:
    """The prompts of a completion: a text, a list of token ids, or a list of either.

    Raises:
        InvalidRequestError: an item is invalid; the error names its place in the list.
    """
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise InvalidRequestError("prompt", abridged(value), "a string or a list")
    items = cast(list[object], value)
    if items and type(items[0]) is int:
        return [_token_ids("prompt", items)]
    if not 0 < len(items) <= MAX_PROMPTS:
        number = Verbatim(f"{len(items)} prompts")
        raise InvalidRequestError("prompt", number, f"1 to {MAX_PROMPTS} prompts")
    if isinstance(items[0], str):
        return [_text(f"prompt.{i}", item) for i, item in enumerate(items)]
    return [_token_ids(f"prompt.{i}", item) for i, item in enumerate(items)]


def parse_stop(value: object) -> tuple[str, ...]:
    """Stop strings, given as none, one, or a list. The request checks their number and length."""
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        raise InvalidRequestError("stop", abridged(value), "a string or a list of strings")
    items = cast(list[object], value)
    return tuple(_text(f"stop.{i}", item) for i, item in enumerate(items))


def parse_content(name: str, value: object) -> str:
    """A message's text, given as a string or as a list of text parts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise InvalidRequestError(name, abridged(value), "a string or a list of text parts")
    parts = cast(list[object], value)
    return "".join(_part_text(f"{name}.{i}", part) for i, part in enumerate(parts))


def parse_logit_bias(value: Mapping[str, float]) -> dict[int, float]:
    """Biases by token id. In JSON, the token ids are strings."""
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 10):
            raise InvalidRequestError("logit_bias", abridged(key), "keyed by token ids")
        biases[int(key)] = bias
    return biases


def _part_text(name: str, part: object) -> str:
    if not isinstance(part, dict):
        raise InvalidRequestError(name, abridged(part), "an object")
    fields = cast(dict[str, object], part)
    if fields.get("type") != "text":
        raise InvalidRequestError(f"{name}.type", abridged(fields.get("type")), "'text'")
    return _text(f"{name}.text", fields.get("text"))


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise InvalidRequestError(name, abridged(value), "a string")
    return value


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise InvalidRequestError(name, abridged(value), "a list of token ids")
    items = cast(list[object], value)
    for i, item in enumerate(items):
        if type(item) is not int:
            raise InvalidRequestError(f"{name}.{i}", abridged(item), "a token id")
    return tuple(cast(list[int], items))


def _known(token_ids: tuple[int, ...], model: ServedModel) -> tuple[int, ...]:
    """Token ids inside the vocabulary. The request refuses the others later, by name."""
    vocab_size = model.config.vocab_size
    return tuple(token_id for token_id in token_ids if 0 <= token_id < vocab_size)


def _check_range(name: str, value: int | None, least: int, most: int | None) -> None:
    if value is None or (least <= value and (most is None or value <= most)):
        return
    limit = f"at least {least}" if most is None else f"between {least} and {most}"
    raise InvalidRequestError(name, value, limit)


def _object(raw: bytes) -> dict[str, Any]:
    """The body as an object. The parser itself limits nesting and the length of numbers."""
    try:
        body = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequestError("body", Verbatim("malformed"), f"JSON: {error}") from error
    if not isinstance(body, dict):
        raise InvalidRequestError("body", abridged(body), "a JSON object")
    return cast(dict[str, Any], body)


def _validated(kind: type[AnyBody], fields: dict[str, Any], model: ServedModel) -> AnyBody:
    name = fields.get("model")
    if isinstance(name, str):
        # First, because the limits of other fields depend on the model.
        model.check_name(name)
    try:
        return kind.model_validate(drop_foreign_fields(fields))
    except ValidationError as error:
        raise _named(error.errors(include_url=False, include_context=False)[0]) from None


_LIMITS = {
    "missing": "given",
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "a string",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "none_required": "left out: it is not supported",
    "extra_forbidden": "left out: there is no such field",
}


def _named(fault: ErrorDetails) -> InvalidRequestError:
    """pydantic's error as one of ours."""
    name = ".".join(map(str, fault["loc"]))
    kind = fault["type"]
    value = Verbatim("(absent)") if kind == "missing" else abridged(fault["input"])
    limit = _LIMITS.get(kind, fault["msg"].removeprefix("Input should be "))
    return InvalidRequestError(name if len(name) < 100 else abridged(name), value, limit)
