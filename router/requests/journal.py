"""The journal of a request: what was asked, and every token that its client has received.

If the prompt is scored, its log-probabilities precede any token. They come in the order of the
prompt, so their number says which ones the client has received.

With the journal any router can continue the request, because the state of a sequence is a function
of its tokens. A pure object: no clock, no network.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from milliways.router.requests.request import GenerationRequest
from milliways.wire.load import Load


class OutOfOrderError(Exception):
    """A router's stream does not continue what was delivered: a gap, or another token."""


@dataclass(frozen=True, slots=True)
class DeliveredSample:
    """What a client has received of one sample."""

    sample_index: int
    token_ids: tuple[int, ...]
    is_finished: bool


class Journal:
    """Grows by one token at a time.

    `delivered` is what the client has received before, of another router or another connection;
    `num_scored` counts the log-probabilities of the prompt that it has received.

    Invariant: tokens of a sample have no gap, and none is written twice. No token is written before
    all wanted scores. A sample that is finished does not grow.
    """

    def __init__(
        self,
        request: GenerationRequest,
        delivered: Sequence[DeliveredSample] = (),
        num_scored: int = 0,
    ) -> None:
        self.request = request
        # The router that has copies of its keys and values, as it was last named; empty if none.
        self.standby_id = ""
        self._num_scored = num_scored
        self._token_ids: list[list[int]] = [[] for _ in range(request.num_samples)]
        self._is_finished = [False] * request.num_samples
        for sample in delivered:
            self._token_ids[sample.sample_index] = list(sample.token_ids)
            self._is_finished[sample.sample_index] = sample.is_finished
        self._num_delivered = sum(map(len, self._token_ids))

    @property
    def num_delivered(self) -> int:
        """Tokens that the client has received, of all samples."""
        return self._num_delivered

    @property
    def num_scored(self) -> int:
        """Log-probabilities of the prompt that the client has received."""
        return self._num_scored

    @property
    def has_begun(self) -> bool:
        """Whether the client has received anything."""
        return self._num_delivered > 0 or self._num_scored > 0

    @property
    def is_complete(self) -> bool:
        is_scored = self._num_scored == self.request.num_to_score
        return is_scored and (self.request.max_tokens == 0 or all(self._is_finished))

    def load(self, *, is_in_prefill: bool) -> Load:
        """What is left of the request for the router that runs it.

        `is_in_prefill` says that this router has sent nothing yet: it still has to compute prompt
        and delivered tokens, unless they are in its prefix cache.
        """
        tokens = max(map(len, self._token_ids)) + len(self.request.prompt_ids)
        return Load(self._is_finished.count(False), tokens if is_in_prefill else 0)

    def try_score(self, position: int, token_id: int) -> bool:
        """Notes the log-probability of a prompt token; False if the client has it already.

        Raises:
            OutOfOrderError: earlier ones are missing, or the prompt has another token there.
        """
        if not 1 <= position <= self.request.num_to_score:
            raise OutOfOrderError(f"no log-probability is wanted of prompt token {position}")
        wanted = self.request.prompt_ids[position]
        if token_id != wanted:
            raise OutOfOrderError(f"prompt token {position} is {wanted}, and {token_id} was scored")
        if position > self._num_scored + 1:
            raise OutOfOrderError(f"prompt token {position} came after {self._num_scored}")
        if position <= self._num_scored:
            return False
        self._num_scored = position
        return True

    def try_deliver(
        self, sample_index: int, index: int, token_id: int, *, is_finished: bool
    ) -> bool:
        """Notes a token; False if the client has it already.

        Raises:
            OutOfOrderError: earlier tokens are missing, the client has received another token at
                this index, or the prompt is not scored yet.
        """
        if self._num_scored < self.request.num_to_score:
            raise OutOfOrderError(f"a token came after {self._num_scored} scores of the prompt")
        if not 0 <= sample_index < self.request.num_samples:
            raise OutOfOrderError(f"there is no sample {sample_index}")
        token_ids = self._token_ids[sample_index]
        if index < len(token_ids):
            if token_ids[index] != token_id:
                had = token_ids[index]
                raise OutOfOrderError(f"token {index} is {token_id}, and was {had} before")
            return False
        if self._is_finished[sample_index]:
            raise OutOfOrderError(f"sample {sample_index} had ended before token {index}")
        if index > len(token_ids):
            raise OutOfOrderError(f"token {index} came, but token {len(token_ids)} is next")
        token_ids.append(token_id)
        self._is_finished[sample_index] = is_finished
        self._num_delivered += 1
        return True

    def delivered(self) -> list[DeliveredSample]:
        """What the next router has to know: all samples that have a token or are finished."""
        return [
            DeliveredSample(i, tuple(token_ids), self._is_finished[i])
            for i, token_ids in enumerate(self._token_ids)
            if token_ids or self._is_finished[i]
        ]
