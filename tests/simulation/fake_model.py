"""A model that can be computed by hand: whole numbers modulo a prime, two columns in a row.

A misrouted row changes the tokens. Expert e of layer l maps x to (e+1)x + l. Attention stores its
inputs in blocks, like keys and values. So a wrong block table, a block that is reused too early, a
missing replay or a stale write changes the numbers read. Unwritten positions are NaN, and no token
can be drawn from NaN.

    embed     x = (7 token + position + 1, token + 3 position + 2)
    attend    keep x of this position; a = x + the sum over positions q <= p of (q+1) kept[q]
    gate      best = (a0 + l) mod E, second = (best + 1 + a1 mod (E-1)) mod E
    combine   x = a + 2 (output of best) + (output of second)
    draw      (x0 + 3 x1) mod V, plus terms of the sampling parameters; see `draw`
    score     a drawn token has log-probability -x0 / prime, a given one that minus its id

An example with 4 experts, 1 layer, vocabulary 64, prompt (5, 3):

    position 0, token 5   x = (36, 7)
                          a = x + 1 x = (72, 14); best = 72 mod 4 = 0, second = (0+1+14 mod 3) = 3
                          x = (72, 14) + 2 (72, 14) + 4 (72, 14) = (504, 98)
    position 1, token 3   x = (23, 8)
                          a = (23, 8) + 1 (36, 7) + 2 (23, 8) = (105, 31)
                          best = 105 mod 4 = 1, second = (1 + 1 + 31 mod 3) mod 4 = 3
                          x = (105, 31) + 2*2 (105, 31) + 4 (105, 31) = (945, 279)
    token drawn           (945 + 3*279) mod 64 = 1782 mod 64 = 54

`expected_streams` computes the same with plain numbers, without rows, blocks or workers.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from milliways.model.config import ModelConfig
from milliways.model.runner import CacheSize
from milliways.model.sampling_params import SampledToken, SampleRow, SamplingParams
from milliways.router.requests.request import GenerationRequest
from milliways.router.requests.sequence import FinishReason
from milliways.wire.calls import (
    AdvanceBatch,
    BeginBatch,
    Departure,
    Drawn,
    ExpertInput,
    Refusal,
    RunExperts,
    StoreBlocks,
    TokenRows,
    Turn,
)
from milliways.wire.errors import RefusalReason
from milliways.wire.placement import ExpertId
from milliways.workers.block_ownership import BlockOwnership, Owner

PRIME = 8191
VOCAB_SIZE = 64
WEIGHTS = (2, 1)
# From the last row of a sequence to its next token.
Draw = Callable[[Sequence[float], SampleRow], SampledToken]


def fake_config(num_layers: int, num_experts: int = 4, sequence_len: int = 64) -> ModelConfig:
    """The config of the model."""
    return ModelConfig(
        emb_size=2,
        key_size=2,
        num_q_heads=1,
        num_kv_heads=1,
        num_layers=num_layers,
        vocab_size=VOCAB_SIZE,
        ffn_size=8,
        num_experts=num_experts,
        num_selected_experts=len(WEIGHTS),
        sequence_len=sequence_len,
        embedding_multiplier_scale=1.0,
        output_multiplier_scale=1.0,
        attn_output_multiplier=1.0,
    )


def draw(row: Sequence[float], sample: SampleRow) -> SampledToken:
    """The next token of a sequence. It depends on everything that a real draw depends on."""
    if np.isnan(row).any():
        return SampledToken(token_id=-1, logprob=0.0, top_logprobs=(), is_valid=False)
    params, token_ids, given_id = sample.params, sample.token_ids, sample.given_id
    total = int(row[0]) + 3 * int(row[1])
    if params.temperature > 0:
        total += 5 * params.seed + 7 * sample.sample_index + 11 * len(token_ids)
    if params.has_penalty:
        total += sum(token_ids[sample.num_prompt_tokens :])
    token_id = total % VOCAB_SIZE
    logprob = -float(row[0]) / PRIME
    top = tuple(((token_id + i) % VOCAB_SIZE, logprob - i) for i in range(params.num_logprobs))
    if given_id is not None:
        token_id, logprob = given_id, logprob - given_id
    return SampledToken(token_id=token_id, logprob=logprob, top_logprobs=top, is_valid=True)


def letter(token_id: int) -> str:
    return chr(ord("a") + token_id % 26)


class Letters:
    """A detokenizer that makes one letter of each token."""

    def push(self, token_id: int) -> str:
        return letter(token_id)

    def flush(self) -> str:
        return ""

    def copy(self) -> "Letters":
        return self


@dataclass(frozen=True, slots=True)
class Stream:
    """Everything that a client receives for one sample."""

    tokens: tuple[SampledToken, ...]
    text: str
    finish_reason: FinishReason | None


def expected_streams(
    request: GenerationRequest, config: ModelConfig, by: Draw = draw
) -> list[Stream]:
    """The stream that each sample of a request must give, whatever happens to the cluster."""
    return [_expected_stream(request, config, index, by) for index in range(request.num_samples)]


def expected_scores(
    request: GenerationRequest, config: ModelConfig, by: Draw = draw
) -> list[SampledToken]:
    """The scores that a request's prompt must get."""
    if request.prompt_logprobs is None:
        return []
    rows = _Rows(config)
    params = SamplingParams(temperature=0.0, num_logprobs=request.prompt_logprobs)
    return [
        by(
            rows.push(token_id),
            SampleRow(params=params, token_ids=(), num_prompt_tokens=0, given_id=given_id),
        )
        for token_id, given_id in pairwise(request.prompt_ids)
    ]


