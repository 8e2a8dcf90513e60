"""Draws the next token of each sequence of a step: float32, without hidden state.

In order, for each row of logits:

1. repetition penalty, then frequency and presence penalty, then logit bias, on the raw logits;
2. temperature 0: the highest logit, and that is all;
3. minus the highest logit, divided by the temperature;
4. top-k, then top-p among those left, then min-p;
5. plus Gumbel noise of key = f(seed, sample index, position); the highest wins.

Where the token is given, as within a prompt, nothing is drawn: it is scored, which is to have its
log-probability told as that of a drawn one is.

A draw is a function of (logits, parameters, tokens so far), so whoever takes over a sequence goes
on with the same tokens. Ties go to the lowest token id. Reported log-probabilities are those of the
raw logits. `docs/departures.md` says where this leaves the reference, and where each semantic
choice comes from.

Rows are computed one after another by one program whose shapes are [V]: a row's bits then do not
depend on the batch, which XLA's reductions over [B, V] do not grant.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from milliways.model.sampling_params import (
    INVALID_TOKEN,
    MAX_LOGIT_BIASES,
    MAX_LOGPROBS,
    SampleRow,
    SamplingParams,
)

# Below it, a temperature is greedy: the quotient would leave float32 (vLLM draws the same line).
_MIN_TEMPERATURE = 1e-5
# So many candidates are looked at before all V are sorted: sorting 131072 costs 50 ms on a CPU.
_NUM_CANDIDATES = 1024
# Histories are padded to a power of 4 of at least this: few shapes, so few compilations.
_MIN_HISTORY = 256

HostArray = Array | np.ndarray


class RowSummary(NamedTuple):
    """What drawing needs to know of a whole row of logits."""

    top: Float[HostArray, "*B"]  # +inf where the row holds a NaN
    best_id: Int[HostArray, "*B"]  # the lowest id with the highest logit
    log_total: Float[HostArray, "*B"]  # log of the sum of exp(logit - top)


class RowKernels(Protocol):
    """Other means to compute the two functions of whole rows that cost most; hashable."""

    def gumbel(self, key_2: Array, num_places: int) -> Array:
        """As `gumbel_noise`."""
        ...

    def summarize_rows(self, logits_BV: Array) -> RowSummary:
        """As the function of that name."""
        ...


class SampleInputs(NamedTuple):
    """What `sample` needs besides logits. Every array has a leading axis B; in a row it is gone.

    S and J are 0 where no row of the batch has a penalty or a bias.
    """

    temperature: Float[HostArray, "*B"]  # 0: greedy
    top_k: Int[HostArray, "*B"]  # V: off
    top_p: Float[HostArray, "*B"]
    min_p: Float[HostArray, "*B"]
    repetition_penalty: Float[HostArray, "*B"]
    presence_penalty: Float[HostArray, "*B"]
    frequency_penalty: Float[HostArray, "*B"]
    seed_2: UInt32[HostArray, "*B 2"]  # high word, low word
    sample_index: Int[HostArray, "*B"]
    position: Int[HostArray, "*B"]  # the one that the drawn token will have
    history_S: Int[HostArray, "*B S"]  # padded with V
    num_prompt_tokens: Int[HostArray, "*B"]
    bias_ids_J: Int[HostArray, "*B J"]  # padded with V
    bias_values_J: Float[HostArray, "*B J"]
    given_id: Int[HostArray, "*B"]  # INVALID_TOKEN where the token is to be drawn


class SampledTokens(NamedTuple):
    """One token for each row; the best K tokens are those of the raw logits, best first."""

    token_B: Int[HostArray, "*B"]  # drawn or given; INVALID_TOKEN where not valid
    logprob_B: Float[HostArray, "*B"]
    top_ids_BK: Int[HostArray, "*B K"]
    top_logprobs_BK: Float[HostArray, "*B K"]
    # False where the logits hold NaN or +inf, or no finite value: the sequence has to fail.
    is_valid_B: Bool[HostArray, "*B"]


def pack_rows(rows: Sequence[SampleRow | None], vocab_size: int) -> SampleInputs:
    """Host arrays for the slots of a step, in order; None is an empty slot, drawn greedily."""
    empty = SampleRow(params=SamplingParams(temperature=0.0), token_ids=(), num_prompt_tokens=0)
    full_rows = [row or empty for row in rows]
    all_params = [row.params for row in full_rows]
    histories = [row.token_ids if row.params.has_penalty else () for row in full_rows]
    history_size = _bucket_history_size(max(map(len, histories), default=0))
    biases = [params.logit_bias for params in all_params]
    num_biases = MAX_LOGIT_BIASES if any(biases) else 0
    seeds = [[params.seed >> 32, params.seed & 0xFFFFFFFF] for params in all_params]

    def floats(name: str) -> np.ndarray:
        return np.array([getattr(params, name) for params in all_params], np.float32)

    temperature = floats("temperature")
    return SampleInputs(
        temperature=np.where(temperature < _MIN_TEMPERATURE, np.float32(0), temperature),
        top_k=np.array([min(p.top_k or vocab_size, vocab_size) for p in all_params], np.int32),
        top_p=floats("top_p"),
        min_p=floats("min_p"),
        repetition_penalty=floats("repetition_penalty"),
        presence_penalty=floats("presence_penalty"),
        frequency_penalty=floats("frequency_penalty"),
        seed_2=np.array(seeds, np.uint32),
        sample_index=np.array([row.sample_index for row in full_rows], np.int32),
        position=np.array([len(row.token_ids) for row in full_rows], np.int32),
        history_S=_padded(histories, history_size, vocab_size, np.int32),
        num_prompt_tokens=np.array([row.num_prompt_tokens for row in full_rows], np.int32),
        bias_ids_J=_padded([list(bias) for bias in biases], num_biases, vocab_size, np.int32),
        bias_values_J=_padded([list(bias.values()) for bias in biases], num_biases, 0, np.float32),
        given_id=np.array(
            [INVALID_TOKEN if row.given_id is None else row.given_id for row in full_rows], np.int32
        ),
    )


def bucket_num_logprobs(all_params: Sequence[SamplingParams]) -> int:
    """The K to ask `sample` for: 0 or the maximum, so that there are two programs, not 21."""
    return MAX_LOGPROBS if any(params.num_logprobs for params in all_params) else 0


@partial(jax.jit, static_argnames=("num_logprobs", "kernels"))
def sample(
    logits_BV: Float[Array, "B V"],
    inputs: SampleInputs,
    *,
    num_logprobs: int = 0,
    kernels: RowKernels | None = None,
) -> SampledTokens:
    """Draws a token for each row. A row's result is the same bits in any batch.

    `kernels` compute parts of it by other means than XLA's.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    summary_B = (kernels.summarize_rows if kernels else summarize_rows)(logits_BV)
    noise = kernels.gumbel if kernels else gumbel_noise

    def sample_one(row: tuple[Array, RowSummary, SampleInputs]) -> SampledTokens:
        return _sample_row(*row, num_logprobs, noise)

    return lax.map(sample_one, (logits_BV, summary_B, inputs))


