"""Draws the next token of each sequence of a step, in float32 and without hidden state.

For each row of logits, in this order:

1. Apply the repetition penalty, the frequency and presence penalties, and the logit bias. Forbid
   tokens, which is a bias of -inf, and all but the allowed ones, if there are such.
2. If the temperature is 0, take the token with the highest logit. The steps below do not apply.
3. Subtract the highest logit and divide by the temperature.
4. Keep the tokens of top-k, of those the tokens of top-p, and of those the tokens of min-p.
5. Add Gumbel noise; its key is a function of seed, sample index and position. Take the highest.

If the token is given, as it is within a prompt, nothing is drawn. The token is scored: the result
holds its log-probability, as it does for a drawn token.

A draw is a function of logits, parameters and tokens so far. So any process that takes over a
sequence draws the same tokens. Ties go to the lowest token id. Reported log-probabilities are those
of the raw logits. `docs/departures.md` lists the differences from the reference, and the origin of
each semantic choice.

One program with shapes [V] computes the rows one after another. A row's bits therefore do not
depend on the batch, which XLA's reductions over [B, V] do not guarantee.

There is one program for each number of rows. All parameters are arrays of fixed sizes, and a row
computes only what its parameters need. So no parameter of a request makes a process compile.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
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
    PARAMETERS,
    SampleRow,
    SamplingParams,
)

# A smaller temperature is greedy: dividing by it would overflow float32 (vLLM has the same limit).
_MIN_TEMPERATURE = 1e-5
# This many candidates are searched before all V are sorted: sorting 131072 takes 50 ms on a CPU.
_NUM_CANDIDATES = 1024

HostArray = Array | np.ndarray


class RowSummary(NamedTuple):
    """What a draw must know about a whole row of logits."""

    top: Float[HostArray, "*B"]  # +inf if the row holds a NaN
    best_id: Int[HostArray, "*B"]  # the lowest id with the highest logit
    log_total: Float[HostArray, "*B"]  # log of the sum of exp(logit - top)


class RowKernels(Protocol):
    """Other implementations of the two most expensive functions of whole rows. Hashable."""

    def gumbel(self, key_2: Array, num_places: int) -> Array:
        """Replaces `gumbel_noise`."""
        ...

    def summarize_rows(self, logits_BV: Array) -> RowSummary:
        """Replaces the function of the same name."""
        ...


class SampleInputs(NamedTuple):
    """What `sample` needs besides logits. Arrays have a leading axis B, those of one row do not.

    Each sampling parameter that is a real number has the array of its name. S is the most tokens
    that a sequence may have, J is MAX_LOGIT_BIASES.
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
    position: Int[HostArray, "*B"]  # of the token that is drawn
    history_S: Int[HostArray, "*B S"]  # padded with V
    num_prompt_tokens: Int[HostArray, "*B"]
    bias_ids_J: Int[HostArray, "*B J"]  # padded with V
    bias_values_J: Float[HostArray, "*B J"]  # -inf: forbidden
    only_biased: Bool[HostArray, "*B"]  # tokens without a bias, 0 included, are forbidden
    given_id: Int[HostArray, "*B"]  # INVALID_TOKEN: draw the token
    wants_best: Bool[HostArray, "*B"]  # whether the best K tokens are wanted


class SampledTokens(NamedTuple):
    """One token for each row, and the best K tokens of the raw logits, best first.

    K is MAX_LOGPROBS, or the vocabulary size if that is less. If a row does not want its best
    tokens, they are all 0.
    """

    token_B: Int[HostArray, "*B"]  # drawn or given; INVALID_TOKEN if not valid
    logprob_B: Float[HostArray, "*B"]
    top_ids_BK: Int[HostArray, "*B K"]
    top_logprobs_BK: Float[HostArray, "*B K"]
    # False if the logits hold NaN or +inf, or no finite value: the sequence must fail.
    is_valid_B: Bool[HostArray, "*B"]


