"""The rows of a step: what is computed for scheduled sequences, and what they get back."""

import numpy as np

from milliways.model.sampling_params import SampledToken, SampleRow, SamplingParams
from milliways.router.requests.sequence import Event
from milliways.router.scheduler import ScheduledSequence
from milliways.wire.calls import TokenRows


def pack(batch: list[ScheduledSequence]) -> TokenRows:
    """The rows of a micro-batch, in the order of its sequences, one slot for each."""
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    logits_rows: list[int] = []
    samples: list[SampleRow] = []
    for slot, entry in enumerate(batch):
        sequence = entry.sequence
        start = sequence.num_computed
        token_ids += sequence.next_tokens(entry.num_tokens)
        positions += range(start, start + entry.num_tokens)
        slots += [slot] * entry.num_tokens
        logits_rows += range(len(token_ids) - entry.num_logits, len(token_ids))
        samples += sample_rows(entry)
    width = max(len(entry.sequence.block_table) for entry in batch)
    tables_BM = np.zeros((len(batch), width), np.int32)
    for slot, entry in enumerate(batch):
        table = entry.sequence.block_table
        tables_BM[slot, : len(table)] = table
    return TokenRows(
        token_ids_T=np.array(token_ids, np.int32),
        positions_T=np.array(positions, np.int32),
        slots_T=np.array(slots, np.int32),
        block_tables_BM=tables_BM,
        logits_rows_W=np.array(logits_rows, np.int32),
        samples=tuple(samples),
    )


def sample_rows(entry: ScheduledSequence) -> list[SampleRow]:
    """What is done with the logits of an entry: prompt tokens are scored, then one is drawn."""
    sequence = entry.sequence
    rows = _scoring_rows(entry) if entry.scored else []
    if entry.wants_token:
        rows.append(
            SampleRow(
                params=sequence.request.sampling,
                # A copy, because the sequence may grow before the message is written.
                token_ids=tuple(sequence.token_ids),
                num_prompt_tokens=sequence.num_prompt_tokens,
                sample_index=sequence.sample_index,
                forbidden_ids=sequence.forbidden_ids(),
                allowed_ids=sequence.request.rules.allowed_token_ids,
            )
        )
    return rows


def _scoring_rows(entry: ScheduledSequence) -> list[SampleRow]:
    sequence = entry.sequence
    request = sequence.request
    # Greedy, because nothing is drawn.
    scoring = SamplingParams(temperature=0.0, num_logprobs=request.prompt_logprobs or 0)
    return [
        SampleRow(
            params=scoring,
            # Only the number of tokens matters: nothing is drawn.
            token_ids=range(position + 1),
            num_prompt_tokens=sequence.num_prompt_tokens,
            sample_index=sequence.sample_index,
            given_id=request.prompt_ids[position + 1],
        )
        for position in entry.scored
    ]


def take_events(entry: ScheduledSequence, drawn: list[SampledToken]) -> list[Event]:
    """Adds the tokens that were scored and drawn to their sequence; returns the events."""
    sequence = entry.sequence
    num_scores = len(entry.scored)
    scores, tokens = drawn[:num_scores], drawn[num_scores:]
    broken = [score for score in scores if not score.is_valid]
    if broken:
        return [sequence.append(broken[0])]
    events: list[Event] = [sequence.score(scores)] if scores else []
    return events + [sequence.append(token) for token in tokens]
