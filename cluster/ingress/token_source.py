"""The interface from which the ingress gets tokens, so that it does not depend on routers."""

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from milliways.router.requests.journal import DeliveredSample
from milliways.router.requests.request import GenerationRequest
from milliways.router.requests.sequence import Event


class TokenSource(Protocol):
    """Makes the tokens of requests."""

    def generate(
        self,
        request: GenerationRequest,
        *,
        request_id: str,
        deadline_s: float,
        delivered: Sequence[DeliveredSample] = (),
        num_scored: int = 0,
    ) -> AsyncGenerator[Event]:
        """Streams the tokens of all samples, each sample's in order. Closing the stream cancels it.

        If the request asks for its prompt's scores, they come first, in order.

        A resumed request continues after the tokens `delivered` of each sample, as if they had been
        drawn here, and after the first `num_scored` scores. If a token was delivered, `num_scored`
        counts all scores.

        `deadline_s` is a time of `time.monotonic`. `request_id` is unique among running requests.

        Raises:
            InvalidRequestError: the request can never run; names field, value and limit.
            OverloadedError: a bounded queue is full.
            UnavailableError: nothing could serve the request before its deadline.
            DeadlineError: the deadline passed.
            ClusterError: any other error of the tree in `milliways.wire.errors`.
        """
        ...

    async def probe(self) -> None:
        """Returns if a token can be made now.

        Raises:
            UnavailableError: no token can be made; says why.
        """
        ...