def pack_rows(rows: Sequence[SampleRow | None], vocab_size: int, max_tokens: int) -> SampleInputs:
    """Host arrays for the slots of a step, in order. None is an empty slot and drawn greedily.

    A sequence may have `max_tokens` tokens. The arrays have the same shapes whatever the rows ask
    for, so that one program draws them all.
    """
    empty = SampleRow(params=SamplingParams(temperature=0.0), token_ids=(), num_prompt_tokens=0)
    full_rows = [row or empty for row in rows]
    all_params = [row.params for row in full_rows]
    histories = [row.token_ids if row.params.has_penalty else () for row in full_rows]
    biases = [_biases(row) for row in full_rows]
    seeds = [[params.seed >> 32, params.seed & 0xFFFFFFFF] for params in all_params]
    bias_ids = [list(bias) for bias in biases]
    bias_values = [list(bias.values()) for bias in biases]
    numbers = {
        name: np.array([getattr(params, name) for params in all_params], np.float32)
        for name in (parameter.name for parameter in PARAMETERS if parameter.kind is float)
    }
    # At 0 not even ties of the best token are kept.
    keeps_one = numbers["top_p"] == 0
    numbers["top_p"] = np.where(keeps_one, np.float32(1), numbers["top_p"])
    top_k = np.array([min(p.top_k or vocab_size, vocab_size) for p in all_params], np.int32)
    is_greedy = numbers["temperature"] < _MIN_TEMPERATURE
    numbers["temperature"] = np.where(is_greedy, np.float32(0), numbers["temperature"])
    return SampleInputs(
        **numbers,
        top_k=np.where(keeps_one, np.int32(1), top_k),
        seed_2=np.array(seeds, np.uint32),
        sample_index=np.array([row.sample_index for row in full_rows], np.int32),
        position=np.array([len(row.token_ids) for row in full_rows], np.int32),
        history_S=_padded(histories, max_tokens, vocab_size, np.int32)
        if any(histories)
        else _no_histories(len(rows), max_tokens, vocab_size),
        num_prompt_tokens=np.array([row.num_prompt_tokens for row in full_rows], np.int32),
        bias_ids_J=_padded(bias_ids, MAX_LOGIT_BIASES, vocab_size, np.int32),
        bias_values_J=_padded(bias_values, MAX_LOGIT_BIASES, 0, np.float32),
        only_biased=np.array([bool(row.allowed_ids) for row in full_rows]),
        given_id=np.array(
            [INVALID_TOKEN if row.given_id is None else row.given_id for row in full_rows], np.int32
        ),
        wants_best=np.array([params.num_logprobs > 0 for params in all_params]),
    )


def _biases(row: SampleRow) -> dict[int, float]:
    """What is added to logits. With `allowed_ids`, exactly these have an entry."""
    biases = row.params.logit_bias
    forbidden = dict.fromkeys(row.forbidden_ids, -np.inf)
    if row.allowed_ids:
        return {i: forbidden.get(i, biases.get(i, 0.0)) for i in row.allowed_ids}
    return {**biases, **forbidden} if forbidden else dict(biases)


