"""Once a worker is warm, no call makes it compile: while it does, every stream stands still."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from milliways.cluster.host.model_bytes import checkpoint_bytes
from milliways.model.checkpoint import Checkpoint, TensorRole
from milliways.model.decoder import Decoder
from milliways.model.released import released_arrays
from milliways.model.runner import CacheSize
from milliways.model.sampling_params import SampleRow, SamplingParams
from milliways.wire.calls import (
    AdvanceBatch,
    BeginBatch,
    ExpertInput,
    Refusal,
    RunExperts,
    TokenRows,
)
from milliways.wire.errors import RefusalReason
from milliways.wire.placement import ExpertId, ShardPlan
from milliways.workers.attention import AttentionShard
from milliways.workers.devices import LocalDevices
from milliways.workers.experts import ExpertShard
from milliways.workers.loading import ShardLoader
from milliways.workers.native_experts import give_experts, make_node
from milliways.workers.spreading import PartBytes
from milliways.workers.warm_up import warm_up
from tests.compilations import compilations
from tests.runners import BACKEND, kernels_of

SIZE = CacheSize(num_blocks=11, block_size=4, max_slots=5)
MAX_STEP_TOKENS, MAX_MERGED_ROWS = 3, 8
OWNER = ("router", 1)
MODES = [
    SamplingParams(temperature=0.0),
    SamplingParams(seed=7),
    SamplingParams(temperature=0.7, top_p=0.9),
    SamplingParams(top_k=5, min_p=0.1),
    SamplingParams(repetition_penalty=1.3),
    SamplingParams(temperature=0.0, presence_penalty=0.5, frequency_penalty=-0.5),
    SamplingParams(logit_bias={3: 1.0}),
    SamplingParams(temperature=0.0, logit_bias={n: float(n % 7) for n in range(200)}),
    *(SamplingParams(num_logprobs=count) for count in range(21)),
]


def rows_of(num_rows: int, num_drawn: int, first_mode: int = 0) -> TokenRows:
    """`num_rows` tokens of one sequence, of which the last ones draw or are scored."""
    samples = [
        SampleRow(
            params=MODES[(first_mode + i) % len(MODES)],
            token_ids=tuple(range(5, 5 + first_mode + i)),
            num_prompt_tokens=2,
            sample_index=i,
            given_id=3 if i % 4 == 3 else None,
            forbidden_ids=(5, 6) if i % 3 == 1 else (),
            allowed_ids=(7, 8) if i % 3 == 2 else (),
        )
        for i in range(num_drawn)
    ]
    return TokenRows(
        token_ids_T=np.arange(num_rows, dtype=np.int32) + 3,
        positions_T=np.arange(num_rows, dtype=np.int32),
        slots_T=np.zeros(num_rows, np.int32),
        block_tables_BM=np.arange(SIZE.num_blocks, dtype=np.int32)[None],
        logits_rows_W=np.arange(num_rows - num_drawn, num_rows, dtype=np.int32),
        samples=tuple(samples),
    )


class Worker:
    """The shards of a worker, without threads and servers.

    With a node, steps exchange rows inside; as no batch has begun there, they get zeros.
    """

    def __init__(
        self, checkpoint: Checkpoint, plan: ShardPlan, num_devices: int, has_node: bool
    ) -> None:
        self.config = checkpoint.config
        ops, kernels = kernels_of(BACKEND)
        sizes = checkpoint_bytes(checkpoint, 4)
        self.local = LocalDevices(
            devices=tuple(jax.local_devices()[:num_devices]),
            parts=PartBytes.of(sizes, SIZE.num_blocks * SIZE.block_size),
        )
        decoder = Decoder(config=self.config, dtype=jnp.dtype("float32"), ops=ops)
        self.loader = ShardLoader(checkpoint, decoder, kernels, lambda _: None, self.local)
        self.node = (
            make_node(decoder, kernels, self.local.devices, MAX_STEP_TOKENS) if has_node else None
        )
        self.experts = ExpertShard(decoder, num_devices > 1, partial(give_experts, self.node))
        attention = self.loader.load_attention(plan, self.experts, SIZE, self.node)
        assert attention is not None and attention.has_exchange == has_node
        self.attention: AttentionShard = attention
        self.take(plan.experts, is_ready=False)
        warm_up(
            decoder,
            attention,
            self.experts,
            self.local.devices,
            MAX_STEP_TOKENS,
            MAX_MERGED_ROWS,
            copies_blocks=True,
        )

    def take(self, wanted: frozenset[ExpertId], is_ready: bool = True) -> None:
        """Loads experts that are not here."""
        missing = wanted - self.experts.held
        for layer, groups in self.loader.load_experts(missing, is_ready=is_ready):
            self.experts.add(layer, groups)

    def check_given_up(self) -> None:
        """A step that nobody needs any more was done with zeros: it is no result of any kind."""
        assert self.node is not None
        self.node.give_up(1)
        for num_drawn in (0, 1):
            result = self.attention.begin(OWNER, BeginBatch(1, 0, rows_of(1, num_drawn)))
            assert isinstance(result, Refusal) and result.reason is RefusalReason.EXPIRED

    def step(self, tokens: TokenRows) -> None:
        """A step through all layers; the outputs of experts elsewhere are zeros."""
        shape = (tokens.num_rows, self.config.num_selected_experts, self.config.emb_size)
        turn = self.attention.begin(OWNER, BeginBatch(1, 0, tokens))
        while isinstance(turn, ExpertInput):
            outputs_TAD = np.zeros(shape, np.float32)
            turn = self.attention.advance(OWNER, AdvanceBatch(1, turn.layer, outputs_TAD))
        assert len(getattr(turn, "tokens", ())) == len(tokens.samples), turn

    def work(self) -> None:
        """Calls of every kind and size."""
        for mode in range(len(MODES)):
            self.step(rows_of(1, 1, mode))
        for num_rows in range(1, MAX_STEP_TOKENS + 1):
            for num_drawn in {0, 1, num_rows}:
                self.step(rows_of(num_rows, num_drawn, num_rows))
        for layer in range(self.config.num_layers):
            held = sorted(each.expert for each in self.experts.held if each.layer == layer)
            for num_rows in (1, 2, 3, 5, MAX_MERGED_ROWS):
                for some in ([held[0]], held) if held else ():
                    self._call(layer, some, num_rows)
        keys_CLPRK, values_CLPRK = self.attention.kv.read_blocks((1, 2, 5))
        token_ids_P = np.zeros(SIZE.block_size, np.int32)
        self.attention.kv.write_block(3, token_ids_P, keys_CLPRK[0], values_CLPRK[0])

    def _call(self, layer: int, held: list[int], num_rows: int) -> None:
        ids_TA = np.full((num_rows, self.config.num_selected_experts), -1, np.int32)
        for row in range(num_rows):
            some = [held[row % len(held)], held[(row + 1) % len(held)]]
            ids_TA[row, : len(set(some))] = list(dict.fromkeys(some))
        rows_TD = np.zeros((num_rows, self.config.emb_size), np.float32)
        self.experts.run(RunExperts(layer, rows_TD, ids_TA))


def share(config_layers: int, num_experts: int, taken: range) -> frozenset[ExpertId]:
    """Some experts of every layer; all of the last."""
    return frozenset(
        ExpertId(layer, expert)
        for layer in range(config_layers)
        for expert in (range(num_experts) if layer == config_layers - 1 else taken)
    )


@pytest.fixture
def checkpoint(golden_dir: Path) -> Iterator[Checkpoint]:
    # Other tests may have compiled the same programs.
    jax.clear_caches()
    with Checkpoint.open(golden_dir / "tiny") as opened:
        yield opened


@pytest.mark.parametrize(
    ("num_devices", "has_node"),
    [(1, False), (2, False)] + ([(1, True)] if BACKEND == "native" else []),
)
def test_nothing_compiles_once_a_worker_is_warm(
    checkpoint: Checkpoint, num_devices: int, has_node: bool
) -> None:
    config = checkpoint.config
    layers, count = config.num_layers, config.num_experts
    everything = share(layers, count, range(count))
    plan = ShardPlan(
        first_layer=0, num_layers=layers, has_ends=True, experts=share(layers, count, range(3))
    )
    worker = Worker(checkpoint, plan, num_devices, has_node)
    with compilations() as compiled:
        worker.work()
        # Others died: this worker takes over experts of some layers, and later whole layers.
        worker.take(everything)
        worker.work()
        worker.experts.keep_only(frozenset(e for e in everything if e.layer % 3))
        worker.work()
        worker.take(everything)
        worker.work()
        group, place = worker.experts.find(0, 1) or pytest.fail("not held")
        released_arrays(group.params, TensorRole.EXPERT_LINEAR, place)
    assert compiled == []
    if worker.node is not None:
        worker.check_given_up()
        worker.node.close()
