"""Cuts a step into micro-batches of about equal size; no sequence is cut."""

from collections.abc import Sequence

from milliways.router.scheduler import ScheduledSequence


def split_step(
    scheduled: Sequence[ScheduledSequence], max_batches: int, min_tokens: int
) -> list[list[ScheduledSequence]]:
    """At most `max_batches` micro-batches, each of `min_tokens` tokens or more if possible."""
    num_tokens = sum(entry.num_tokens for entry in scheduled)
    num_batches = max(1, min(max_batches, num_tokens // max(1, min_tokens), len(scheduled)))
    batches: list[list[ScheduledSequence]] = [[]]
    num_before = 0
    for entry in scheduled:
        # A micro-batch is full when it has its share of all tokens.
        is_full = num_before * num_batches >= len(batches) * num_tokens
        if is_full and batches[-1] and len(batches) < num_batches:
            batches.append([])
        batches[-1].append(entry)
        num_before += entry.num_tokens
    return batches
