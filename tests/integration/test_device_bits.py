"""One worker on several devices: the bits of one device, whatever lies where, and where it does."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from milliways.cluster.host.model_bytes import checkpoint_bytes
from milliways.model.checkpoint import Checkpoint
from milliways.model.config import ModelConfig
from milliways.model.decoder import Decoder
from milliways.model.runner import CacheSize
from milliways.model.sampling_params import SampledToken, SampleRow, SamplingParams
from milliways.wire.calls import (
    AdvanceBatch,
    BeginBatch,
    Drawn,
    ExpertInput,
    RunExperts,
    TokenRows,
)
from milliways.wire.placement import ExpertId, ShardPlan
from milliways.workers.attention import AttentionShard
from milliways.workers.devices import LocalDevices
from milliways.workers.experts import ExpertShard
from milliways.workers.loading import ShardLoader, shares_now
from milliways.workers.spreading import PartBytes
from tests.runners import ON_GPU, kernels_of

CACHE = CacheSize(num_blocks=8, block_size=4, max_slots=2)
pytestmark = pytest.mark.skipif(ON_GPU, reason="takes eight devices")
OWNER = ("r", 1)
PROMPT = [5, 9, 200, 31, 7]
Experts = frozenset[ExpertId]


@dataclass(frozen=True, slots=True)
class Told:
    """All that a worker tells of some steps, and what it keeps of them."""

    drawn: list[tuple[SampledToken, ...]]
    keys: list[bytes]
    num_stops: int


class Worker:
    """The shards of a worker with all attention layers; experts come and go."""

    def __init__(
        self, model_dir: Path, num_devices: int, backend: str = "native", dtype: str = "float32"
    ) -> None:
        ops, kernels = kernels_of(backend)
        self.checkpoint = Checkpoint.open(model_dir)
        self.config = self.checkpoint.config
        self.dtype = jnp.dtype(dtype)
        sizes = checkpoint_bytes(self.checkpoint, self.dtype.itemsize)
        self.local = LocalDevices(
            devices=tuple(jax.local_devices()[:num_devices]),
            parts=PartBytes.of(sizes, CACHE.num_blocks * CACHE.block_size),
        )
        decoder = Decoder(config=self.config, dtype=self.dtype, ops=ops)
        self.loader = ShardLoader(self.checkpoint, decoder, kernels, lambda n: None, self.local)
        self.experts = ExpertShard(decoder)
        plan = ShardPlan(
            first_layer=0, num_layers=self.config.num_layers, has_ends=True, experts=frozenset()
        )
        attention = self.loader.load_attention(plan, self.experts, CACHE)
        assert attention is not None
        self.attention: AttentionShard = attention

    def hold(self, wanted: Experts) -> None:
        """As a worker that a new placement tells what it shall hold."""
        shares = shares_now(self.local, self.attention, self.experts)
        wanted_now = wanted - self.experts.held
        for layer, groups in self.loader.load_experts(wanted_now, shares):
            self.experts.add(layer, groups)
        self.experts.keep_only(wanted)

    def compute(
        self, start: int, token_ids: list[int], elsewhere: ExpertShard
    ) -> tuple[Drawn, int]:
        """One step of one sequence; experts that are not here are asked of another worker."""
        turn = self.attention.begin(OWNER, BeginBatch(1, 0, rows_of(start, token_ids), None))
        num_stops = 0
        while isinstance(turn, ExpertInput):
            num_stops += 1
            outputs = self._outputs(turn, elsewhere)
            turn = self.attention.advance(OWNER, AdvanceBatch(1, turn.layer, outputs))
        assert isinstance(turn, Drawn)
        return turn, num_stops

    def _outputs(self, turn: ExpertInput, elsewhere: ExpertShard) -> np.ndarray:
        here = {e.expert for e in self.experts.held if e.layer == turn.layer}
        ids_TA = turn.expert_ids_TA
        is_here = np.isin(ids_TA, list(here))
        outputs_TAD = np.zeros((*ids_TA.shape, self.config.emb_size), self.dtype)
        for shard, mask_TA in ((self.experts, is_here), (elsewhere, ~is_here)):
            if mask_TA.any():
                call = RunExperts(turn.layer, turn.rows_TD, np.where(mask_TA, ids_TA, -1))
                assert shard.fault_of(call) is None
                outputs_TAD[mask_TA] = shard.run(call)
        return outputs_TAD


def rows_of(start: int, token_ids: list[int]) -> TokenRows:
    num_tokens = len(token_ids)
    params = SamplingParams(temperature=0.7, seed=3, num_logprobs=4)
    row = SampleRow(params=params, token_ids=tuple(PROMPT), num_prompt_tokens=len(PROMPT))
    return TokenRows(
        token_ids_T=np.array(token_ids, np.int32),
        positions_T=np.arange(start, start + num_tokens, dtype=np.int32),
        slots_T=np.zeros(num_tokens, np.int32),
        block_tables_BM=np.array([[3, 1, 6]], np.int32),
        logits_rows_W=np.array([num_tokens - 1], np.int32),
        samples=(row,),
    )


def everything(config: ModelConfig) -> Experts:
    layers, experts = range(config.num_layers), range(config.num_experts)
    return frozenset(ExpertId(layer, expert) for layer in layers for expert in experts)


def holdings(config: ModelConfig) -> Iterator[Experts]:
    """What a worker holds from step to step, as placements come and go."""
    whole = everything(config)
    few = frozenset(e for e in whole if e.expert % 3 == e.layer % 3)
    yield few
    yield few | {e for e in whole if e.layer == 1}
    yield whole
    yield whole - {e for e in whole if e.layer == 1 and e.expert > 2}
    yield frozenset()
    yield whole


def told_by(worker: Worker, elsewhere: ExpertShard, *, changes: bool) -> Told:
    drawn: list[tuple[SampledToken, ...]] = []
    num_stops = 0
    position, tokens = 0, PROMPT
    for wanted in holdings(worker.config):
        worker.hold(wanted if changes else everything(worker.config))
        turn, stops = worker.compute(position, tokens, elsewhere)
        drawn.append(turn.tokens)
        num_stops += stops
        position += len(tokens)
        tokens = [turn.tokens[0].token_id]
    keys = [np.asarray(c.keys_NPRK).tobytes() for c in worker.attention.read_cache().values()]
    return Told(drawn, keys, num_stops)


def on_one_device(
    model_dir: Path, backend: str = "native", dtype: str = "float32"
) -> tuple[Told, ExpertShard]:
    worker = Worker(model_dir, 1, backend, dtype)
    worker.hold(everything(worker.config))
    told = told_by(worker, worker.experts, changes=False)
    assert told.num_stops == 0
    return told, worker.experts


@pytest.mark.parametrize(
    ("backend", "dtype", "counts"),
    [
        ("native", "float32", (1, 2, 3, 8)),
        ("native", "bfloat16", (3,)),
        ("pure", "float32", (3,)),
    ],
)
def test_experts_come_and_go_on_any_number_of_devices(
    golden_dir: Path, backend: str, dtype: str, counts: tuple[int, ...]
) -> None:
    model_dir = golden_dir / "tiny"
    expected, elsewhere = on_one_device(model_dir, backend, dtype)
    for num_devices in counts:
        worker = Worker(model_dir, num_devices, backend, dtype)
        told = told_by(worker, elsewhere, changes=True)
        assert told.num_stops > 0
        assert (told.drawn, told.keys) == (expected.drawn, expected.keys), num_devices


@pytest.mark.parametrize("num_devices", [2, 3, 8])
def test_a_layer_with_all_experts_here_does_not_stop(golden_dir: Path, num_devices: int) -> None:
    model_dir = golden_dir / "tiny"
    expected, elsewhere = on_one_device(model_dir)
    worker = Worker(model_dir, num_devices)
    assert told_by(worker, elsewhere, changes=False) == expected
    for device in worker.local.devices:
        assert worker.experts.held_on(device)


@pytest.mark.slow
def test_kernels_of_a_gpu_keep_their_bits_as_well(golden_dir: Path) -> None:
    """In interpretation, of which one step takes a minute."""
    told: list[tuple[SampledToken, ...]] = []
    for num_devices in (1, 3):
        worker = Worker(golden_dir / "tiny", num_devices, "gpu")
        worker.hold(everything(worker.config))
        told.append(worker.compute(0, PROMPT, worker.experts)[0].tokens)
    assert told[0] == told[1]
