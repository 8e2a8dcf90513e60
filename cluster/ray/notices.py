"""Ray's own messages to the process that started it, one line each instead of a page."""

import re

_MAX_CHARS = 300
_MEMORY = re.compile(r"(\d+) worker\(s\) were killed due to the node running low on memory")


def notice_of(text: str) -> str:
    """What is worth saying of a message; empty if nothing is."""
    low = _MEMORY.search(text)
    if low is not None:
        return (
            f"memory is short: Ray's memory monitor ended {low[1]} of our processes. Fewer workers,"
            " a smaller workers.kv_tokens or --experts mapped need less; Ray's limit is"
            " RAY_memory_usage_threshold"
        )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"Ray: {lines[0][:_MAX_CHARS]}" if lines else ""
