"""The real sampler of the workers, over logits made from a row of the fake model.

So sampling parameters have their real effect. A draw is a function of its arguments, and many
schedules of one scenario repeat the same draws, so each draw is computed once and remembered.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from milliways.model.ops import PureOps
from milliways.model.runner import draw_tokens
from milliways.model.sampling_params import SampledToken, SampleRow
from tests.simulation.fake_model import VOCAB_SIZE

_STEP = 97
# No scenario has longer sequences.
_MAX_TOKENS = 512


class TrueSampler:
    """A `Draw` by the real sampler; remembers its draws."""

    def __init__(self) -> None:
        self._ops = PureOps()
        self._drawn: dict[str, SampledToken] = {}

    def __call__(self, row: Sequence[float], sample: SampleRow) -> SampledToken:
        # Everything that a draw depends on; the parts themselves cannot be hashed.
        key = repr((tuple(row), sample))
        if key not in self._drawn:
            logits_WV = jnp.asarray(logits_of(row)[None])
            (self._drawn[key],) = draw_tokens(logits_WV, [sample], self._ops, _MAX_TOKENS)
        return self._drawn[key]


def logits_of(row: Sequence[float]) -> np.ndarray:
    """Logits in 0..6. Different rows give different logits; NaN gives NaN."""
    x, y = row
    ids_V = np.arange(VOCAB_SIZE)
    return (np.fmod(x * (2 * ids_V + 1) + y * (ids_V + 3), _STEP) / 16).astype(np.float32)
