"""Streams that go on where a connection broke: what a client has had, as it tells it.

A stream is a function of its request, the seed included, so nothing is stored for a client that may
come back: it asks again, anywhere, with the same body, the request's id, and how much it has had.

- HTTP: `Last-Event-ID`, the id of the last event it received, `<request id>/<counts>`: how many
  tokens of each choice it has had with that event, with dots between. Choices run beside each
  other, in an order that no two runs share, so one count for all would not say which tokens.
- gRPC: `GenerateRequest.resume`, counts of each sample, and the tokens themselves if it kept them;
  and how many log-probabilities of the prompt. Over HTTP those come with each choice's first token,
  so that whoever has had that has had them.

Tokens that are only counted are computed again, and not sent again; a prompt costs little where its
prefix is still in the cache. Tokens that are told are taken in like a prompt, which is faster.

A body that differs from the first one cannot be told from it: its client gets the rest of another
stream. Only what does not fit the body it came with is refused.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from milliways.cluster.ingress.request_id import is_request_id
from milliways.model.errors import InvalidRequestError
from milliways.router.requests.request import GenerationRequest
from milliways.wire.status_codes import Verbatim, abridged

LAST_EVENT_ID = "Last-Event-ID"
# Ends the id of the event that follows the last token.
_USAGE = "/usage"
_COUNTS = re.compile(r"\d{1,9}(\.\d{1,9})*", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """What a client has had of a choice. `token_ids` are all `num_tokens` of it, or none."""

    num_tokens: int = 0
    token_ids: tuple[int, ...] = ()
    # Known only where the tokens are.
    is_finished: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumePoint:
    """Where a request goes on; `field` is what told it, for errors."""

    request_id: str
    # By choice.
    received: tuple[Received, ...]
    field: str
    # The usage that follows the tokens came as well.
    has_usage: bool = False
    # Log-probabilities of the prompt; only where there is one prompt.
    num_scored: int = 0

    def check_fits(self, requests: Sequence[GenerationRequest]) -> None:
        """Raises InvalidRequestError unless the requests could have given so much."""
        num_choices = sum(request.num_samples for request in requests)
        if len(self.received) != num_choices:
            number = Verbatim(f"{len(self.received)} counts")
            raise InvalidRequestError(self.field, number, f"of {num_choices} choices")
        # All prompts of a body share this.
        most = requests[0].max_tokens
        for had in self.received:
            if had.num_tokens > most:
                self.refuse_count(had.num_tokens, most)

    def num_scored_of(self, request: GenerationRequest, received: Sequence[Received]) -> int:
        """How many scores of a prompt need not come, of whose samples so much was received."""
        if all(had.num_tokens for had in received):
            return request.num_to_score
        return self.num_scored

    def refuse_count(self, count: int, most: int) -> None:
        """Raises InvalidRequestError: a choice has not so many tokens."""
        number = Verbatim(f"{count} tokens of a choice")
        raise InvalidRequestError(self.field, number, f"at most the {most} that it has")


def event_id(request_id: str, counts: Sequence[int], *, has_usage: bool = False) -> str:
    """The id of an event, with which a client has had so many tokens of each choice."""
    return f"{request_id}/{'.'.join(map(str, counts))}{_USAGE if has_usage else ''}"


def parse_event_id(text: str) -> ResumePoint:
    """What an id given by `event_id` says.

    Raises:
        InvalidRequestError: no event has such an id.
    """
    body = text.removesuffix(_USAGE)
    request_id, _, counts = body.partition("/")
    if not (is_request_id(request_id) and _COUNTS.fullmatch(counts)):
        limit = "the id of an event: <request id>/<tokens received of each choice, dots between>"
        raise InvalidRequestError(LAST_EVENT_ID, abridged(text), limit)
    return ResumePoint(
        request_id=request_id,
        received=tuple(Received(num_tokens=int(count)) for count in counts.split(".")),
        field=LAST_EVENT_ID,
        has_usage=body != text,
    )
