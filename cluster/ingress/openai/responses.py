"""Turns tokens into OpenAI's objects: whole responses, or the chunks of a stream.

Each token makes one chunk, with its text, log-probabilities and finish reason. So one number, the
tokens received of a choice, is enough to resume that choice. A token that shows nothing, because
its character is not complete yet, makes no chunk, but counts. The first chunk of a choice also
holds the prompt's text and log-probabilities, if the client asked for them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from milliways.cluster.ingress.ingress import ChoiceEvent, PromptEvent
from milliways.cluster.ingress.openai.requests import Ask
from milliways.cluster.ingress.request_id import created_s_of
from milliways.cluster.ingress.served_model import ServedModel
from milliways.model.detokenizer import text_offsets
from milliways.model.sampling_params import SampledToken
from milliways.router.requests.sequence import FinishReason, TokenEvent


@dataclass(slots=True)
class ChoiceProgress:
    """What has been produced of one choice so far."""

    events: list[TokenEvent] = field(default_factory=list[TokenEvent])
    num_events: int = 0
    num_chars: int = 0
    # Tokens of the prompt that were not computed again.
    num_cached: int = 0


class Answer:
    """Collects the tokens of one request; subclasses shape them for completions and for chat.

    *Invariant:* `num_events` of a choice counts all its tokens, those without a chunk included.
    """

    object_name = ""
    chunk_name = ""
    id_prefix = ""

    def __init__(self, ask: Ask, model: ServedModel, request_id: str, name: str = "") -> None:
        """`name` is what answers call the request, if that is not its id."""
        self.ask = ask
        self.model = model
        self._name = name or request_id
        # From the id, so that a resumed stream gives the same time.
        self._created_s = created_s_of(request_id)
        num_choices = len(ask.requests) * ask.num_samples
        self._choices = [ChoiceProgress() for _ in range(num_choices)]
        # Of each prompt, the scores of its second token and later ones.
        self._scores: list[list[SampledToken]] = [[] for _ in ask.requests]

    @property
    def counts(self) -> list[int]:
        """Number of tokens of each choice so far."""
        return [choice.num_events for choice in self._choices]

    @property
    def num_scores(self) -> int:
        """Number of prompt log-probabilities in the whole response; every choice repeats them."""
        num_each = 1 + (self.ask.requests[0].prompt_logprobs or 0)
        return sum(map(len, self._scores)) * self.ask.num_samples * num_each

    def usage(self) -> dict[str, Any]:
        """Exact counts: each prompt once, and each token drawn, end-of-sequence tokens included."""
        firsts = self._choices[:: self.ask.num_samples]
        num_prompt, num_completion = self.ask.num_prompt_tokens, sum(self.counts)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_completion,
            "total_tokens": num_prompt + num_completion,
            # The samples of a prompt share it.
            "prompt_tokens_details": {"cached_tokens": sum(each.num_cached for each in firsts)},
        }

    def keep_scores(self, event: PromptEvent) -> None:
        """Adds log-probabilities of a prompt."""
        self._scores[event.prompt_index] += event.scores.tokens

    def keep(self, event: ChoiceEvent) -> None:
        """Adds a token to the whole response."""
        progress = self._choices[event.choice_index]
        progress.events.append(event.event)
        progress.num_events += 1
        progress.num_cached += event.event.num_cached

    def whole(self) -> dict[str, Any]:
        """The whole response."""
        return self._object(self.object_name, self._whole_choices()) | {"usage": self.usage()}

    def chunk(self, event: ChoiceEvent) -> dict[str, Any] | None:
        """The chunk of one token; None if the token shows nothing."""
        progress = self._choices[event.choice_index]
        is_first = progress.num_events == 0
        progress.num_events += 1
        progress.num_cached += event.event.num_cached
        choice = self._piece(event.choice_index, progress, event.event, is_first=is_first)
        return None if choice is None else self._chunk([choice])

    def only_chunk(self) -> dict[str, Any]:
        """The only chunk of a stream that draws no token: each choice with its scored prompt."""
        return self._chunk(self._whole_choices())

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk, for clients that asked for usage."""
        return self._chunk([]) | {"usage": self.usage()}

    def _whole_choices(self) -> list[dict[str, Any]]:
        choices = [self._whole_choice(i, c.events) for i, c in enumerate(self._choices)]
        num_each, num_best = self.ask.num_samples, self.ask.num_best
        if num_best == num_each:
            return choices
        best = [
            first + place
            for first in range(0, len(choices), num_each)
            for place in _best(self._choices[first : first + num_each], num_best)
        ]
        return [choices[index] | {"index": i} for i, index in enumerate(best)]

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = self._object(self.chunk_name, choices)
        if not self.ask.include_usage:
            return chunk
        return chunk | {"usage": self.usage() if self.ask.continuous_usage else None}

    def _object(self, name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"{self.id_prefix}-{self._name}",
            "object": name,
            "created": self._created_s,
            "model": self.model.name,
            "system_fingerprint": self.model.fingerprint,
            "choices": choices,
        }

    def _shows(self, event: TokenEvent) -> bool:
        """Whether a token makes a chunk."""
        wanted = self.ask.wants_logprobs or self.ask.wants_token_ids
        return bool(event.text) or wanted or event.finish_reason is not None

    def _ended(self, events: Sequence[TokenEvent]) -> dict[str, Any]:
        """Why a choice ended; None while it has not."""
        fields: dict[str, Any] = {"finish_reason": _finish_reason(events)}
        if fields["finish_reason"] is not None:
            fields["stop_reason"] = events[-1].stop_reason if events else None
        return fields

    def _prompt_logprobs(self, prompt_index: int) -> list[dict[str, Any] | None] | None:
        """The prompt's log-probabilities in vLLM's form; None if they are not wanted."""
        if self.ask.prompt_logprobs is None:
            return None
        scores = self._scores[prompt_index]
        return [None, *(self._ranked(score, self.ask.prompt_logprobs) for score in scores)]

    def _ranked(self, score: SampledToken, num_top: int) -> dict[str, Any]:
        """A token of the prompt and the most likely ones. Only the rank of these is known."""
        tops = list(enumerate(score.top_logprobs, 1))
        ranks = {token_id: rank for rank, (token_id, _) in tops}
        listed = [(score.token_id, score.logprob)]
        listed += [top for _, top in tops[:num_top] if top[0] != score.token_id]
        return {
            str(token_id): {
                "logprob": _finite(logprob),
                "rank": ranks.get(token_id),
                "decoded_token": self.model.token_name(token_id),
            }
            for token_id, logprob in listed
        }

    def _token_ids(self, events: Sequence[TokenEvent]) -> dict[str, Any]:
        if not self.ask.wants_token_ids:
            return {}
        return {"token_ids": [event.token_id for event in events]}

    def _whole_choice(self, index: int, events: Sequence[TokenEvent]) -> dict[str, Any]:
        raise NotImplementedError

    def _piece(
        self, index: int, progress: ChoiceProgress, event: TokenEvent, *, is_first: bool
    ) -> dict[str, Any] | None:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class _Entry:
    """A token in a list of log-probabilities. The prompt's first token has none: None."""

    token_id: int
    text_offset: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] | None = None


