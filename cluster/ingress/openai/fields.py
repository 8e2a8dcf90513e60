"""The fields of other servers' APIs, as tables, and what is done with each.

A client was written for some other server. Its fields are of four kinds:

- a *label* changes no token: it names, bills, stores or speeds up a request. It is ignored;
- a *foreign* field would change the answer, and is not supported. It is refused by name, unless its
  value asks for what the client gets anyway;
- an *other name* is a value that means the same as one of ours;
- an unknown field is ignored and named in the response, or refused, as the settings say.

If a foreign field were ignored, the client would get another output than it asked for.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from milliways.model.errors import InvalidRequestError
from milliways.wire.status_codes import abridged

IGNORED_FIELDS_HEADER = "x-milliways-ignored-fields"
# More unknown fields, and longer names, are cut off.
_MAX_NAMED = 32
_MAX_NAME_CHARS = 64

LABELS = frozenset(
    {
        "add_special_tokens",  # the tokenizer adds none, with either value
        "cache_prompt",
        "cache_salt",
        "include_reasoning",
        "metadata",
        "moderation",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "request_id",
        "rid",
        "safety_identifier",
        "separate_reasoning",
        "service_tier",
        "store",
        "stream_reasoning",
        "user",
    }
)


@dataclass(frozen=True, slots=True)
class Foreign:
    """The values, besides null, that a foreign field may have, and why others are refused."""

    neutral: tuple[Any, ...] = ()
    why: str = "it is not supported"
    # Values that change nothing where the best token is taken.
    neutral_if_greedy: tuple[Any, ...] = ()


_TOOLS = "tools are not supported"
_TEXT = "only text is supported"
_SHAPE = "guided decoding is not supported"
_REASONING = "the model has no separate reasoning"
_BEAMS = "beam search is not supported"
_OURS = "max_tokens has this meaning here"

FOREIGN: Mapping[str, Foreign] = {
    # OpenAI
    "suffix": Foreign(("",), "the model only continues a text"),
    "tools": Foreign(([],), _TOOLS),
    "tool_choice": Foreign(("none", "auto"), _TOOLS),
    "functions": Foreign(([],), _TOOLS),
    "function_call": Foreign(("none", "auto"), _TOOLS),
    "response_format": Foreign(({"type": "text"},), _TEXT),
    "modalities": Foreign((["text"],), _TEXT),
    "audio": Foreign((), _TEXT),
    "web_search_options": Foreign(),
    "reasoning_effort": Foreign(("none",), _REASONING),
    "reasoning": Foreign(({}, {"effort": "none"}), _REASONING),
    "verbosity": Foreign(("medium",)),
    # vLLM
    "use_beam_search": Foreign((False,), _BEAMS),
    "length_penalty": Foreign((1,), _BEAMS),
    "early_stopping": Foreign((False,), _BEAMS),
    "guided_json": Foreign((), _SHAPE),
    "guided_regex": Foreign((), _SHAPE),
    "guided_choice": Foreign(([],), _SHAPE),
    "guided_grammar": Foreign((), _SHAPE),
    "structured_outputs": Foreign(({},), _SHAPE),
    "structural_tag": Foreign((), _SHAPE),
    "logits_processors": Foreign(([],)),
    "return_tokens_as_token_ids": Foreign((False,)),
    "thinking_token_budget": Foreign((), _REASONING),
    "thinking": Foreign(({"type": "disabled"},), _REASONING),
    "prompt_embeds": Foreign((), _TEXT),
    "truncation_side": Foreign(("left",)),
    "documents": Foreign(([],)),
    "chat_template": Foreign((), "the model directory has the template"),
    "mm_processor_kwargs": Foreign(({},), _TEXT),
    "kv_transfer_params": Foreign(({},)),
    "repetition_detection": Foreign(({},)),
    "vllm_xargs": Foreign(({},)),
    # SGLang
    "regex": Foreign(("",), _SHAPE),
    "ebnf": Foreign(("",), _SHAPE),
    "json_schema": Foreign(("",), _SHAPE),
    "stop_regex": Foreign(("", [])),
    "no_stop_trim": Foreign((False,), "include_stop_str_in_output has this meaning here"),
    "lora_path": Foreign(("",), "adapters are not supported"),
    "custom_logit_processor": Foreign(("",)),
    "custom_params": Foreign(({},)),
    "session_params": Foreign(({},)),
    "return_hidden_states": Foreign((False,)),
    # transformers, TGI, lm-eval's gen_kwargs
    "do_sample": Foreign((True,), "temperature 0 takes the best token", (False,)),
    "num_beams": Foreign((1,), _BEAMS),
    "max_new_tokens": Foreign((), _OURS),
    "max_length": Foreign((), _OURS),
    "max_gen_toks": Foreign((), _OURS),
    "min_new_tokens": Foreign((0,), "min_tokens has this meaning here"),
    "min_length": Foreign((0,), "min_tokens has this meaning here"),
    "no_repeat_ngram_size": Foreign((0,)),
    "epsilon_cutoff": Foreign((0,)),
    "eta_cutoff": Foreign((0,)),
    "typical_p": Foreign((1,)),
    "watermark": Foreign((False,)),
    # llama.cpp and its relatives
    "n_predict": Foreign((), _OURS),
    "repeat_penalty": Foreign((1,), "repetition_penalty has this meaning here"),
    "grammar": Foreign(("",), _SHAPE),
    "mirostat": Foreign((0,)),
    "tfs_z": Foreign((1,)),
    "top_a": Foreign((0,)),
    "top_n_sigma": Foreign((-1, 0)),
    "dynatemp_range": Foreign((0,)),
    "xtc_probability": Foreign((0,)),
    "dry_multiplier": Foreign((0,)),
    "num_predict": Foreign((), _OURS),
}

# Of one kind of body only.
FOREIGN_OF_COMPLETIONS: Mapping[str, Foreign] = {
    "messages": Foreign((), "/v1/chat/completions takes messages"),
    "max_completion_tokens": Foreign((), _OURS),
    "top_logprobs": Foreign((0,), "logprobs has this meaning here"),
}
FOREIGN_OF_CHAT: Mapping[str, Foreign] = {
    "prompt": Foreign((), "/v1/completions takes a prompt"),
    "echo": Foreign((False,)),
}
FOREIGN_OF_MESSAGES: Mapping[str, Foreign] = {
    "audio": Foreign((), _TEXT),
    "prefix": Foreign((False,), "continue_final_message has this meaning here"),
    "partial": Foreign((False,), "continue_final_message has this meaning here"),
}
LABELS_OF_MESSAGES = frozenset({"type", "id", "metadata", "annotations", "status", "cache_control"})

# What other servers say for a value of ours.
OTHER_NAMES: Mapping[str, Mapping[Any, Any]] = {"top_k": {-1: 0}}


@dataclass(frozen=True, slots=True)
class Sifted:
    """The fields that a body of ours has, and the names of those that nobody knows."""

    kept: dict[str, Any]
    unknown: tuple[str, ...]


def sift(
    fields: Mapping[str, Any],
    known: Collection[str],
    foreign: Mapping[str, Foreign],
    labels: Collection[str],
    prefix: str = "",
) -> Sifted:
    """Takes apart an object of the client's. `known` are the fields of ours; `prefix` is for names.

    Raises:
        InvalidRequestError: a foreign field asks for something that is not supported.
    """
    kept: dict[str, Any] = {}
    unknown: list[str] = []
    for name, value in fields.items():
        if name in known:
            kept[name] = _renamed(name, value)
        elif name in foreign:
            _check_neutral(prefix + name, value, foreign[name], fields)
        elif name not in labels:
            unknown.append(prefix + name)
    return Sifted(kept, tuple(unknown))


def ignored_fields_header(names: Iterable[str]) -> dict[str, str]:
    """The header that names unknown fields, each once; no header if there is none."""
    shown = list(dict.fromkeys(text for name in names if (text := _shown(name))))
    return {IGNORED_FIELDS_HEADER: ", ".join(shown[:_MAX_NAMED])} if shown else {}


def _renamed(name: str, value: Any) -> Any:
    # A bool equals a number, and is none.
    if type(value) is int and name in OTHER_NAMES:
        return OTHER_NAMES[name].get(value, value)
    return value


def _check_neutral(name: str, value: object, foreign: Foreign, body: Mapping[str, Any]) -> None:
    if value is None or value in foreign.neutral:
        return
    if value in foreign.neutral_if_greedy and body.get("temperature") == 0:
        return
    raise InvalidRequestError(name, abridged(value), f"left out: {foreign.why}")


def _shown(name: str) -> str:
    """What of a name may stand in a header, between commas."""
    fit = (char for char in name if char.isascii() and (char.isalnum() or char in "_-.[]"))
    return "".join(fit)[:_MAX_NAME_CHARS]
