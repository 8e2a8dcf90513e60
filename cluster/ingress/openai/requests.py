"""Bodies of OpenAI's API into requests of ours: types first, then values, then the model.

Types are strict: "5" and true are no numbers. pydantic checks the flat fields; what OpenAI lets be
one of several types (`prompt`, `stop`, `content`) is taken apart by hand, so that an error names
the one place that is wrong and not every type that it might have been.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails, from_json

from milliways.cluster.ingress.chat_template import ChatMessage
from milliways.cluster.ingress.openai.fields import drop_foreign_fields
from milliways.cluster.ingress.request_id import seed_of
from milliways.cluster.ingress.served_model import ServedModel
from milliways.model.detokenizer import text_offsets
from milliways.model.errors import InvalidRequestError
from milliways.model.sampling_params import MAX_LOGPROBS, SamplingParams
from milliways.router.requests.request import MAX_SAMPLES, GenerationRequest
from milliways.wire.status_codes import Verbatim, abridged

DEFAULT_MAX_TOKENS = 16
MAX_PROMPTS = 64
MAX_CHOICES = 128
MAX_MESSAGES = 4096
# Of prompts, in all choices of an answer together; some 30 MB of JSON.
MAX_ECHOED_LOGPROBS = 1 << 20


class StreamOptions(BaseModel):
    """`stream_options`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool | None = None
    # Padding against eavesdroppers on encrypted streams; it changes no token.
    include_obfuscation: bool | None = None


class CommonBody(BaseModel):
    """What completions and chat share. Null means left out, as at OpenAI."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str
    max_tokens: int | None = None
    n: int | None = None
    best_of: int | None = None
    stop: Any = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Not OpenAI's: choices name their tokens by id as well.
    return_token_ids: bool | None = None


class CompletionBody(CommonBody):
    """POST /v1/completions."""

    prompt: Any
    logprobs: int | None = None
    echo: bool | None = None


class MessageBody(BaseModel):
    """One message of a conversation; the fields of an answer may come back as null."""

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
    """What a client asked for: one request for each prompt, and how to show what comes.

    Choice `i` is sample `i % n` of prompt `i // n`.
    """

    requests: tuple[GenerationRequest, ...]
    # The text before each prompt's completions, where the client wants its prompt back.
    echoes: tuple[str, ...]
    # Where each of a prompt's tokens begins in its echo, where log-probabilities come with it.
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
        """Whether the prompts are only scored."""
        return self.requests[0].max_tokens == 0

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(request.prompt_ids) for request in self.requests)


AnyBody = TypeVar("AnyBody", bound=CommonBody)


def completion_ask(raw: bytes, model: ServedModel, request_id: str) -> Ask:
    """Reads the body of a completion. Takes long for a long prompt: not for the event loop.

    Raises:
        InvalidRequestError: names field, value and limit.
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
    """Reads the body of a chat completion. Takes long for a long prompt: not for the event loop.

    Raises:
        InvalidRequestError: names field, value and limit.
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
            # More than the context holds is all that it holds.
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
    """A prompt is scored once, but its log-probabilities are told with each of its choices."""
    number = ask.num_prompt_tokens * ask.num_samples * (1 + num_logprobs)
    if number > MAX_ECHOED_LOGPROBS:
        limit = f"at most {MAX_ECHOED_LOGPROBS} of the prompts in all choices of an answer"
        raise InvalidRequestError("logprobs", Verbatim(f"{number} of the prompts"), limit)


def _echo_offsets(ask: Ask, model: ServedModel) -> Iterator[tuple[int, ...]]:
    """Of each prompt, as its tokens give it back, which of a text need not be to the letter."""
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
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty")
    given = {
        name: value
        for name in (*names, "frequency_penalty", "seed")
        if (value := getattr(body, name)) is not None
    }
    # Made here, and not by whoever computes: whoever takes a request over needs the same.
    given.setdefault("seed", own_seed)
    bias = parse_logit_bias(body.logit_bias or {})
    return SamplingParams(**given, logit_bias=bias, num_logprobs=num_logprobs)


def parse_prompts(value: object) -> list[str | tuple[int, ...]]:
    """The prompts of a completion: a text, token ids, or several of one of them.

    Raises:
        InvalidRequestError: names the place in the list.
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
    """Stop strings: none, one, or a list; what a request checks further."""
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        raise InvalidRequestError("stop", abridged(value), "a string or a list of strings")
    items = cast(list[object], value)
    return tuple(_text(f"stop.{i}", item) for i, item in enumerate(items))


def parse_content(name: str, value: object) -> str:
    """A message's text: a string, or parts of type text."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise InvalidRequestError(name, abridged(value), "a string or a list of text parts")
    parts = cast(list[object], value)
    return "".join(_part_text(f"{name}.{i}", part) for i, part in enumerate(parts))


def parse_logit_bias(value: Mapping[str, float]) -> dict[int, float]:
    """JSON has only strings for keys; they are token ids."""
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
    """Token ids that can be shown; the others are refused by name a moment later."""
    vocab_size = model.config.vocab_size
    return tuple(token_id for token_id in token_ids if 0 <= token_id < vocab_size)


def _check_range(name: str, value: int | None, least: int, most: int | None) -> None:
    if value is None or (least <= value and (most is None or value <= most)):
        return
    limit = f"at least {least}" if most is None else f"between {least} and {most}"
    raise InvalidRequestError(name, value, limit)


def _object(raw: bytes) -> dict[str, Any]:
    """The body as an object. The parser bounds nesting and the length of numbers by itself."""
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
        # First of all: whether another field is right depends on the model.
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
    """pydantic's complaint in our words."""
    name = ".".join(map(str, fault["loc"]))
    kind = fault["type"]
    value = Verbatim("(absent)") if kind == "missing" else abridged(fault["input"])
    limit = _LIMITS.get(kind, fault["msg"].removeprefix("Input should be "))
    return InvalidRequestError(name if len(name) < 100 else abridged(name), value, limit)
