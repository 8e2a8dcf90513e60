"""What a router asks of a worker and what it answers, as values that know no bytes.

    Call:   RunExperts | BeginBatch | AdvanceBatch | AbandonBatch | StoreBlocks
    Result: ExpertOutputs | ExpertInput | Departure | Drawn | Abandoned | BlocksStored | Refusal

A batch goes through attention shards in turns. `BeginBatch` brings it to a shard at a layer. Each
`ExpertInput` asks for the outputs of that layer's experts, and `AdvanceBatch` brings them. At the
end there is a `Departure` to another shard, or the tokens are `Drawn`. Arrays are NumPy arrays
without padding rows; their letters are those of `model.shapes`. Values with arrays compare by
identity.
"""

from dataclasses import dataclass

import numpy as np

from milliways.model.sampling_params import SampledToken, SampleRow
from milliways.wire.errors import RefusalReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Fence:
    """What a call assumes; a worker refuses it if that is not so. See worker.proto."""

    placement_epoch: int
    incarnation: int
    step: int
    # Counts from when the call is sent; 0 means no limit.
    timeout_s: float
    router_id: str
    router_incarnation: int


@dataclass(frozen=True, slots=True, eq=False)
class RunExperts:
    """Chosen experts of one layer: rows [T, D] of the activation type, ids [T, A] int32 or -1."""

    layer: int
    rows_TD: np.ndarray
    expert_ids_TA: np.ndarray

    @property
    def num_assignments(self) -> int:
        """Rows of the result."""
        return int(np.count_nonzero(self.expert_ids_TA >= 0))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenRows:
    """The tokens of a micro-batch and where their KV lies, all int32.

    After each of `logits_rows_W` a token is drawn; if its sample has a given token, that is scored.
    """

    token_ids_T: np.ndarray
    positions_T: np.ndarray
    slots_T: np.ndarray
    block_tables_BM: np.ndarray
    logits_rows_W: np.ndarray
    samples: tuple[SampleRow, ...]

    @property
    def num_rows(self) -> int:
        return len(self.token_ids_T)


@dataclass(frozen=True, slots=True, eq=False)
class BeginBatch:
    """Brings a batch to a shard, before `layer`; the number of layers asks for logits only.

    It has the residual stream [T, D] float32, except at layer 0, which embeds the tokens.
    """

    batch_id: int
    layer: int
    tokens: TokenRows
    hidden_TD: np.ndarray | None = None


@dataclass(frozen=True, slots=True, eq=False)
class AdvanceBatch:
    """Outputs [T, A, D] of a layer's experts, unweighted, in the gate's ranking."""

    batch_id: int
    layer: int
    outputs_TAD: np.ndarray


@dataclass(frozen=True, slots=True)
class AbandonBatch:
    """The batch will not continue."""

    batch_id: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoreBlocks:
    """Consecutive full KV blocks of one sequence, to be kept for equal prefixes.

    Tokens [C, P] int32; keys and values [C, L, P, R, K] of the activation type, of all layers from
    `first_layer` on. `parent` is the digest before the first block (`model.block_pool`), empty at
    the beginning of a sequence.
    """

    first_layer: int
    parent: bytes
    token_ids_CP: np.ndarray
    keys_CLPRK: np.ndarray
    values_CLPRK: np.ndarray

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values."""
        return self.keys_CLPRK.nbytes + self.values_CLPRK.nbytes


Call = RunExperts | BeginBatch | AdvanceBatch | AbandonBatch | StoreBlocks


@dataclass(frozen=True, slots=True, eq=False)
class ExpertOutputs:
    """[N, D]: a row for each expert id of the call that is not -1, in row-major order."""

    rows_ND: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class ExpertInput:
    """A batch waits for the experts of a layer: rows [T, D], ids [T, A] best first."""

    layer: int
    rows_TD: np.ndarray
    expert_ids_TA: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Departure:
    """The residual stream [T, D] float32 of a batch that leaves the shard."""

    hidden_TD: np.ndarray


@dataclass(frozen=True, slots=True)
class Drawn:
    """The end of a step: a token for each sample, in order; a given token with its score."""

    tokens: tuple[SampledToken, ...]


@dataclass(frozen=True, slots=True)
class Abandoned:
    """The shard holds nothing of the batch any more."""


@dataclass(frozen=True, slots=True)
class BlocksStored:
    """The first `num_blocks` of the blocks are kept; there was no room for the others."""

    num_blocks: int


@dataclass(frozen=True, slots=True)
class Refusal:
    """The call was not computed."""

    reason: RefusalReason
    message: str
    placement_epoch: int = 0


Turn = ExpertInput | Departure | Drawn
Result = ExpertOutputs | Turn | Abandoned | BlocksStored | Refusal
