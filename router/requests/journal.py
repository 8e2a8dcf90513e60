"""The journal of a request: what was asked, and every token that its client has had.

Where the prompt is scored, its log-probabilities come before any token. They are counted, each by
the position of its token: how many the client has had says which.

With it any router can carry the request on, because all that a router knows of a sequence is a
function of its tokens. A pure object: no clock, no network.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from milliways.router.requests.request import GenerationRequest


class OutOfOrderError(Exception):
    """A router's stream does not follow on what was delivered: a gap, or another token."""


@dataclass(frozen=True, slots=True)
class DeliveredSample:
    """What a client has had of one sample."""

    sample_index: int
    token_ids: tuple[int, ...]
    is_finished: bool


class Journal:
    """Grows by one token at a time, never twice by the same, never past a missing one.

    `delivered` is what the client has had elsewhere, and `num_scored` how many log-probabilities
    of the prompt.
    """

    def __init__(
        self,
        request: GenerationRequest,
        delivered: Sequence[DeliveredSample] = (),
        num_scored: int = 0,
    ) -> None:
        self.request = request
        # The router that has copies of its keys and values, as far as it was told; empty: none.
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
        """Tokens that the client has had, of all samples."""
        return self._num_delivered

    @property
    def num_scored(self) -> int:
        """Log-probabilities of the prompt that the client has had."""
        return self._num_scored

    @property
    def has_begun(self) -> bool:
        """Whether the client has had anything."""
        return self._num_delivered > 0 or self._num_scored > 0

    @property
    def is_complete(self) -> bool:
        is_scored = self._num_scored == self.request.num_to_score
        return is_scored and (self.request.max_tokens == 0 or all(self._is_finished))

    def try_score(self, position: int, token_id: int) -> bool:
        """Writes the log-probability of a prompt token down; False if the client has had it.

        Raises:
            OutOfOrderError: others between are missing, or the prompt has another token there.
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
        """Writes a token down; False if the client has had it.

        Raises:
            OutOfOrderError: tokens between are missing, or the client has had another one; or the
                prompt is not scored yet.
        """
        if self._num_scored < self.request.num_to_score:
            raise OutOfOrderError(f"a token came, with {self._num_scored} prompt tokens scored")
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
            raise OutOfOrderError(f"token {index} came, where {len(token_ids)} was to come")
        token_ids.append(token_id)
        self._is_finished[sample_index] = is_finished
        self._num_delivered += 1
        return True

    def delivered(self) -> list[DeliveredSample]:
        """What to tell the next router, samples without a token left out."""
        return [
            DeliveredSample(i, tuple(token_ids), self._is_finished[i])
            for i, token_ids in enumerate(self._token_ids)
            if token_ids or self._is_finished[i]
        ]
