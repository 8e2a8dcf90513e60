"""What callers give as prompts and parameters, checked, and paired."""

from collections.abc import Iterable, Sequence
from operator import index
from typing import SupportsIndex, cast

from milliways.api.sampling import SamplingParams
from milliways.model.errors import InvalidRequestError

# Text, or the ids of its tokens.
Prompt = str | Sequence[int]
CheckedPrompt = str | tuple[int, ...]
_MAX_INT32 = 2**31 - 1


def checked_prompt(prompt: object) -> CheckedPrompt:
    """A prompt that cannot change any more.

    Raises:
        InvalidRequestError: it is neither text nor token ids.
    """
    if isinstance(prompt, str):
        return prompt
    limit = f"text, or token ids in 0..{_MAX_INT32}"
    if isinstance(prompt, bytes) or not isinstance(prompt, Iterable):
        raise InvalidRequestError("prompt", prompt, limit)
    token_ids: list[int] = []
    for token_id in cast("Iterable[object]", prompt):
        # NumPy's whole numbers are none of Python's.
        if not isinstance(token_id, SupportsIndex) or not 0 <= index(token_id) <= _MAX_INT32:
            raise InvalidRequestError("prompt", token_id, limit)
        token_ids.append(index(token_id))
    return tuple(token_ids)


def checked_prompts(prompts: object) -> list[CheckedPrompt]:
    """Several prompts.

    Raises:
        InvalidRequestError: they are one prompt and no list, or one of them is no prompt.
    """
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Iterable):
        raise InvalidRequestError("prompts", prompts, "a list of prompts")
    return [checked_prompt(prompt) for prompt in cast("Iterable[object]", prompts)]


def paired(
    prompts: Iterable[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
) -> list[tuple[CheckedPrompt, SamplingParams]]:
    """Each prompt with its parameters: the same for all, or one entry for each.

    Raises:
        InvalidRequestError: a prompt is none, or there are not as many parameters as prompts.
    """
    checked = checked_prompts(prompts)
    if params is None or isinstance(params, SamplingParams):
        return [(prompt, params or SamplingParams()) for prompt in checked]
    if len(params) != len(checked):
        limit = f"one SamplingParams, or one for each of {len(checked)} prompts"
        raise InvalidRequestError("params", f"{len(params)} entries", limit)
    return list(zip(checked, params, strict=True))
