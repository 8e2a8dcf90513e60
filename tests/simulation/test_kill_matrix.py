"""Each process of a small cluster is killed at every message of a small run: same tokens.

The rows of the matrix are shapes of clusters, the columns are sampling modes (`kill_matrix.py`). A
process dies just before its message arrives. The other processes notice later, as in every
simulation. If a schedule fails, its error names the command that repeats it.
"""

import dataclasses
from itertools import product

import pytest

from milliways.router.requests.sequence import FinishReason
from tests.simulation.fake_model import expected_streams
from tests.simulation.kill_matrix import (
    CONFIG,
    LED_SHAPES,
    MODES,
    NUM_LAYERS,
    SHAPES,
    Blow,
    Cell,
    Kind,
    Moment,
    Phase,
    Shape,
    blows_of,
    cell_of,
    single_blows,
)
from tests.simulation.true_sampler import TrueSampler

# Long tests take only every n-th moment by default. Victims and modes start at different moments.
MANY_MESSAGES = 90
REPLACED_STRIDE = 5
LED_STRIDE = 7
EVERY = pytest.param(1, marks=pytest.mark.slow, id="every")


def thinned(cell: Cell) -> int:
    """The stride; it is larger in a cell of many messages."""
    return 1 + cell.num_messages // MANY_MESSAGES


@pytest.mark.parametrize("stride", [pytest.param(None, id="some"), EVERY])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_death_at_any_message_costs_no_token(shape: Shape, mode: str, stride: int | None) -> None:
    cell = Cell(shape, mode)
    for blows in single_blows(cell, stride=stride or thinned(cell)):
        simulation = cell.run(blows)
        assert simulation.supervisor.num_deaths == 1, f"no process died: {cell.command(blows)}"


@pytest.mark.parametrize("stride", [pytest.param(REPLACED_STRIDE, id="some"), EVERY])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_replacing_a_frozen_process_costs_no_token(shape: Shape, mode: str, stride: int) -> None:
    cell = Cell(shape, mode)
    for blows in single_blows(cell, Blow.REPLACE_FROZEN, stride):
        cell.run(blows, Blow.REPLACE_FROZEN)


@pytest.mark.parametrize("blow", [Blow.RACE, Blow.RACE_FROZEN], ids=lambda blow: blow.value)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s.num_routers > 1], ids=str)
def test_hedging_costs_no_token(shape: Shape, mode: str, blow: Blow) -> None:
    cell = Cell(shape, mode)
    num_hedges = num_won = 0
    for blows in single_blows(cell, blow):
        simulation = cell.run(blows, blow)
        num_hedges += simulation.ingress.num_hedges
        num_won += simulation.ingress.num_hedges_won
    assert num_hedges > 0
    if blow is Blow.RACE_FROZEN:
        # A frozen router usually loses.
        assert 2 * num_won > num_hedges


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", LED_SHAPES, ids=str)
def test_a_death_of_the_controller_disturbs_no_stream(shape: Shape, mode: str) -> None:
    cell = Cell(shape, mode)
    for blows in single_blows(cell, of=frozenset({Kind.CONTROLLER})):
        simulation = cell.run(blows)
        (before, _), *_ = blows
        if before > cell.num_before_requests:
            attempts = {journal.num_attempts for journal in simulation.ingress.journals}
            incarnations = {m.incarnation for m in simulation.supervisor.view.members.values()}
            assert (attempts, incarnations) == ({1}, {1}), cell.command(blows)


@pytest.mark.parametrize("stride", [pytest.param(LED_STRIDE, id="some"), EVERY])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", LED_SHAPES, ids=str)
def test_a_death_of_a_worker_under_the_controller_costs_no_token(
    shape: Shape, mode: str, stride: int
) -> None:
    cell = Cell(shape, mode)
    workers = frozenset(Kind) - {Kind.CONTROLLER}
    for blows in single_blows(cell, stride=stride, of=workers):
        cell.run(blows)


@pytest.mark.parametrize("mode", MODES)
def test_every_kind_of_process_dies_in_every_layer_of_every_phase(mode: str) -> None:
    # A run is deterministic up to the blow, so the undisturbed run gives the moments of deaths.
    hit: set[tuple[Kind, Moment]] = set()
    for shape in (*SHAPES, *LED_SHAPES):
        cell = Cell(shape, mode)
        for ((n, name),) in single_blows(cell, of=frozenset({Kind.CONTROLLER})):
            hit.add((cell.kinds[name], cell.moments[n - 1]))
        stride = LED_STRIDE if shape.is_led else thinned(cell)
        for ((n, name),) in single_blows(cell, stride=stride):
            hit.add((cell.kinds[name], cell.moments[n - 1]))
    phases = Phase if all(r.max_tokens in (0, 4, 8) for r in MODES[mode]) else SHORT_PHASES
    wanted = {
        (kind, Moment(phase, layer))
        for kind, phase, layer in product(Kind, phases, range(NUM_LAYERS))
    }
    assert wanted - hit == set()


# Phases of streams with two or three tokens.
SHORT_PHASES = (Phase.PREFILL, Phase.LAST)


def test_the_stop_string_ends_a_stream_that_would_go_on() -> None:
    (request,) = MODES["stop"]
    (stream,) = expected_streams(request, CONFIG, TrueSampler())
    (longer,) = expected_streams(dataclasses.replace(request, stop=()), CONFIG, TrueSampler())
    assert (len(stream.tokens), len(longer.tokens)) == (4, 8)
    assert stream.finish_reason is FinishReason.STOP


def test_modes_draw_different_tokens() -> None:
    drawn = {
        mode: tuple(
            tuple(token.token_id for token in stream.tokens)
            for request in requests
            for stream in expected_streams(request, CONFIG, TrueSampler())
        )
        for mode, requests in MODES.items()
    }
    # Log-probabilities and stop strings do not change the tokens.
    alike = {"logprobs": "temperature", "stop": "greedy"}
    assert all(drawn[mode] == drawn[other] for mode, other in alike.items())
    others = [tokens for mode, tokens in drawn.items() if mode not in alike]
    assert len(set(others)) == len(others)
    assert len(set(drawn["n-3"])) == 3


def test_a_schedule_is_read_as_it_is_written() -> None:
    blows = ((17, "w1"), (17, "router of w0"), (40, "w0"))
    assert blows_of(",".join(f"{n}:{name}" for n, name in blows)) == blows
    cell = cell_of("2w-1r-layers-out", "top-p")
    assert cell.command(blows[1:2]).endswith("top-p --kill '17:router of w0'")
