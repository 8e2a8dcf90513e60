"""Sampling: what is drawn, and that nothing but the row's own tokens matters."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from milliways.model import sampling
from milliways.model.ops import NativeOps
from milliways.model.sampling import (
    SampledTokens,
    SampleInputs,
    gumbel_noise,
    noise_key,
    pack_rows,
    sample,
)
from milliways.model.sampling_params import INVALID_TOKEN, SampleRow, SamplingParams
from tests.compilations import compilations

# More than the number of candidates, so that both ways of finding a cut are taken.
V = 1200
MAX_TOKENS = 320
NUM_SLOTS = 8
GREEDY = SamplingParams(temperature=0.0)
# Brings history and bias into the batch, so that nearly all tests share one compiled program.
CARRIER = SampleRow(
    params=SamplingParams(frequency_penalty=0.5, logit_bias={1: 1.0}),
    token_ids=(1, 2),
    num_prompt_tokens=1,
)


def row_of(params: SamplingParams, token_ids: tuple[int, ...] = (), prompt: int = 0) -> SampleRow:
    return SampleRow(params=params, token_ids=token_ids, num_prompt_tokens=prompt)


def pack(rows: Sequence[SampleRow | None], vocab_size: int = V) -> SampleInputs:
    """As `pack_rows`, with the best tokens of every row."""
    inputs = pack_rows(rows, vocab_size, MAX_TOKENS)
    return inputs._replace(wants_best=np.ones(len(rows), bool))


def draw(rows: list[SampleRow], logits_BV: np.ndarray, num_slots: int = NUM_SLOTS) -> SampledTokens:
    """Samples the rows in a batch of `num_slots` whose last row is the carrier."""
    num_empty = num_slots - len(rows) - 1
    inputs = pack([*rows, *([None] * num_empty), CARRIER])
    padded_BV = np.zeros((num_slots, V), np.float32)
    padded_BV[: len(rows)] = logits_BV
    drawn = sample(jnp.asarray(padded_BV), inputs)
    return SampledTokens(*(np.asarray(field)[: len(rows)] for field in drawn))


def draw_one(params: SamplingParams, logits_V: np.ndarray, *history: int, prompt: int = 0) -> int:
    return int(draw([row_of(params, history, prompt)], logits_V[None]).token_B[0])


def noise_of(row: SampleRow) -> np.ndarray:
    return np.asarray(gumbel_noise(noise_key(squeeze(pack([row]))), V))


def squeeze(inputs: SampleInputs) -> SampleInputs:
    return SampleInputs(*(jnp.asarray(field)[0] for field in inputs))


def random_logits(seed: int, scale: float = 2.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=V) * scale).astype(np.float32)


def peaked(**logits: float) -> np.ndarray:
    """All logits 0 but those named, as `peaked(t3=5.0)`."""
    logits_V = np.zeros(V, np.float32)
    for name, logit in logits.items():
        logits_V[int(name[1:])] = logit
    return logits_V


# Greedy, ties, and logits that are no numbers.


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 1e-300])
def test_temperature_of_nought_or_nearly_takes_the_highest_logit(temperature: float):
    logits_V = random_logits(0)
    params = SamplingParams(temperature=temperature, seed=9)
    assert draw_one(params, logits_V) == logits_V.argmax()


@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        SamplingParams(top_k=1, seed=3),
        SamplingParams(temperature=0.0, top_k=50, top_p=0.5),
    ],
)
def test_tie_goes_to_the_lowest_id(params: SamplingParams):
    assert draw_one(params, peaked(t17=5.0, t400=5.0, t3=4.0)) == 17


def test_top_k_keeps_exactly_k_of_tied_tokens():
    logits_V = peaked(t900=1.0)
    tokens = {draw_one(SamplingParams(top_k=3, seed=seed), logits_V) for seed in range(40)}
    assert tokens == {0, 1, 900}


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(top_p=0.9), SamplingParams(top_k=5)])
@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.nan])
def test_row_with_a_broken_logit_is_flagged_and_has_no_token(params: SamplingParams, broken: float):
    drawn = draw([row_of(params)] * 2, np.stack([peaked(t7=broken), peaked(t7=9.0)]))
    assert drawn.is_valid_B.tolist() == [False, True]
    assert drawn.token_B[0] == INVALID_TOKEN
    assert drawn.token_B[1] >= 0


def test_row_without_any_finite_logit_is_flagged():
    assert not draw([row_of(GREEDY)], np.full((1, V), -np.inf, np.float32)).is_valid_B[0]


def test_minus_infinity_forbids_a_token_and_no_more():
    logits_V = np.full(V, -np.inf, np.float32)
    logits_V[[5, 6]] = 0.0
    params = [SamplingParams(temperature=100.0, top_p=0.999, seed=seed) for seed in range(7)]
    drawn = draw([row_of(one) for one in params], np.tile(logits_V, (7, 1)))
    assert drawn.is_valid_B.all()
    assert set(drawn.token_B.tolist()) <= {5, 6}


@pytest.mark.parametrize("scale", [1e-38, 1e30])
def test_extreme_logits_and_temperatures_stay_finite(scale: float):
    logits_V = random_logits(1) * np.float32(scale)
    for temperature in (1e-5, 100.0):
        params = SamplingParams(temperature=temperature, top_p=0.5)
        assert draw([row_of(params)], logits_V[None]).is_valid_B[0]


# Penalties and bias.


def test_repetition_penalty_counts_prompt_and_completion():
    logits_V = peaked(t3=2.0, t4=1.9, t5=1.8)
    params = replace(GREEDY, repetition_penalty=1.5)
    assert draw_one(params, logits_V) == 3
    assert draw_one(params, logits_V, 3, prompt=1) == 4
    assert draw_one(params, logits_V, 3, 4, prompt=1) == 5


def test_repetition_penalty_pushes_negative_logits_down():
    logits_V = peaked(t3=-0.5, t4=-0.6) - 0.1
    logits_V[[i for i in range(V) if i not in (3, 4)]] = -9.0
    assert draw_one(replace(GREEDY, repetition_penalty=1.5), logits_V, 3) == 4


def test_presence_and_frequency_penalties_count_the_completion_only():
    logits_V = peaked(t3=2.0, t4=1.5)
    for name in ("presence_penalty", "frequency_penalty"):
        params = replace(GREEDY, **{name: 1.0})
        assert draw_one(params, logits_V, 3, 3, prompt=2) == 3
        assert draw_one(params, logits_V, 3, 3, prompt=1) == 4


def test_frequency_penalty_grows_with_the_count_and_presence_does_not():
    logits_V = peaked(t3=2.0, t4=1.2)
    assert draw_one(replace(GREEDY, presence_penalty=0.5), logits_V, 3, 3, 3) == 3
    assert draw_one(replace(GREEDY, frequency_penalty=0.5), logits_V, 3) == 3
    assert draw_one(replace(GREEDY, frequency_penalty=0.5), logits_V, 3, 3) == 4


def test_bias_is_added_after_the_penalties():
    # 2 / 2 + 1 = 2 beats 1.8; (2 + 1) / 2 = 1.5 would not.
    logits_V = peaked(t3=2.0, t4=1.8)
    params = replace(GREEDY, repetition_penalty=2.0, logit_bias={3: 1.0})
    assert draw_one(params, logits_V, 3) == 3


def test_bias_of_100_forces_and_of_minus_100_forbids():
    logits_V = random_logits(2)
    best = int(logits_V.argmax())
    assert draw_one(SamplingParams(logit_bias={9: 100.0}), logits_V) == 9
    assert draw_one(replace(GREEDY, logit_bias={best: -100.0}), logits_V) != best


# The whole pipeline against a plain one.


def plain_choice(row: SampleRow, logits_V: np.ndarray, gumbel_V: np.ndarray) -> int:
    """The documented order, in float64, with sorted lists and no cleverness."""
    params, values_V = row.params, logits_V.astype(np.float64)
    for v in set(row.token_ids):
        penalty = params.repetition_penalty
        values_V[v] = values_V[v] / penalty if values_V[v] > 0 else values_V[v] * penalty
    completion = row.token_ids[row.num_prompt_tokens :]
    for v in set(completion):
        values_V[v] -= params.frequency_penalty * completion.count(v) + params.presence_penalty
    for v, bias in params.logit_bias.items():
        values_V[v] += bias
    if params.temperature == 0:
        return int(values_V.argmax())
    values_V = (values_V - values_V.max()) / params.temperature
    ranked = sorted(range(V), key=lambda v: (-values_V[v], v))
    kept = ranked[: params.top_k or V]
    mass = np.exp(values_V[kept])
    above = np.cumsum(mass) - mass
    cut = values_V[kept][above <= params.top_p * mass.sum()].min()
    kept = [v for v in kept if values_V[v] >= cut and np.exp(values_V[v]) >= params.min_p]
    return max(kept, key=lambda v: (values_V[v] + gumbel_V[v], -v))


def random_params(rng: np.random.Generator) -> SamplingParams:
    def maybe(value: Any, off: Any) -> Any:
        return value if rng.random() < 0.5 else off

    return SamplingParams(
        temperature=maybe(rng.uniform(0.2, 3.0), 1.0),
        top_p=maybe(rng.uniform(0.01, 0.9999), 1.0),
        top_k=maybe(int(rng.integers(1, V + 100)), 0),
        min_p=maybe(rng.uniform(0, 0.2), 0.0),
        repetition_penalty=maybe(rng.uniform(0.5, 2.0), 1.0),
        presence_penalty=maybe(rng.uniform(-2, 2), 0.0),
        frequency_penalty=maybe(rng.uniform(-2, 2), 0.0),
        logit_bias={int(v): rng.uniform(-9, 9) for v in rng.integers(0, V, maybe(5, 0))},
        seed=int(rng.integers(2**63)),
    )


@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0])
def test_any_parameters_draw_what_a_plain_implementation_draws(scale: float):
    rng = np.random.default_rng(20)
    for _ in range(12):
        rows = [
            SampleRow(
                params=random_params(rng),
                token_ids=tuple(rng.integers(0, V, 200).tolist()),
                num_prompt_tokens=int(rng.integers(0, 200)),
                sample_index=int(rng.integers(0, 9)),
            )
            for _ in range(NUM_SLOTS - 1)
        ]
        logits_BV = (rng.normal(size=(len(rows), V)) * scale).astype(np.float32)
        expected = [
            plain_choice(row, logits_V, noise_of(row))
            for row, logits_V in zip(rows, logits_BV, strict=True)
        ]
        assert draw(rows, logits_BV).token_B.tolist() == expected


# Log-probabilities.


def test_logprobs_are_those_of_the_raw_logits():
    logits_V = random_logits(4)
    params = SamplingParams(temperature=0.3, top_k=2, repetition_penalty=2.0, logit_bias={8: 50.0})
    drawn = draw([row_of(params, (3, 4))], logits_V[None])
    exact_V = logits_V.astype(np.float64)
    exact_V -= np.log(np.exp(exact_V).sum())
    best = np.argsort(-exact_V, stable=True)[:20]
    assert drawn.top_ids_BK[0].tolist() == best.tolist()
    np.testing.assert_allclose(drawn.top_logprobs_BK[0], exact_V[best], atol=1e-5)
    np.testing.assert_allclose(drawn.logprob_B[0], exact_V[drawn.token_B[0]], atol=1e-5)


def test_tied_top_logprobs_come_lowest_id_first():
    drawn = draw([row_of(GREEDY)], peaked(t700=1.0)[None])
    assert drawn.top_ids_BK[0].tolist() == [700, *range(19)]


# Same bits, whatever the batch.


MATES = [
    row_of(GREEDY),
    row_of(SamplingParams(seed=2**40 + 3)),
    row_of(SamplingParams(temperature=0.7, top_p=0.9, seed=5), (1, 2, 3), 1),
    row_of(SamplingParams(top_k=1100, top_p=0.999, seed=1)),
    row_of(
        SamplingParams(
            top_p=0.95,
            top_k=30,
            min_p=0.01,
            repetition_penalty=1.2,
            frequency_penalty=0.33,
            presence_penalty=0.7,
            logit_bias={3: 1.1},
            seed=9,
        ),
        tuple(range(60)),
        20,
    ),
    row_of(SamplingParams(temperature=3.0, top_p=0.999, seed=6)),
    row_of(replace(GREEDY, frequency_penalty=0.1, logit_bias={5: 0.7}), (5, 5, 5), 1),
]
MATES_LOGITS_BV = np.stack([random_logits(seed) for seed in range(len(MATES))])


def assert_same_bits(one: SampledTokens, other: SampledTokens) -> None:
    for name, ours, theirs in zip(one._fields, one, other, strict=True):
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes(), name


def pick(drawn: SampledTokens, rows: list[int]) -> SampledTokens:
    return SampledTokens(*(np.asarray(field)[rows] for field in drawn))


@pytest.fixture(scope="module")
def together() -> SampledTokens:
    return draw(MATES, MATES_LOGITS_BV)


@pytest.mark.parametrize("rows", [[6, 5, 4, 3, 2, 1, 0], [4], [2, 3], [0, 5]])
@pytest.mark.parametrize("num_slots", [2, 3, 8])
def test_row_has_the_same_bits_in_any_batch_and_place(
    together: SampledTokens, rows: list[int], num_slots: int
):
    rows = rows[: num_slots - 1]
    drawn = draw([MATES[row] for row in rows], MATES_LOGITS_BV[rows], num_slots)
    assert_same_bits(drawn, pick(together, rows))


@pytest.mark.parametrize("row", [4, 6])
def test_row_alone_has_the_same_bits(together: SampledTokens, row: int):
    alone = sample(MATES_LOGITS_BV[[row]], pack([MATES[row]]))
    assert_same_bits(alone, pick(together, [row]))


@pytest.mark.parametrize("row", [0, 1, 2, 3, 5])
def test_mates_that_want_penalties_bias_and_logprobs_change_no_bit(
    together: SampledTokens, row: int
):
    alone = sample(MATES_LOGITS_BV[[row]], pack_rows([MATES[row]], V, MAX_TOKENS))
    assert not alone.top_ids_BK.any() and not alone.top_logprobs_BK.any()
    for name in ("token_B", "logprob_B", "is_valid_B"):
        ours, theirs = getattr(alone, name), getattr(together, name)[[row]]
        assert np.asarray(ours).tobytes() == theirs.tobytes()


@pytest.mark.parametrize("kernels", [None, NativeOps()], ids=["xla", "native"])
def test_greedy_rows_have_the_same_bits_beside_one_that_needs_its_logits(kernels):
    """A step of greedy rows alone is drawn without reading the logits again."""
    plain = row_of(GREEDY, (1, 2, 3))
    rows = [plain, replace(plain, given_id=6), plain, plain]
    logits_BV = np.stack([random_logits(seed) for seed in range(5)])
    logits_BV[2, 9], logits_BV[3, 9] = np.nan, np.inf
    alone = sample(logits_BV[:4], pack_rows(rows, V, MAX_TOKENS), kernels=kernels)
    drawing = row_of(SamplingParams(temperature=1.0), (1, 2, 3))
    mixed = sample(logits_BV, pack_rows([*rows, drawing], V, MAX_TOKENS), kernels=kernels)
    assert_same_bits(pick(alone, [0, 1, 2, 3]), pick(mixed, [0, 1, 2, 3]))
    assert np.asarray(alone.is_valid_B).tolist() == [True, True, False, False]


def test_longer_padding_of_the_history_changes_no_bit(together: SampledTokens):
    inputs = pack_rows([*MATES, CARRIER], V, 4 * MAX_TOKENS)
    inputs = inputs._replace(wants_best=np.ones(NUM_SLOTS, bool))
    logits_BV = np.concatenate([MATES_LOGITS_BV, np.zeros((1, V), np.float32)])
    drawn = sample(logits_BV, inputs)
    assert_same_bits(pick(drawn, list(range(len(MATES)))), together)


def test_one_program_draws_rows_of_any_parameters():
    logits_BV = random_logits(3)[None, :700]
    sample(logits_BV, pack_rows([None], 700, MAX_TOKENS))
    with compilations() as compiled:
        for row in (*MATES, row_of(replace(GREEDY, num_logprobs=5)), row_of(GREEDY, (1,) * 300)):
            params = replace(row.params, num_logprobs=row.params.seed % 21)
            for each in (row, replace(row, params=params), replace(row, given_id=6)):
                sample(logits_BV, pack_rows([each], 700, MAX_TOKENS))
    assert compiled == []


def test_only_a_penalty_needs_the_history():
    inputs = pack_rows([row_of(GREEDY, (1, 2, 3)), MATES[-1], None], V, MAX_TOKENS)
    assert inputs.history_S.shape == (3, MAX_TOKENS)
    assert (inputs.history_S[0] == V).all() and inputs.history_S[1, :4].tolist() == [5, 5, 5, V]
    assert inputs.position.tolist() == [3, 3, 0]


def primitives_always_run(jaxpr: Any) -> set[str]:
    """Names of the primitives in a program, those inside the branches of a `cond` left out."""
    names = set()
    for equation in jaxpr.eqns:
        names.add(equation.primitive.name)
        if equation.primitive.name == "cond":
            continue
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                names |= primitives_always_run(inner)
    return names


def test_greedy_row_neither_sorts_nor_draws_noise():
    inputs = pack([MATES[4], None])
    program = jax.make_jaxpr(sample)(jnp.zeros((2, V)), inputs)
    names = primitives_always_run(program.jaxpr)
    assert {"cond", "exp"} <= names
    assert not {"sort", "top_k", "cumsum", "random_bits", "threefry2x32", "log1p"} & names


# The random stream.


NUM_DRAWS = 20_000
PROBABILITIES_V = np.array([0.35, 0.25, 0.2, 0.1, 0.05, 0.03, 0.015, 0.005])


@pytest.fixture(scope="module")
def many_tokens() -> np.ndarray:
    """Tokens of one seed at 20,000 positions, from a distribution that is known."""
    logits_V = jnp.log(jnp.asarray(PROBABILITIES_V, jnp.float32))
    inputs = squeeze(pack([row_of(SamplingParams(seed=42))], 8))

    def token_at(position: jax.Array) -> jax.Array:
        row = inputs._replace(position=position)
        return sampling.choose(logits_V, row, gumbel_noise(noise_key(row), 8))

    return np.asarray(jax.jit(jax.vmap(token_at))(jnp.arange(NUM_DRAWS)))


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    return float((((counts - expected) ** 2) / expected).sum())


def test_tokens_are_drawn_in_proportion_to_their_probabilities(many_tokens: np.ndarray):
    counts_V = np.bincount(many_tokens, minlength=8)
    # 7 degrees of freedom: 24.3 is exceeded once in a thousand seeds.
    assert chi_square(counts_V, PROBABILITIES_V * NUM_DRAWS) < 24.3


def test_tokens_of_neighbouring_positions_are_independent(many_tokens: np.ndarray):
    pairs = np.zeros((4, 4))
    # The rare tokens are taken together, so that every cell expects enough.
    grouped = np.minimum(many_tokens, 3)
    np.add.at(pairs, (grouped[:-1], grouped[1:]), 1)
    grouped_probabilities = np.append(PROBABILITIES_V[:3], PROBABILITIES_V[3:].sum())
    expected = np.outer(grouped_probabilities, grouped_probabilities) * (NUM_DRAWS - 1)
    # About 12 degrees of freedom: 32.9 is exceeded once in a thousand seeds.
    assert chi_square(pairs, expected) < 32.9


def test_forbidden_tokens_are_never_drawn() -> None:
    logits_V = peaked(t3=9.0, t4=8.0, t5=7.0)
    for params in (GREEDY, SamplingParams(seed=3), replace(GREEDY, logit_bias={3: 100.0})):
        row = replace(row_of(params), forbidden_ids=(3, 4))
        drawn = draw([row], logits_V[None])
        assert int(drawn.token_B[0]) not in (3, 4)
        assert bool(drawn.is_valid_B[0])
    assert draw_one(GREEDY, logits_V) == 3


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(seed=5, top_p=0.9, temperature=2.0)])
def test_only_allowed_tokens_are_drawn(params: SamplingParams) -> None:
    logits_V = random_logits(1)
    rows = [replace(row_of(params, (1,) * n), allowed_ids=(10, 11, 1199)) for n in range(6)]
    drawn = draw(rows, np.tile(logits_V, (6, 1)))
    assert set(drawn.token_B.tolist()) <= {10, 11, 1199}
    # The report is of the model's own probabilities.
    free = draw([row_of(GREEDY)], logits_V[None])
    assert drawn.top_ids_BK[0].tolist() == free.top_ids_BK[0].tolist()


def test_allowed_tokens_keep_their_biases_and_may_be_forbidden() -> None:
    logits_V = peaked(t10=5.0, t11=4.0, t12=3.0)
    allowed = replace(row_of(GREEDY), allowed_ids=(10, 11, 12))
    assert int(draw([replace(allowed, forbidden_ids=(10,))], logits_V[None]).token_B[0]) == 11
    biased = replace(allowed, params=replace(GREEDY, logit_bias={12: 3.0, 50: 99.0}))
    assert int(draw([biased], logits_V[None]).token_B[0]) == 12
    nothing = draw([replace(allowed, forbidden_ids=(10, 11, 12))], logits_V[None])
    assert not bool(nothing.is_valid_B[0])


def test_top_p_of_nought_takes_one_best_token() -> None:
    logits_V = peaked(t3=5.0, t7=5.0)
    assert {draw_one(SamplingParams(top_p=0.0, seed=s), logits_V) for s in range(20)} == {3}
