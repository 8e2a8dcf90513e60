"""Where the ingress gets tokens from: an interface, so that both surfaces know no router."""

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
        """Streams the tokens of all samples, each sample's in order. Closing it cancels.

        Where the request wants its prompt scored, the scores come first, in order.

        Goes on after what was `delivered` of some samples, as if it had been drawn here, and after
        the first `num_scored` scores; all of them, where a token was delivered.

        `deadline_s` is a time of `time.monotonic`. `request_id` is unique among those running.

        Raises:
            InvalidRequestError: the request cannot run, ever; names field, value and limit.
            OverloadedError: a bounded queue is full.
            UnavailableError: nothing could serve it until its deadline.
            DeadlineError: its deadline passed.
            ClusterError: any other of the tree in `cluster.errors`.
        """
        ...

    async def probe(self) -> None:
        """Returns if a token can be made now.

        Raises:
            UnavailableError: none can, and why.
        """
        ...
