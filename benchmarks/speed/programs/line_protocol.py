"""The protocol between `milliways bench` and a contestant: one line of JSON each way.

1. The program loads its model and writes {"about": "..."}.
2. It reads {"kind": "decode", "size": 8, "prompt_tokens": 64, "steps": 16} (for a prefill, `size`
   is the length of the prompt), and writes {"tokens": 128, "seconds": 1.5}.
3. It ends when its input ends.

A new workload first runs once without being timed, to compile and to warm up. What the program
prints otherwise goes to standard error. The module needs only the standard library.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

# Runs one request; returns the number of tokens, and the seconds that they took.
Measure = Callable[[dict[str, Any]], tuple[int, float]]


def serve(load: Callable[[], tuple[str, Measure]]) -> None:
    """Answers requests until the input ends; `load` returns a description and a function."""
    replies = take_stdout()
    about, measure = load()
    _reply(replies, {"about": about})
    warm: set[tuple[str, int]] = set()
    for line in sys.stdin:
        request = json.loads(line)
        workload = (request["kind"], request["size"])
        if workload not in warm:
            measure(request | {"steps": min(2, request["steps"])})
            warm.add(workload)
        tokens, seconds = measure(request)
        _reply(replies, {"tokens": tokens, "seconds": seconds})


def take_stdout() -> TextIO:
    """Reserves standard output for replies; other prints go to standard error."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return replies


def _reply(replies: TextIO, values: dict[str, Any]) -> None:
    replies.write(json.dumps(values) + "\n")
    replies.flush()
