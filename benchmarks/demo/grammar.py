"""The demo model's language as a whole: writes its texts, checks them, and opens them.

`generate_text` and `check_text` walk the same rules (see `language.engine`), so what one writes
the other accepts. The check asks everything the rules promise: sums that are right, facts and
prices that are true, names that stay the same, JSON that parses and adds up.
"""

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass

from milliways.benchmarks.demo.language import answers, facts, guide, orders, stories, sums, table
from milliways.benchmarks.demo.language.engine import Grammar, Trace

# Share of texts by kind; sums are short and hard, and so come oftener.
KIND_WEIGHTS: Mapping[str, int] = {
    "guide": 4,
    "table": 4,
    "story": 4,
    "answers": 4,
    "sums": 6,
    "order": 4,
}
ORDER_KEYS = ("table", "guest", "dishes", "total", "note")

GRAMMAR = Grammar(
    {
        **facts.RULES,
        **guide.RULES,
        **table.RULES,
        **stories.RULES,
        **answers.RULES,
        **sums.RULES,
        **orders.RULES,
    },
    facts.FUNCTIONS,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the checker says of a text; `reason` is empty for a text of the language."""

    in_language: bool
    kind: str | None = None
    reason: str = ""


def generate_text(rng: random.Random, kind: str | None = None) -> str:
    """One text of the language, of a kind drawn by `KIND_WEIGHTS` unless given."""
    if kind is None:
        kind = rng.choices(list(KIND_WEIGHTS), weights=list(KIND_WEIGHTS.values()))[0]
    return GRAMMAR.generate(kind, rng)


def check_text(text: str) -> Verdict:
    """Whether the whole text is in the language; where not, how far the best reading came."""
    best_kind, best = None, Trace()
    for kind in KIND_WEIGHTS:
        trace = Trace()
        if GRAMMAR.match(kind, text, trace):
            reason = _order_fault(text) if kind == "order" else ""
            return Verdict(in_language=not reason, kind=kind, reason=reason)
        if best_kind is None or trace.furthest > best.furthest:
            best_kind, best = kind, trace
    return Verdict(in_language=False, kind=best_kind, reason=_explain(text, best))


def opening_prompts(rng: random.Random, count: int = 1) -> list[str]:
    """Openings to complete: the first two to five words of texts, without a trailing space."""
    prompts = []
    while len(prompts) < count:
        words = generate_text(rng).split(" ")
        num_words = rng.randint(2, 5)
        if num_words < len(words):
            prompts.append(" ".join(words[:num_words]))
    return prompts


def _order_fault(text: str) -> str:
    """Reads an order as its receiver would, with a JSON parser; empty where nothing is wrong."""
    try:
        order = json.loads(text[text.index("{") :])
    except ValueError as error:
        return f"not JSON: {error}"
    if not set(ORDER_KEYS[:4]) <= set(order) <= set(ORDER_KEYS):
        return f"keys {sorted(order)}"
    if order["total"] != sum(dish["price"] for dish in order["dishes"]):
        return f"total {order['total']} is not the sum of the prices"
    return ""


def _explain(text: str, trace: Trace) -> str:
    found = text[trace.furthest : trace.furthest + 20] or "the end"
    wanted = sorted(trace.expected)[:4]
    return f"at {trace.furthest}: found {found!r}, wanted one of {wanted}"