def choose(
    logits_V: Float[Array, " V"], row: SampleInputs, gumbel_V: Float[Array, " V"]
) -> Int[Array, ""]:
    """The token of one row at a temperature above 0, given the noise."""
    return _first_max(filter_logits(logits_V, row) + gumbel_V)


def filter_logits(logits_V: Float[Array, " V"], row: SampleInputs) -> Float[Array, " V"]:
    """Logits over temperature, highest at 0, and -inf for what top-k, top-p and min-p leave out."""
    # Subtracting first keeps the quotient from overflowing at any temperature.
    scaled_V = (logits_V - jnp.max(logits_V)) / row.temperature
    needs_ranks = (row.top_k < scaled_V.size) | (row.top_p < 1)
    is_kept_V = lax.cond(needs_ranks, _keep_best, _keep_all, scaled_V, row)
    is_kept_V &= jnp.exp(scaled_V) >= row.min_p
    return jnp.where(is_kept_V, scaled_V, -jnp.inf)


def noise_key(row: SampleInputs) -> UInt32[Array, " 2"]:
    """The threefry key of one draw: of seed, sample index and position, and of nothing else."""
    key = jax.random.fold_in(_seed_key(row.seed_2), row.sample_index.astype(jnp.uint32))
    key = jax.random.fold_in(key, row.position.astype(jnp.uint32))
    return jax.random.key_data(key)