class CompletionAnswer(Answer):
    """Responses of /v1/completions."""

    object_name = "text_completion"
    chunk_name = "text_completion"
    id_prefix = "cmpl"

    def _whole_choice(self, index: int, events: Sequence[TokenEvent]) -> dict[str, Any]:
        echo = self._echo(index)
        scores = self._prompt_logprobs(index // self.ask.num_samples)
        return {
            "index": index,
            "text": echo + _text(events),
            **({} if scores is None else {"prompt_logprobs": scores}),
            "logprobs": self._logprobs(self._prompt_entries(index) + _entries(events, len(echo))),
            **self._ended(events),
            **self._token_ids(events),
        }

    def _piece(
        self, index: int, progress: ChoiceProgress, event: TokenEvent, *, is_first: bool
    ) -> dict[str, Any] | None:
        echo = self._echo(index) if is_first else ""
        prompt = self._prompt_entries(index) if is_first else []
        progress.num_chars += len(echo)
        offset = progress.num_chars
        progress.num_chars += len(event.text)
        if not echo and not self._shows(event):
            return None
        return {
            "index": index,
            "text": echo + event.text,
            "logprobs": self._logprobs(prompt + _entries([event], offset)),
            **self._ended([event]),
            **self._token_ids([event]),
        }

    def _echo(self, index: int) -> str:
        return self.ask.echoes[index // self.ask.num_samples]

    def _prompt_entries(self, index: int) -> list[_Entry]:
        """The tokens of a choice's prompt; none if the prompt is not scored."""
        prompt_index = index // self.ask.num_samples
        request = self.ask.requests[prompt_index]
        # They may be wanted in another form, with other numbers of most likely tokens.
        num_top = self.ask.echoed_logprobs
        if num_top is None:
            return []
        offsets = self.ask.echo_offsets[prompt_index]
        first = _Entry(request.prompt_ids[0], offsets[0])
        # A resumed request may have fewer scores than tokens: the client received the rest before,
        # and this chunk is not sent again.
        scores = zip(self._scores[prompt_index], offsets[1:], strict=False)
        return [first] + [
            _Entry(s.token_id, at, s.logprob, s.top_logprobs[:num_top]) for s, at in scores
        ]

    def _logprobs(self, entries: Sequence[_Entry]) -> dict[str, Any] | None:
        if not self.ask.wants_logprobs:
            return None
        return {
            "tokens": [self.model.token_name(entry.token_id) for entry in entries],
            "token_logprobs": [
                None if entry.logprob is None else _finite(entry.logprob) for entry in entries
            ],
            "top_logprobs": [self._named(entry.top_logprobs) for entry in entries],
            "text_offset": [entry.text_offset for entry in entries],
        }

    def _named(self, top: tuple[tuple[int, float], ...] | None) -> dict[str, float] | None:
        """Log-probabilities by token name; the best comes last, so it wins if names are equal."""
        if top is None:
            return None
        name = self.model.token_name
        return {name(token_id): _finite(logprob) for token_id, logprob in reversed(top)}


class ChatAnswer(Answer):
    """Responses of /v1/chat/completions."""

    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def whole(self) -> dict[str, Any]:
        scores = self._prompt_logprobs(0)
        return super().whole() | ({} if scores is None else {"prompt_logprobs": scores})

    def _whole_choice(self, index: int, events: Sequence[TokenEvent]) -> dict[str, Any]:
        message = {"role": "assistant", "content": _text(events), "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(events),
            **self._ended(events),
            **self._token_ids(events),
        }

    def _piece(
        self, index: int, progress: ChoiceProgress, event: TokenEvent, *, is_first: bool
    ) -> dict[str, Any] | None:
        if not is_first and not self._shows(event):
            return None
        delta: dict[str, Any] = {"role": "assistant"} if is_first else {}
        if is_first or event.text:
            delta["content"] = event.text
        return {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs([event]),
            **self._ended([event]),
            **self._token_ids([event]),
        }

    def _logprobs(self, events: Sequence[TokenEvent]) -> dict[str, Any] | None:
        if not self.ask.wants_logprobs:
            return None
        content = [
            self._token(event.token_id, event.logprob)
            | {"top_logprobs": [self._token(*top) for top in event.top_logprobs]}
            for event in events
        ]
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self.model.token_name(token_id),
            "logprob": _finite(logprob),
            "bytes": self.model.token_bytes(token_id),
        }


def model_object(model: ServedModel) -> dict[str, Any]:
    """The object that /v1/models lists."""
    return {
        "id": model.name,
        "object": "model",
        "created": model.created_s,
        "owned_by": "milliways",
        "max_model_len": model.config.sequence_len,
    }


def _best(samples: Sequence[ChoiceProgress], count: int) -> list[int]:
    """The places of the samples with the greatest log-probability for each token, best first."""

    def score(place: int) -> float:
        logprobs = [event.logprob for event in samples[place].events]
        return sum(logprobs) / max(1, len(logprobs))

    return sorted(range(len(samples)), key=score, reverse=True)[:count]


def _text(events: Sequence[TokenEvent]) -> str:
    return "".join(event.text for event in events)


def _entries(events: Sequence[TokenEvent], text_offset: int) -> list[_Entry]:
    """Entries of a completion's tokens; the first begins at `text_offset`."""
    offsets = text_offsets(event.text for event in events)
    return [
        _Entry(event.token_id, text_offset + offset, event.logprob, event.top_logprobs)
        for event, offset in zip(events, offsets, strict=True)
    ]


def _finite(logprob: float) -> float:
    """JSON has no infinity: OpenAI writes -9999 instead."""
    return max(logprob, -9999.0)


def _finish_reason(events: Sequence[TokenEvent]) -> str | None:
    """The last token's reason. A choice without tokens ended by length: max_tokens is 0."""
    reason = events[-1].finish_reason if events else FinishReason.LENGTH
    return reason.value if reason else None