def _expected_stream(
    request: GenerationRequest, config: ModelConfig, index: int, by: Draw
) -> Stream:
    if request.max_tokens == 0:
        return Stream((), "", None)
    rows = _Rows(config)
    row = [rows.push(token_id) for token_id in request.prompt_ids][-1]
    token_ids = list(request.prompt_ids)
    drawn: list[SampledToken] = []
    text, rules, ends = "", request.rules, request.ends(config.eos_token)
    # Where stop strings are looked for.
    searched_from = 0
    num_max = min(request.max_tokens, max(1, config.sequence_len - len(token_ids)))
    while True:
        sample = SampleRow(
            params=request.sampling,
            token_ids=tuple(token_ids),
            num_prompt_tokens=len(request.prompt_ids),
            sample_index=index,
            forbidden_ids=rules.forbidden(token_ids[len(request.prompt_ids) :], ends),
            allowed_ids=rules.allowed_token_ids,
        )
        token = by(row, sample)
        drawn.append(token)
        token_ids.append(token.token_id)
        if token.token_id in ends:
            return Stream(tuple(drawn), text, FinishReason.STOP)
        text += letter(token.token_id)
        if len(drawn) <= rules.min_tokens:
            searched_from = len(text)
        places = [place for s in request.stop if (place := text.find(s, searched_from)) >= 0]
        if places:
            return Stream(tuple(drawn), text[: min(places)], FinishReason.STOP)
        if len(drawn) == num_max:
            return Stream(tuple(drawn), text, FinishReason.LENGTH)
        row = rows.push(token.token_id)


