"""`milliways generate PROMPT`: continues a prompt in this process and streams the text."""

import argparse
import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from milliways.cluster.cli.commands.options import add_model_options, parse_token_ids
from milliways.cluster.host.local import (
    LocalModel,
    cache_size_for,
    load_local_model,
    make_local_engine,
    wanted_kernels,
)
from milliways.model.detokenizer import prompt_pieces, text_offsets
from milliways.model.errors import InvalidRequestError, NonFiniteLogitsError, TokenizerError
from milliways.model.model_dir import DEMO_NAME, resolve_model_dir
from milliways.model.sampling_params import PARAMETERS, Parameter, SampledToken, SamplingParams
from milliways.model.tokenizer import Tokenizer
from milliways.router.requests.request import GenerationRequest
from milliways.router.requests.sequence import FinishReason, PromptScores, TokenEvent

# Defaults of this command that differ from the API's defaults.
_DEFAULTS = {"temperature": 0.7}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument(
        "prompt", nargs="?", metavar="PROMPT", help="text to continue; '-' reads it from stdin"
    )
    parser.add_argument("--tokens", metavar="1,2,3", help="token ids to continue, instead of text")
    add_model_options(parser, default_model=DEMO_NAME)
    option = parser.add_argument
    option(
        "--max-tokens",
        type=int,
        default=256,
        metavar="N",
        help="maximum number of tokens to draw; 0 with --echo and --logprobs only scores the prompt"
        " [%(default)s]",
    )
    for parameter in PARAMETERS:
        if parameter.has_own_option:
            _add_sampling_option(parser, parameter)
    option(
        "--stop",
        action="append",
        default=[],
        metavar="S",
        help="text that ends the completion; may be given several times",
    )
    option("--n", type=int, default=1, metavar="N", help="number of samples [%(default)s]")
    option(
        "--logprobs",
        type=int,
        metavar="K",
        help="report log-probabilities and the K most likely tokens of each position, with --json",
    )
    option("--echo", action="store_true", help="begin the output with the prompt")
    option("--ignore-eos", action="store_true", help="continue after the end-of-sequence token")
    option("--json", action="store_true", help="print one JSON object at the end")


