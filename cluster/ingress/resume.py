"""How a client resumes a stream after its connection broke.

A stream is a function of its request, seed included, so the server stores nothing for a client that
may return. The client sends the same body again, to any replica, with the request's id and with how
much it has received:

- HTTP: the header `Last-Event-ID`, which is the cursor of the last event received,
  `<request id>/<counts>/<system_fingerprint>`. Events have cursors if the client asks for them. The
  counts say how many tokens of each choice the client has received, with dots between. Choices run
  in parallel and interleave differently in each run, so one total would not say which tokens were
  received.
- gRPC: `GenerateRequest.resume` with the count of each sample, the tokens themselves if the client
  kept them, and the number of prompt log-probabilities received. (Over HTTP these come with each
  choice's first token, so they need no count.)

Tokens that the client only counts are computed again, but not sent again; the prompt costs little
if its prefix is still cached. Tokens that the client sends back are processed like a prompt, which
is faster.

A stream that began on another model is refused: the fingerprint says which one that was.

The server cannot know whether the body is the same as before. A client that changes its body
receives the rest of another stream. Only a resume point that is impossible for its body is refused.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from milliways.cluster.ingress.request_id import is_request_id
from milliways.model.errors import InvalidRequestError
from milliways.router.requests.request import GenerationRequest
from milliways.wire.status_codes import Verbatim, abridged

LAST_EVENT_ID = "Last-Event-ID"
EVENT_IDS = "X-Milliways-Event-Ids"
# The end of the usage event's id; that event follows the last token.
_USAGE = "/usage"
_BODY = re.compile(
    r"(?P<request_id>[^/]+)/(?P<counts>\d{1,9}(?:\.\d{1,9})*)(?:/(?P<fingerprint>fp_[0-9a-f]{12}))?",
    re.ASCII,
)


class CursorForm(Enum):
    """How the events of a stream say what was received; the values are those of the header."""

    NONE = "0"
    LINE = "1"
    JSON = "json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """What a client has received of one choice.

    *Invariant:* `token_ids` is empty or holds all `num_tokens` tokens.
    """

    num_tokens: int = 0
    token_ids: tuple[int, ...] = ()
    # Known only if the client sent the tokens.
    is_finished: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumePoint:
    """The point at which to resume. `field` is the field that gave it, for error messages."""

    request_id: str
    # One for each choice.
    received: tuple[Received, ...]
    field: str
    # Whether the client has also received the usage, which follows the tokens.
    has_usage: bool = False
    # Number of prompt log-probabilities received; used only for requests with one prompt.
    num_scored: int = 0
    # The `system_fingerprint` of the stream that broke; empty if the client did not send it.
    fingerprint: str = ""

    def check_fits(self, requests: Sequence[GenerationRequest]) -> None:
        """Raises InvalidRequestError if the requests cannot have produced this much."""
        num_choices = sum(request.num_samples for request in requests)
        if len(self.received) != num_choices:
            number = Verbatim(f"{len(self.received)} counts")
            raise InvalidRequestError(self.field, number, f"one for each of {num_choices} choices")
        # All prompts of a body have the same limit.
        most = requests[0].max_tokens
        for received in self.received:
            if received.num_tokens > most:
                self.refuse_count(received.num_tokens, most)

    def num_scored_of(self, request: GenerationRequest, received: Sequence[Received]) -> int:
        """Number of a prompt's scores that the client has; `received` are its samples."""
        if all(sample.num_tokens for sample in received):
            return request.num_to_score
        return self.num_scored

    def refuse_count(self, count: int, most: int) -> None:
        """Raises InvalidRequestError: the client counts more tokens than a choice has."""
        number = Verbatim(f"{count} tokens of a choice")
        raise InvalidRequestError(self.field, number, f"at most the {most} that it has")


def cursor_form(header: str | None, *, resumes: bool) -> CursorForm:
    """What the header `EVENT_IDS` asks for. A client that resumes knows lines `id:`.

    Raises:
        InvalidRequestError: the header has another value.
    """
    if header is None:
        return CursorForm.LINE if resumes else CursorForm.NONE
    try:
        return CursorForm(header.strip().lower())
    except ValueError:
        limit = f"one of {', '.join(form.value for form in CursorForm)}"
        raise InvalidRequestError(EVENT_IDS, abridged(header), limit) from None


def event_id(
    request_id: str, counts: Sequence[int], fingerprint: str, *, has_usage: bool = False
) -> str:
    """The id of an event; `counts` are each choice's tokens up to and including the event."""
    return f"{request_id}/{'.'.join(map(str, counts))}/{fingerprint}{_USAGE if has_usage else ''}"


def parse_event_id(text: str) -> ResumePoint:
    """Parses an id that `event_id` made.

    Raises:
        InvalidRequestError: the text does not have the form of an event id.
    """
    body = text.removesuffix(_USAGE)
    match = _BODY.fullmatch(body)
    if match is None or not is_request_id(match["request_id"]):
        limit = (
            "the id of an event:"
            " <request id>/<tokens received of each choice, dots between>/<system_fingerprint>"
        )
        raise InvalidRequestError(LAST_EVENT_ID, abridged(text), limit)
    return ResumePoint(
        request_id=match["request_id"],
        received=tuple(Received(num_tokens=int(count)) for count in match["counts"].split(".")),
        fingerprint=match["fingerprint"] or "",
        field=LAST_EVENT_ID,
        has_usage=body != text,
    )
