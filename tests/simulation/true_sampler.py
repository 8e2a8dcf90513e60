"""The sampler that the workers have, over logits made of a row of the fake model.

What a sampling parameter does is then what it does to a client. A draw is a function of what it is
given, and many schedules of one scenario ask for the same: each is computed once.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from milliways.model.ops import PureOps
from milliways.model.runner import draw_tokens
from milliways.model.sampling_params import SampledToken, SampleRow
from tests.simulation.fake_model import VOCAB_SIZE

_STEP = 97


class TrueSampler:
    """A `Draw` by the real sampler; remembers what it drew."""

    def __init__(self) -> None:
        self._ops = PureOps()
        self._drawn: dict[str, SampledToken] = {}

    def __call__(self, row: Sequence[float], sample: SampleRow) -> SampledToken:
        # All that a draw may depend on: nothing of it is hashable as it is.
        key = repr((tuple(row), sample))
        if key not in self._drawn:
            logits_WV = jnp.asarray(logits_of(row)[None])
            (self._drawn[key],) = draw_tokens(logits_WV, [sample], self._ops)
        return self._drawn[key]


def logits_of(row: Sequence[float]) -> np.ndarray:
    """Logits in 0..6, of which any other row makes others; NaN of NaN."""
    x, y = row
    ids_V = np.arange(VOCAB_SIZE)
    return (np.fmod(x * (2 * ids_V + 1) + y * (ids_V + 3), _STEP) / 16).astype(np.float32)