@partial(jax.jit, static_argnames=("kernels",))
def sample(
    logits_BV: Float[Array, "B V"],
    inputs: SampleInputs,
    *,
    kernels: RowKernels | None = None,
) -> SampledTokens:
    """Draws a token for each row. A row has the same bits in any batch.

    `kernels`, if given, compute parts of it instead of XLA.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    summary_B = (kernels.summarize_rows if kernels else summarize_rows)(logits_BV)
    noise = kernels.gumbel if kernels else gumbel_noise

    def sample_one(row: tuple[Array, RowSummary, SampleInputs]) -> SampledTokens:
        return _sample_row(*row, noise)

    # Most steps are greedy in all rows. Then no row of logits has to be read again.
    needs_logits = (inputs.temperature > 0) | _is_adjusted(inputs) | inputs.wants_best
    return lax.cond(
        jnp.any(needs_logits),
        lambda *rows: lax.map(sample_one, rows),
        _take_best,
        logits_BV,
        summary_B,
        inputs,
    )


def choose(
    logits_V: Float[Array, " V"], row: SampleInputs, gumbel_V: Float[Array, " V"]
) -> Int[Array, ""]:
    """The token of one row at a temperature above 0, with this noise."""
    return _first_max(filter_logits(logits_V, row) + gumbel_V)


def filter_logits(logits_V: Float[Array, " V"], row: SampleInputs) -> Float[Array, " V"]:
    """Logits over temperature, with the highest at 0. Tokens that the filters drop get -inf."""
    # Subtract first: then the quotient overflows at no temperature.
    scaled_V = (logits_V - jnp.max(logits_V)) / row.temperature
    needs_ranks = (row.top_k < scaled_V.size) | (row.top_p < 1)
    is_kept_V = lax.cond(needs_ranks, _keep_best, _keep_all, scaled_V, row)
    is_kept_V &= jnp.exp(scaled_V) >= row.min_p
    return jnp.where(is_kept_V, scaled_V, -jnp.inf)


def noise_key(row: SampleInputs) -> UInt32[Array, " 2"]:
    """The threefry key of one draw. It depends on seed, sample index and position only."""
    key = jax.random.fold_in(_seed_key(row.seed_2), row.sample_index.astype(jnp.uint32))
    key = jax.random.fold_in(key, row.position.astype(jnp.uint32))
    return jax.random.key_data(key)


def gumbel_noise(key_2: UInt32[HostArray, " 2"], vocab_size: int) -> Float[Array, " V"]:
    """Noise of one draw. Entry v depends on the key and v only."""
    key = jax.random.wrap_key_data(jnp.asarray(key_2), impl="threefry2x32")
    # The process-wide setting would change the bits. True makes them independent of V.
    with jax.threefry_partitionable(True):
        bits_V = jax.random.bits(key, (vocab_size,), jnp.uint32)
    # The winner has the smallest exponential, so resolution matters near 0. These uniforms have 32
    # bits there. Usual float32 uniforms have 24, and would tie in 1 of 100 draws over 131072.
    uniform_V = (bits_V.astype(jnp.float32) + 0.5) * jnp.float32(2.0**-32)
    exponential_V = -jnp.log1p(-jnp.minimum(uniform_V, jnp.float32(1 - 2.0**-24)))
    return -jnp.log(exponential_V)


def summarize_rows(logits_BV: Float[Array, "B V"]) -> RowSummary:
    """The highest logit of each row, its token id, and the soft-max total."""
    return lax.map(_summarize_row, logits_BV)


def _summarize_row(logits_V: Array) -> RowSummary:
    top = _highest(logits_V)
    log_total = jnp.log(jnp.sum(jnp.exp(logits_V - top)))
    return RowSummary(top, _first_max(logits_V), log_total)


def _take_best(logits_BV: Array, summary_B: RowSummary, inputs: SampleInputs) -> SampledTokens:
    """The result of rows that are greedy, not adjusted, and do not want their best tokens."""
    num_rows, num_best = logits_BV.shape[0], min(MAX_LOGPROBS, logits_BV.shape[1])
    is_valid_B = jnp.isfinite(summary_B.top)
    token_B = jnp.where(inputs.given_id == INVALID_TOKEN, summary_B.best_id, inputs.given_id)
    logits_B = logits_BV[jnp.arange(num_rows, dtype=jnp.int32), token_B]
    return SampledTokens(
        token_B=jnp.where(is_valid_B, token_B, INVALID_TOKEN),
        logprob_B=logits_B - summary_B.top - summary_B.log_total,
        top_ids_BK=jnp.zeros((num_rows, num_best), jnp.int32),
        top_logprobs_BK=jnp.zeros((num_rows, num_best), jnp.float32),
        is_valid_B=is_valid_B,
    )


def _sample_row(
    logits_V: Array, summary: RowSummary, row: SampleInputs, noise: Callable[[Array, int], Array]
) -> SampledTokens:
    # Most rows are greedy, and their summary has the token.
    token, top = lax.cond(
        (row.temperature > 0) | _is_adjusted(row),
        partial(_adjust_and_draw, noise=noise),
        lambda logits_V, summary, row: (summary.best_id, summary.top),
        logits_V,
        summary,
        row,
    )
    is_valid = jnp.isfinite(top)
    token = jnp.where(row.given_id == INVALID_TOKEN, token, row.given_id)
    best_logits_K, best_ids_K = lax.cond(row.wants_best, _best_logits, _no_logits, logits_V)
    best_logprobs_K = best_logits_K - summary.top - summary.log_total
    return SampledTokens(
        token_B=jnp.where(is_valid, token, INVALID_TOKEN),
        logprob_B=logits_V[token] - summary.top - summary.log_total,
        top_ids_BK=best_ids_K,
        top_logprobs_BK=jnp.where(row.wants_best, best_logprobs_K, 0.0),
        is_valid_B=is_valid,
    )


def _best_logits(logits_V: Array) -> tuple[Array, Array]:
    best_K, ids_K = lax.top_k(logits_V, min(MAX_LOGPROBS, logits_V.size))
    return best_K, ids_K


def _no_logits(logits_V: Array) -> tuple[Array, Array]:
    num_best = min(MAX_LOGPROBS, logits_V.size)
    return jnp.zeros(num_best, jnp.float32), jnp.zeros(num_best, jnp.int32)


def _adjust_and_draw(
    logits_V: Array, summary: RowSummary, row: SampleInputs, noise: Callable[[Array, int], Array]
) -> tuple[Array, Array]:
    """The token after penalties and biases, and the highest logit."""
    adjusted_V, top, best_id = lax.cond(
        _is_adjusted(row),
        _adjust,
        lambda logits_V, summary, row: (logits_V, summary.top, summary.best_id),
        logits_V,
        summary,
        row,
    )
    token = lax.cond(
        row.temperature > 0,
        partial(_draw, noise=noise),
        lambda logits_V, row: best_id,
        adjusted_V,
        row,
    )
    return token, top


def _adjust(logits_V: Array, summary: RowSummary, row: SampleInputs) -> tuple[Array, Array, Array]:
    adjusted_V = _add_bias(_penalise(logits_V, row), row)
    return adjusted_V, _highest(adjusted_V), _first_max(adjusted_V)


def _draw(logits_V: Array, row: SampleInputs, noise: Callable[[Array, int], Array]) -> Array:
    return choose(logits_V, row, noise(noise_key(row), logits_V.size))


def _highest(values_V: Array) -> Array:
    # Look for NaN: XLA's own maximum over a long row may ignore it.
    return jnp.max(jnp.where(jnp.isnan(values_V), jnp.inf, values_V))


def _first_max(values_V: Array) -> Array:
    return lax.argmax(values_V, 0, jnp.int32)


def _has_penalty(row: SampleInputs) -> HostArray:
    return (
        (row.repetition_penalty != 1) | (row.presence_penalty != 0) | (row.frequency_penalty != 0)
    )


def _is_adjusted(row: SampleInputs) -> HostArray:
    is_biased = jnp.any(row.bias_values_J != 0, axis=-1)
    return _has_penalty(row) | row.only_biased | is_biased


def _penalise(logits_V: Array, row: SampleInputs) -> Array:
    return lax.cond(
        _has_penalty(row), _penalise_history, lambda logits_V, row: logits_V, logits_V, row
    )


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
    is_biased_V = jnp.zeros(logits_V.shape, bool).at[row.bias_ids_J].set(True, mode="drop")
    biased_V = logits_V.at[row.bias_ids_J].add(row.bias_values_J, mode="drop")
    return jnp.where(row.only_biased & ~is_biased_V, -jnp.inf, biased_V)


def _keep_all(scaled_V: Array, row: SampleInputs) -> Array:
    return jnp.ones(scaled_V.shape, bool)


def _keep_best(scaled_V: Array, row: SampleInputs) -> Array:
    """Top-k and top-p. Sorts only the best candidates if they contain the cut, or all tokens."""
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
    """The cuts of top-k and top-p, which must lie among the best `num_candidates`."""
    best_C, best_ids_C = lax.top_k(scaled_V, num_candidates)
    is_ranked_C = jnp.arange(num_candidates, dtype=jnp.int32) < row.top_k
    mass_C = jnp.where(is_ranked_C, jnp.exp(best_C), 0.0)
    total = jnp.where(row.top_k < scaled_V.size, jnp.sum(mass_C), total)
    # The token that crosses p is kept: a token stays if those above it hold at most p.
    above_C = jnp.concatenate([jnp.zeros(1, jnp.float32), jnp.cumsum(mass_C)[:-1]])
    # At p = 1, rounding of the sums must not drop the least likely token.
    most_above = jnp.where(row.top_p < 1, row.top_p * total, jnp.inf)
    num_kept = jnp.sum(above_C <= most_above, dtype=jnp.int32)
    is_in_top_p_V = scaled_V >= best_C[num_kept - 1]
    last = jnp.minimum(row.top_k, num_candidates) - 1
    ids_V = jnp.arange(scaled_V.size, dtype=best_ids_C.dtype)
    is_tied_V = (scaled_V == best_C[last]) & (ids_V <= best_ids_C[last])
    is_in_top_k_V = (row.top_k == scaled_V.size) | (scaled_V > best_C[last]) | is_tied_V
    return is_in_top_p_V & is_in_top_k_V


def _seed_key(seed_2: HostArray) -> Key[Array, ""]:
    """Equals jax.random.key(seed), which accepts 64 bits in 64-bit mode only."""
    return jax.random.wrap_key_data(jnp.asarray(seed_2), impl="threefry2x32")


@lru_cache(maxsize=16)
def _no_histories(num_rows: int, max_tokens: int, vocab_size: int) -> np.ndarray:
    """What most steps have. At a long context it is a megabyte, so it is not made for each step."""
    histories_BS = np.full((num_rows, max_tokens), vocab_size, np.int32)
    histories_BS.setflags(write=False)
    return histories_BS


def _padded(
    rows: Sequence[Sequence[Any]], size: int, padding: int, dtype: type[np.generic]
) -> np.ndarray:
    packed = np.full((len(rows), size), padding, dtype)
    for packed_row, values in zip(packed, rows, strict=True):
        packed_row[: len(values)] = values
    return packed