def gumbel_noise(key_2: UInt32[HostArray, " 2"], vocab_size: int) -> Float[Array, " V"]:
    """Noise of one draw; entry v is a function of (key, v) alone."""
    key = jax.random.wrap_key_data(jnp.asarray(key_2), impl="threefry2x32")
    # Pinned, as the process-wide setting changes the bits; True makes them independent of V.
    with jax.threefry_partitionable(True):
        bits_V = jax.random.bits(key, (vocab_size,), jnp.uint32)
    # The winner has the smallest exponential, so the resolution must be near 0: 32 bits there,
    # where float32 uniforms below 1 have 24 and would tie once in a hundred draws over 131072.
    uniform_V = (bits_V.astype(jnp.float32) + 0.5) * jnp.float32(2.0**-32)
    exponential_V = -jnp.log1p(-jnp.minimum(uniform_V, jnp.float32(1 - 2.0**-24)))
    return -jnp.log(exponential_V)


def summarize_rows(logits_BV: Float[Array, "B V"]) -> RowSummary:
    """Highest logit, where it is, and the soft-max total of each row."""
    return lax.map(_summarize_row, logits_BV)


def _summarize_row(logits_V: Array) -> RowSummary:
    top = _highest(logits_V)
    log_total = jnp.log(jnp.sum(jnp.exp(logits_V - top)))
    return RowSummary(top, _first_max(logits_V), log_total)


def _sample_row(
    logits_V: Array,
    summary: RowSummary,
    row: SampleInputs,
    num_logprobs: int,
    noise: Callable[[Array, int], Array],
) -> SampledTokens:
    adjusted_V = _add_bias(_penalise(logits_V, row), row)
    if adjusted_V is logits_V:
        top, best_id = summary.top, summary.best_id
    else:
        top, best_id = _highest(adjusted_V), _first_max(adjusted_V)
    is_valid = jnp.isfinite(top)
    token = lax.cond(
        row.temperature > 0,
        partial(_draw, noise=noise),
        lambda logits_V, row: best_id,
        adjusted_V,
        row,
    )
    token = jnp.where(row.given_id == INVALID_TOKEN, token, row.given_id)
    num_best = min(num_logprobs, logits_V.size)
    top_logits_K, top_ids_K = _best_logits(logits_V, num_best)
    return SampledTokens(
        token_B=jnp.where(is_valid, token, INVALID_TOKEN),
        logprob_B=logits_V[token] - summary.top - summary.log_total,
        top_ids_BK=top_ids_K,
        top_logprobs_BK=top_logits_K - summary.top - summary.log_total,
        is_valid_B=is_valid,
    )


def _best_logits(logits_V: Array, num_best: int) -> tuple[Array, Array]:
    if num_best == 0:
        return jnp.zeros(0, jnp.float32), jnp.zeros(0, jnp.int32)
    best_K, ids_K = lax.top_k(logits_V, num_best)
    return best_K, ids_K


def _draw(logits_V: Array, row: SampleInputs, noise: Callable[[Array, int], Array]) -> Array:
    return choose(logits_V, row, noise(noise_key(row), logits_V.size))


def _highest(values_V: Array) -> Array:
    # Asked for, since XLA's own maximum over a long row may pass a NaN by.
    return jnp.max(jnp.where(jnp.isnan(values_V), jnp.inf, values_V))


def _first_max(values_V: Array) -> Array:
    return lax.argmax(values_V, 0, jnp.int32)


def _penalise(logits_V: Array, row: SampleInputs) -> Array:
    if row.history_S.shape[0] == 0:
        return logits_V
    has_penalty = (
        (row.repetition_penalty != 1) | (row.presence_penalty != 0) | (row.frequency_penalty != 0)
    )
    return lax.cond(has_penalty, _penalise_history, lambda logits_V, row: logits_V, logits_V, row)