class _Rows:
    """The last row of a growing sequence, computed with plain numbers."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._num_before = 0
        self._sums = [(0, 0)] * config.num_layers

    def push(self, token_id: int) -> tuple[int, int]:
        p, num_experts = self._num_before, self._config.num_experts
        x, y = (7 * token_id + p + 1) % PRIME, (token_id + 3 * p + 2) % PRIME
        for layer in range(self._config.num_layers):
            s, t = self._sums[layer]
            s, t = self._sums[layer] = s + (p + 1) * x, t + (p + 1) * y
            a, b = (x + s) % PRIME, (y + t) % PRIME
            best = (a + layer) % num_experts
            second = (best + 1 + b % (num_experts - 1)) % num_experts
            x = (a + 2 * ((best + 1) * a + layer) + (second + 1) * a + layer) % PRIME
            y = (b + 2 * ((best + 1) * b + layer) + (second + 1) * b + layer) % PRIME
        self._num_before += 1
        return x, y


def _no_time(seconds: float) -> None:
    pass


def _no_harm(call: RunExperts) -> None:
    pass


class FakeExperts:
    """Experts that multiply. They answer with all `refusals` before they compute again."""

    def __init__(self, config: ModelConfig, held: Iterable[ExpertId]) -> None:
        self.held = set(held)
        # Those of the held ones whose bytes are another model's; they compute something else.
        self.wrong: set[ExpertId] = set()
        self.refusals: deque[RefusalReason] = deque()
        self.compute_s = 0.0
        self.spend: Callable[[float], None] = _no_time
        # Called before each call is computed.
        self.harm: Callable[[RunExperts], None] = _no_harm
        self._config = config

    def has_whole_layer(self, layer: int) -> bool:
        return all(ExpertId(layer, e) in self.held for e in range(self._config.num_experts))

    def fault_of(self, call: RunExperts) -> Refusal | None:
        if self.refusals:
            return Refusal(self.refusals.popleft(), "the test wants a refusal")
        wanted = {ExpertId(call.layer, int(e)) for e in np.unique(call.expert_ids_TA) if e >= 0}
        if wanted <= self.held:
            return None
        return Refusal(RefusalReason.NOT_HELD, f"{sorted(wanted - self.held)} are not here")

    def run(self, call: RunExperts) -> np.ndarray:
        self.spend(self.compute_s)
        self.harm(call)
        rows, columns = np.nonzero(call.expert_ids_TA >= 0)
        ids_N = call.expert_ids_TA[rows, columns]
        if not all(ExpertId(call.layer, int(e)) in self.held for e in ids_N):
            raise RuntimeError("run without a call of fault_of before")
        is_wrong_N = np.array([ExpertId(call.layer, int(e)) in self.wrong for e in ids_N], bool)
        factors_N = ids_N + 1 + is_wrong_N
        return call.rows_TD[rows] * factors_N[:, None].astype(np.float32) + np.float32(call.layer)


@dataclass(slots=True)
class _Batch:
    tokens: TokenRows
    hidden_TD: np.ndarray
    layer: int


class FakeAttention:
    """Layers that add up the rows in their blocks; the blocks belong to one router at a time."""

    def __init__(
        self,
        config: ModelConfig,
        layers: range,
        has_ends: bool,
        cache_size: CacheSize,
        experts: FakeExperts,
    ) -> None:
        self.compute_s = 0.0
        self.spend: Callable[[float], None] = _no_time
        self.draw: Draw = draw
        self.refusals: deque[RefusalReason] = deque()
        self._config = config
        self._layers = layers
        self._has_ends = has_ends
        self._size = cache_size
        self._experts = experts
        self._kept = {
            layer: np.full((cache_size.num_blocks, cache_size.block_size, 2), np.nan)
            for layer in layers
        }
        self._batches: dict[int, _Batch] = {}
        self._ownership = BlockOwnership()

    @property
    def num_batches(self) -> int:
        return len(self._batches)

    @property
    def first_layer(self) -> int:
        return self._layers.start

    @property
    def block_bytes(self) -> int:
        return len(self._layers) * self._size.block_size * 2 * 8

    def read_blocks(self, block_ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The stored rows as keys; the values are empty."""
        kept = np.stack([self._kept[layer][list(block_ids)] for layer in self._layers], axis=1)
        keys_CLPRK = kept[:, :, :, None, :]
        return keys_CLPRK, keys_CLPRK[..., :0]

    def write_block(
        self,
        block_id: int,
        token_ids_P: np.ndarray,
        keys_LPRK: np.ndarray,
        values_LPRK: np.ndarray,
    ) -> None:
        for layer, keys_PRK in zip(self._layers, keys_LPRK, strict=True):
            assert not np.isnan(keys_PRK).any(), "a copy of rows that were never computed"
            self._kept[layer][block_id] = keys_PRK[:, 0]

    def blocks_fault(self, call: StoreBlocks) -> Refusal | None:
        if (call.first_layer, call.keys_CLPRK.shape[1]) == (self.first_layer, len(self._layers)):
            return None
        return Refusal(RefusalReason.NOT_HELD, "other layers are here")

    def begin(self, owner: Owner, call: BeginBatch) -> Turn | Refusal:
        refusal = self._fault_of(owner, call)
        if refusal is not None:
            return refusal
        hidden_TD = _embed(call.tokens) if call.hidden_TD is None else call.hidden_TD
        return self._run(call.batch_id, _Batch(call.tokens, hidden_TD, call.layer))

    def advance(self, owner: Owner, call: AdvanceBatch) -> Turn | Refusal:
        if self.refusals:
            return Refusal(self.refusals.popleft(), "the test wants a refusal")
        batch = self._batches.get(call.batch_id)
        if owner != self._ownership.owner or batch is None or batch.layer != call.layer:
            return Refusal(RefusalReason.UNKNOWN_BATCH, f"{call.batch_id} at layer {call.layer}")
        del self._batches[call.batch_id]
        batch.hidden_TD = _combine(batch.hidden_TD, call.outputs_TAD)
        batch.layer += 1
        return self._run(call.batch_id, batch)

    def abandon(self, owner: Owner, batch_id: int) -> None:
        if owner == self._ownership.owner:
            self._batches.pop(batch_id, None)

    def release(self, router_id: str) -> None:
        if router_id == self._ownership.owner[0]:
            self._batches.clear()

    def _fault_of(self, owner: Owner, call: BeginBatch) -> Refusal | None:
        if self.refusals:
            return Refusal(self.refusals.popleft(), "the test wants a refusal")
        before = self._ownership.owner
        refusal = self._ownership.enter(owner)
        if self._ownership.owner != before:
            self._batches.clear()
        if refusal is not None:
            return refusal
        is_end = call.layer == self._config.num_layers or call.layer == 0
        if (is_end and not self._has_ends) or (
            call.layer < self._config.num_layers and call.layer not in self._layers
        ):
            return Refusal(RefusalReason.NOT_HELD, f"layer {call.layer} is not here")
        return None

    def _run(self, batch_id: int, batch: _Batch) -> Turn:
        self.spend(self.compute_s)
        while batch.layer in self._layers:
            batch.hidden_TD = self._attend(batch)
            ids_TA = _gate(batch.hidden_TD, batch.layer, self._config.num_experts)
            if not self._experts.has_whole_layer(batch.layer):
                self._batches[batch_id] = batch
                return ExpertInput(batch.layer, batch.hidden_TD, ids_TA)
            outputs_ND = self._experts.run(RunExperts(batch.layer, batch.hidden_TD, ids_TA))
            batch.hidden_TD = _combine(batch.hidden_TD, outputs_ND.reshape(*ids_TA.shape, 2))
            batch.layer += 1
        if batch.layer < self._config.num_layers or not self._has_ends:
            return Departure(batch.hidden_TD)
        rows = batch.hidden_TD[batch.tokens.logits_rows_W]
        samples = batch.tokens.samples
        drawn = [self.draw(row.tolist(), s) for row, s in zip(rows, samples, strict=True)]
        return Drawn(tuple(drawn))

    def _attend(self, batch: _Batch) -> np.ndarray:
        tokens, size, kept = batch.tokens, self._size.block_size, self._kept[batch.layer]
        tables_TM = tokens.block_tables_BM[tokens.slots_T]
        positions_T = tokens.positions_T
        blocks_T = tables_TM[np.arange(tokens.num_rows), positions_T // size]
        kept[blocks_T, positions_T % size] = batch.hidden_TD
        attended = [
            row + np.arange(1, position + 2) @ kept[table].reshape(-1, 2)[: position + 1]
            for row, table, position in zip(batch.hidden_TD, tables_TM, positions_T, strict=True)
        ]
        return np.fmod(np.array(attended), PRIME).astype(np.float32)


def _embed(tokens: TokenRows) -> np.ndarray:
    ids_T, positions_T = tokens.token_ids_T.astype(np.int64), tokens.positions_T
    columns = (7 * ids_T + positions_T + 1, ids_T + 3 * positions_T + 2)
    return (np.stack(columns, axis=1) % PRIME).astype(np.float32)


def _gate(hidden_TD: np.ndarray, layer: int, num_experts: int) -> np.ndarray:
    whole_TD = np.nan_to_num(hidden_TD).astype(np.int64)
    best_T = (whole_TD[:, 0] + layer) % num_experts
    second_T = (best_T + 1 + whole_TD[:, 1] % (num_experts - 1)) % num_experts
    return np.stack((best_T, second_T), axis=1).astype(np.int32)


def _combine(hidden_TD: np.ndarray, outputs_TAD: np.ndarray) -> np.ndarray:
    best, second = WEIGHTS
    total_TD = hidden_TD + best * outputs_TAD[:, 0] + second * outputs_TAD[:, 1]
    return np.fmod(total_TD, np.float32(PRIME))
