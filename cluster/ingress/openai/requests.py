"""Turns bodies of OpenAI's API into requests. Checks types first, then values, then the model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from milliways.cluster.ingress.chat_template import ChatMessage, ChatOptions
from milliways.cluster.ingress.openai.bodies import (
    ChatBody,
    CommonBody,
    CompletionBody,
    MessageBody,
    StreamOptions,
    TokenizeBody,
    read_body,
)
from milliways.cluster.ingress.openai.values import (
    check_range,
    parse_content,
    parse_logit_bias,
    parse_prompts,
    parse_stop,
)
from milliways.cluster.ingress.request_id import seed_of
from milliways.cluster.ingress.served_model import ServedModel
from milliways.model.detokenizer import text_offsets
from milliways.model.errors import InvalidRequestError
from milliways.model.sampling_params import MAX_LOGPROBS, PARAMETERS, SamplingParams
from milliways.router.requests.request import MAX_SAMPLES, GenerationRequest
from milliways.router.requests.rules import TokenRules
from milliways.wire.status_codes import Verbatim

DEFAULT_MAX_TOKENS = 16
MAX_CHOICES = 128
MAX_MESSAGES = 4096
# Log-probabilities of prompts, in all choices of an answer together: some 30 MB of JSON.
MAX_ECHOED_LOGPROBS = 1 << 20
# Who may send a message without text: the others have nothing else.
_MAY_BE_EMPTY = ("assistant", "tool", "function")


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
    # Each chunk has the usage so far.
    continuous_usage: bool = False
    # Of the samples of each prompt, so many are returned: those with the best log-probabilities.
    num_best: int = 1
    # The most likely tokens that come with those of the prompt; None: the prompt's are not wanted.
    prompt_logprobs: int | None = None
    # The same for echoes of completions.
    echoed_logprobs: int | None = None
    # Fields of the body that nobody knows.
    ignored_fields: tuple[str, ...] = ()

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


def completion_ask(
    raw: bytes, model: ServedModel, request_id: str, *, refuses_unknown: bool = False
) -> Ask:
    """Reads the body of a completion. Long prompts take long: do not call it in the event loop.

    `refuses_unknown` says what is done with a field that nobody knows.

    Raises:
        InvalidRequestError: a field is invalid; the error names it, its value and limit.
        UnknownModelError: another model is meant.
    """
    body, ignored = read_body(CompletionBody, raw, model, refuses_unknown=refuses_unknown)
    check_range("logprobs", body.logprobs, 0, MAX_LOGPROBS)
    prompts = parse_prompts(body.prompt)
    all_ids = [model.encode(p) if isinstance(p, str) else p for p in prompts]
    prompt_ids = [model.truncated(ids, body.truncate_prompt_tokens) for ids in all_ids]
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    # The client's own text, unless it was cut: its tokens may decode to another one.
    echoes = [
        text if isinstance(text, str) and kept == ids else model.echo(_known(kept, model))
        for text, ids, kept in zip(prompts, all_ids, prompt_ids, strict=True)
    ]
    ask = _ask(
        body,
        ignored,
        model,
        request_id,
        prompt_ids,
        max_tokens=[max_tokens] * len(prompts),
        stop=parse_stop(body.stop),
        num_logprobs=body.logprobs,
        echoed_logprobs=body.logprobs if body.echo else None,
        echoes=echoes if body.echo else [""] * len(prompts),
    )
    if ask.echoed_logprobs is None:
        return ask
    return replace(ask, echo_offsets=tuple(_echo_offsets(ask, model)))


def chat_ask(
    raw: bytes, model: ServedModel, request_id: str, *, refuses_unknown: bool = False
) -> Ask:
    """Reads the body of a chat completion, as `completion_ask` does.

    Raises:
        InvalidRequestError: a field is invalid; the error names it, its value and limit.
        UnknownModelError: another model is meant.
    """
    body, ignored = read_body(ChatBody, raw, model, refuses_unknown=refuses_unknown)
    check_range("top_logprobs", body.top_logprobs, 0, MAX_LOGPROBS)
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequestError("top_logprobs", body.top_logprobs, "left out without logprobs")
    prompt_ids = model.truncated(
        chat_prompt(body, body.messages, model), body.truncate_prompt_tokens
    )
    max_tokens = body.max_tokens
    if body.max_completion_tokens is not None:
        max_tokens = body.max_completion_tokens
        check_range("max_completion_tokens", max_tokens, 1, None)
    if max_tokens is None:
        max_tokens = max(1, model.config.sequence_len - len(prompt_ids))
    return _ask(
        body,
        ignored,
        model,
        request_id,
        [prompt_ids],
        max_tokens=[max_tokens],
        stop=parse_stop(body.stop),
        num_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        echoed_logprobs=None,
        echoes=[""],
    )


def _ask(
    body: CommonBody,
    ignored_fields: tuple[str, ...],
    model: ServedModel,
    request_id: str,
    prompts: Sequence[tuple[int, ...]],
    *,
    max_tokens: Sequence[int],
    stop: tuple[str, ...],
    num_logprobs: int | None,
    echoed_logprobs: int | None,
    echoes: Sequence[str],
) -> Ask:
    num_best, num_samples = _num_samples(body, len(prompts))
    options = body.stream_options or StreamOptions()
    if body.stream_options is not None and not body.stream:
        raise InvalidRequestError("stream_options", "given", "left out without stream")
    _check_more(body)
    wanted = [k for k in (echoed_logprobs, body.prompt_logprobs) if k is not None]
    rules = _rules(body, model)
    requests = tuple(
        GenerationRequest(
            prompt_ids=prompt_ids,
            # More tokens than the context holds cannot be drawn.
            max_tokens=min(max_tokens, model.config.sequence_len),
            sampling=_sampling(body, num_logprobs or 0, seed_of(request_id, i)),
            num_samples=num_samples,
            stop=stop,
            ignore_eos=body.ignore_eos or False,
            prompt_logprobs=max(wanted, default=None),
            rules=rules,
        )
        for i, (prompt_ids, max_tokens) in enumerate(zip(prompts, max_tokens, strict=True))
    )
    for request in requests:
        request.check_fits(model.config)
    ask = Ask(
        requests=requests,
        echoes=tuple(echoes),
        echo_offsets=(),
        wants_logprobs=num_logprobs is not None,
        wants_token_ids=body.return_token_ids or False,
        stream=body.stream or False,
        include_usage=options.include_usage or False,
        continuous_usage=bool(options.include_usage and options.continuous_usage_stats),
        num_best=num_best,
        prompt_logprobs=body.prompt_logprobs,
        echoed_logprobs=echoed_logprobs,
        ignored_fields=ignored_fields,
    )
    if wanted:
        _check_echo(ask, max(wanted))
    return ask


def _check_more(body: CommonBody) -> None:
    """Checks fields that mean nothing to a request for tokens."""
    check_range("prompt_logprobs", body.prompt_logprobs, 0, MAX_LOGPROBS)
    if body.prompt_logprobs is not None and body.stream:
        limit = "left out with stream; completions stream them with echo and logprobs"
        raise InvalidRequestError("prompt_logprobs", body.prompt_logprobs, limit)
    if body.priority:
        raise InvalidRequestError("priority", body.priority, "0: there are no priorities")


def _rules(body: CommonBody, model: ServedModel) -> TokenRules:
    if body.allowed_token_ids == []:
        raise InvalidRequestError("allowed_token_ids", [], "left out, or at least one token id")
    return TokenRules(
        min_tokens=body.min_tokens or 0,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        allowed_token_ids=tuple(body.allowed_token_ids or ()),
        bad_words=model.bad_word_runs(body.bad_words or ()),
        includes_stop=body.include_stop_str_in_output or False,
        shows_special=body.skip_special_tokens is False,
        spaces_special=body.spaces_between_special_tokens is not False,
    )


def chat_prompt(
    body: ChatBody | TokenizeBody, messages: Sequence[MessageBody], model: ServedModel
) -> tuple[int, ...]:
    """The tokens of a chat's prompt.

    Raises:
        InvalidRequestError: a message or an option is invalid.
    """
    if not 0 < len(messages) <= MAX_MESSAGES:
        limit = f"1 to {MAX_MESSAGES} messages"
        raise InvalidRequestError("messages", Verbatim(f"{len(messages)} of them"), limit)
    turns = [_message(i, message) for i, message in enumerate(messages)]
    options = ChatOptions(
        adds_generation_prompt=body.add_generation_prompt is not False,
        continues_final=body.continue_final_message or False,
        variables=body.chat_template_kwargs or {},
    )
    return model.encode_chat(model.chat_template.render(turns, options))


def _message(index: int, body: MessageBody) -> ChatMessage:
    name = f"messages.{index}.content"
    more = body.model_dump(exclude={"role", "content"}, exclude_none=True)
    if body.content is None and body.role in _MAY_BE_EMPTY:
        return ChatMessage(body.role, "", more)
    if "content" not in body.model_fields_set:
        raise InvalidRequestError(name, Verbatim("(absent)"), "given")
    return ChatMessage(body.role, parse_content(name, body.content), more)


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


def _num_samples(body: CommonBody, num_prompts: int) -> tuple[int, int]:
    """How many samples of each prompt are returned, and how many are drawn."""
    most = min(MAX_SAMPLES, MAX_CHOICES // num_prompts)
    num_best = 1 if body.n is None else body.n
    check_range("n", num_best, 1, most)
    num_samples = num_best if body.best_of is None else body.best_of
    check_range("best_of", num_samples, num_best, most)
    if num_samples > num_best and body.stream:
        limit = f"n = {num_best} with stream: which are best is known at the end"
        raise InvalidRequestError("best_of", num_samples, limit)
    return num_best, num_samples


def _sampling(body: CommonBody, num_logprobs: int, own_seed: int) -> SamplingParams:
    # The seed is chosen here: every process that takes the request over needs the same one.
    fields: dict[str, Any] = {"seed": own_seed, "num_logprobs": num_logprobs}
    for parameter in PARAMETERS:
        value = getattr(body, parameter.name, None)
        if value is not None:
            is_mapping = parameter.kind not in (float, int)
            fields[parameter.name] = parse_logit_bias(value) if is_mapping else value
    if -(2**63) <= fields["seed"] < 0:
        # Any whole number of 64 bits is a seed, with a sign or without.
        fields["seed"] += 2**64
    return SamplingParams(**fields)


def _known(token_ids: tuple[int, ...], model: ServedModel) -> tuple[int, ...]:
    """Token ids inside the vocabulary. The request refuses the others later, by name."""
    vocab_size = model.config.vocab_size
    return tuple(token_id for token_id in token_ids if 0 <= token_id < vocab_size)