def _penalise_history(logits_V: Array, row: SampleInputs) -> Array:
    positions_S = jnp.arange(row.history_S.shape[0], dtype=jnp.int32)
    is_completion_S = (positions_S >= row.num_prompt_tokens).astype(jnp.int32)
    none_V = jnp.zeros(logits_V.shape, jnp.int32)
    is_seen_V = none_V.at[row.history_S].set(1, mode="drop") > 0
    count_V = none_V.at[row.history_S].add(is_completion_S, mode="drop")
    repeated_V = jnp.where(
        logits_V > 0, logits_V / row.repetition_penalty, logits_V * row.repetition_penalty
    )
    penalised_V = jnp.where(is_seen_V, repeated_V, logits_V)
    penalised_V -= row.frequency_penalty * count_V.astype(jnp.float32)
    return penalised_V - jnp.where(count_V > 0, row.presence_penalty, 0.0)


def _add_bias(logits_V: Array, row: SampleInputs) -> Array:
    if row.bias_ids_J.shape[0] == 0:
        return logits_V
    return logits_V.at[row.bias_ids_J].add(row.bias_values_J, mode="drop")


def _keep_all(scaled_V: Array, row: SampleInputs) -> Array:
    return jnp.ones(scaled_V.shape, bool)


def _keep_best(scaled_V: Array, row: SampleInputs) -> Array:
    """Top-k and top-p. Sorts only the best candidates where they hold the cut, else everything."""
    total = jnp.sum(jnp.exp(scaled_V))
    num_all = scaled_V.size
    num_candidates = min(_NUM_CANDIDATES, num_all)
    if num_candidates == num_all:
        return _keep_above_cut(scaled_V, row, total, num_all)
    best_C, _ = lax.top_k(scaled_V, num_candidates)
    is_top_k_inside = row.top_k <= num_candidates
    is_top_p_inside = (row.top_k == num_all) & (jnp.sum(jnp.exp(best_C)) > row.top_p * total)
    return lax.cond(
        is_top_k_inside | is_top_p_inside,
        partial(_keep_above_cut, num_candidates=num_candidates),
        partial(_keep_above_cut, num_candidates=num_all),
        scaled_V,
        row,
        total,
    )


def _keep_above_cut(scaled_V: Array, row: SampleInputs, total: Array, num_candidates: int) -> Array:
    """The cuts of top-k and top-p, both known to lie among the best `num_candidates`."""
    best_C, best_ids_C = lax.top_k(scaled_V, num_candidates)
    is_ranked_C = jnp.arange(num_candidates, dtype=jnp.int32) < row.top_k
    mass_C = jnp.where(is_ranked_C, jnp.exp(best_C), 0.0)
    total = jnp.where(row.top_k < scaled_V.size, jnp.sum(mass_C), total)
    # The token that crosses p is kept, so a token stays while those above it hold at most p.
    above_C = jnp.concatenate([jnp.zeros(1, jnp.float32), jnp.cumsum(mass_C)[:-1]])
    # At p = 1 rounding of the sums must not cost the least token.
    most_above = jnp.where(row.top_p < 1, row.top_p * total, jnp.inf)
    num_kept = jnp.sum(above_C <= most_above, dtype=jnp.int32)
    is_in_top_p_V = scaled_V >= best_C[num_kept - 1]
    last = jnp.minimum(row.top_k, num_candidates) - 1
    ids_V = jnp.arange(scaled_V.size, dtype=best_ids_C.dtype)
    is_tied_V = (scaled_V == best_C[last]) & (ids_V <= best_ids_C[last])
    is_in_top_k_V = (row.top_k == scaled_V.size) | (scaled_V > best_C[last]) | is_tied_V
    return is_in_top_p_V & is_in_top_k_V


def _seed_key(seed_2: HostArray) -> Key[Array, ""]:
    """Equal to jax.random.key(seed), which without 64-bit mode cannot take a seed of 64 bits."""
    return jax.random.wrap_key_data(jnp.asarray(seed_2), impl="threefry2x32")


def _bucket_history_size(longest: int) -> int:
    size = _MIN_HISTORY if longest else 0
    while size < longest:
        size *= 4
    return size


def _padded(
    rows: Sequence[Sequence[Any]], size: int, padding: int, dtype: type[np.generic]
) -> np.ndarray:
    packed = np.full((len(rows), size), padding, dtype)
    for packed_row, values in zip(packed, rows, strict=True):
        packed_row[: len(values)] = values
    return packed