def _add_sampling_option(parser: argparse.ArgumentParser, parameter: Parameter) -> None:
    flag = f"--{parameter.name.replace('_', '-')}"
    if parameter.kind in (float, int):
        parser.add_argument(
            flag,
            type=parameter.kind,
            default=_DEFAULTS.get(parameter.name, parameter.default),
            metavar=parameter.metavar,
            help=f"{parameter.meaning} [%(default)s]",
        )
    else:
        parser.add_argument(
            flag,
            action="append",
            default=[],
            metavar=parameter.metavar,
            help=f"{parameter.meaning}; may be given several times",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What each choice begins with: the prompt if `--echo` is given, otherwise nothing."""

    token_ids: tuple[int, ...] = ()
    text: str = ""
    text_offsets: tuple[int, ...] = ()


@dataclass(slots=True)
class Choice:
    """One sample while it grows.

    Invariant: `text` is the text of `prompt` and of all `events`. `text_offsets` has the position
    in `text` at which each event begins.
    """

    prompt: Prompt = field(default_factory=Prompt)
    # Log-probabilities of the prompt's tokens but the first, if the user wants them.
    scores: list[SampledToken] = field(default_factory=list[SampledToken])
    text: str = ""
    events: list[TokenEvent] = field(default_factory=list[TokenEvent])
    text_offsets: list[int] = field(default_factory=list[int])
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self.text = self.prompt.text

    def add(self, event: TokenEvent) -> None:
        self.finish_reason = event.finish_reason
        if event.finish_reason is FinishReason.ERROR:
            return
        self.text_offsets.append(len(self.text))
        self.events.append(event)
        self.text += event.text


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Wall-clock seconds of one run. `first_token_s` includes compilation.

    If no token is drawn, `first_token_s` is the time to the end of the run.
    """

    load_s: float
    first_token_s: float
    total_s: float
    tokens_per_s: float


def run(options: argparse.Namespace) -> None:
    """Loads the model, runs one request, and prints its result."""
    started_s = time.perf_counter()
    sampling = sampling_params(options)
    model_dir = resolve_model_dir(options.model)
    model = load_local_model(model_dir, options.dtype, wanted_kernels(options))
    request = GenerationRequest(
        prompt_ids=prompt_ids(options, model.tokenizer),
        max_tokens=options.max_tokens,
        sampling=sampling,
        num_samples=options.n,
        stop=tuple(options.stop),
        ignore_eos=options.ignore_eos,
        prompt_logprobs=options.logprobs if options.echo else None,
    )
    request.check_fits(model.decoder.config)
    loaded_s = time.perf_counter()
    with_logprobs = options.logprobs is not None
    stream = not options.json and options.n == 1
    choices, token_times_s = collect(options, model, request, stream=stream)
    timings = Timings(
        load_s=loaded_s - started_s,
        first_token_s=token_times_s[0] - loaded_s,
        total_s=token_times_s[-1] - loaded_s,
        tokens_per_s=_rate(token_times_s),
    )
    if options.json:
        logprobs = [_logprobs(c, model.tokenizer) for c in choices] if with_logprobs else None
        print(json.dumps(to_json(request, choices, logprobs, timings)))
    elif stream:
        print()
    else:
        print_choices(choices)
    if any(choice.finish_reason is FinishReason.ERROR for choice in choices):
        raise NonFiniteLogitsError


def sampling_params(options: argparse.Namespace) -> SamplingParams:
    """The sampling parameters of the command line.

    Raises:
        InvalidRequestError: a parameter is out of range; the error names it, its value and limit.
    """
    fields: dict[str, Any] = {"num_logprobs": options.logprobs or 0}
    for parameter in PARAMETERS:
        if parameter.has_own_option:
            value = getattr(options, parameter.name)
            is_list = parameter.kind not in (float, int)
            fields[parameter.name] = dict(map(_bias, value)) if is_list else value
    return SamplingParams(**fields)


def _bias(text: str) -> tuple[int, float]:
    """A token id and its bias, from "5=-1.5"."""
    token_id, _, bias = text.partition("=")
    try:
        return int(token_id), float(bias)
    except ValueError:
        raise InvalidRequestError("logit_bias", text, "of the form ID=BIAS") from None


def prompt_ids(options: argparse.Namespace, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """The tokens of the prompt, which is given as text or as ids.

    Raises:
        InvalidRequestError: neither PROMPT nor `--tokens` is given, or both.
        TokenizerError: there is text, but no tokenizer.
    """
    if (options.prompt is None) == (options.tokens is None):
        raise InvalidRequestError("prompt", options.prompt, "given as PROMPT or as --tokens")
    if options.tokens is not None:
        return parse_token_ids(options.tokens)
    if tokenizer is None:
        raise TokenizerError("the model directory has no tokenizer.model; give --tokens instead")
    text = sys.stdin.read() if options.prompt == "-" else options.prompt
    return tuple(tokenizer.encode(text))


def collect(
    options: argparse.Namespace, model: LocalModel, request: GenerationRequest, *, stream: bool
) -> tuple[list[Choice], list[float]]:
    """Runs the request to its end. Returns its choices and the times of its tokens.

    `stream` prints text while it is generated, or token ids if there is no tokenizer.
    """
    num_tokens = min(
        len(request.prompt_ids) + request.max_tokens, model.decoder.config.sequence_len + 1
    )
    engine = make_local_engine(model, cache_size_for(request.num_samples, num_tokens))
    prompt = _prompt(options, model, request) if options.echo else Prompt()
    choices = [Choice(prompt) for _ in range(request.num_samples)]
    token_times_s: list[float] = []
    if stream:
        print(_shown_prompt(prompt), end="", flush=True)
    for event in engine.generate(request):
        if isinstance(event, PromptScores):
            for choice in choices:
                choice.scores += event.tokens
            continue
        token_times_s.append(time.perf_counter())
        choices[event.sample_index].add(event)
        if stream:
            print(_shown(event, model.tokenizer), end="", flush=True)
    if request.max_tokens == 0:
        for choice in choices:
            choice.finish_reason = FinishReason.LENGTH
    return choices, token_times_s or [time.perf_counter()]


def _prompt(options: argparse.Namespace, model: LocalModel, request: GenerationRequest) -> Prompt:
    pieces = [""] * len(request.prompt_ids)
    if model.tokenizer is not None:
        pieces = prompt_pieces(model.tokenizer, request.prompt_ids)
    # The user's own text, because its tokens may decode to a slightly different text.
    given: str | None = options.prompt
    text = "".join(pieces) if given is None or given == "-" else given
    offsets = tuple(min(offset, len(text)) for offset in text_offsets(pieces))
    return Prompt(token_ids=request.prompt_ids, text=text, text_offsets=offsets)


def _shown_prompt(prompt: Prompt) -> str:
    return prompt.text or "".join(f"{token_id} " for token_id in prompt.token_ids)


def _shown(event: TokenEvent, tokenizer: Tokenizer | None) -> str:
    """The output for one token: its text, or its id if there is no tokenizer."""
    if tokenizer is not None:
        return event.text
    return "" if event.finish_reason is FinishReason.ERROR else f"{event.token_id} "


def print_choices(choices: list[Choice]) -> None:
    """Prints all samples one after another, each with its number."""
    for index, choice in enumerate(choices):
        token_ids = [*choice.prompt.token_ids, *(event.token_id for event in choice.events)]
        shown = choice.text or " ".join(map(str, token_ids))
        print(f"[{index}]{shown}")


def to_json(
    request: GenerationRequest,
    choices: list[Choice],
    logprobs: list[dict[str, Any]] | None,
    timings: Timings,
) -> dict[str, Any]:
    """The result in the form of OpenAI's completions, with token ids and timings added."""
    num_completion_tokens = sum(len(choice.events) for choice in choices)
    return {
        "choices": [
            {
                "index": index,
                "text": choice.text,
                "token_ids": [event.token_id for event in choice.events],
                "logprobs": logprobs[index] if logprobs else None,
                "finish_reason": choice.finish_reason.value if choice.finish_reason else None,
            }
            for index, choice in enumerate(choices)
        ],
        "usage": {
            "prompt_tokens": len(request.prompt_ids),
            "completion_tokens": num_completion_tokens,
            "total_tokens": len(request.prompt_ids) + num_completion_tokens,
        },
        "timings": {
            "load_s": round(timings.load_s, 4),
            "first_token_s": round(timings.first_token_s, 4),
            "total_s": round(timings.total_s, 4),
            "tokens_per_s": round(timings.tokens_per_s, 2),
        },
    }


def _logprobs(choice: Choice, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Log-probabilities of unchanged logits, in the form of OpenAI's completions.

    If the prompt is echoed, its tokens come first. The first token of a prompt has no
    log-probability.

    A token's name is `Tokenizer.name_of`, or its id if there is no tokenizer. Different
    tokens can have the same name, so the ids of the most likely tokens are listed too.
    """

    def name(token_id: int) -> str:
        return tokenizer.name_of(token_id) if tokenizer else str(token_id)

    prompt = choice.prompt
    scored = [*choice.scores, *choice.events]
    unscored: list[None] = [None] * min(1, len(prompt.token_ids))
    return {
        "tokens": [
            name(token_id)
            for token_id in (*prompt.token_ids[:1], *(token.token_id for token in scored))
        ],
        "token_logprobs": [*unscored, *(token.logprob for token in scored)],
        "top_logprobs": [
            *unscored,
            *({name(i): logprob for i, logprob in reversed(t.top_logprobs)} for t in scored),
        ],
        "top_token_ids": [*unscored, *([i for i, _ in t.top_logprobs] for t in scored)],
        "text_offset": [*prompt.text_offsets, *choice.text_offsets],
    }


def _rate(token_times_s: list[float]) -> float:
    """Tokens per second after the first token; 0 if there are fewer than two tokens."""
    elapsed_s = token_times_s[-1] - token_times_s[0]
    return (len(token_times_s) - 1) / elapsed_s if elapsed_s > 0 else 0.0
