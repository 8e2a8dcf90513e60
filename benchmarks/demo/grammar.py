"""The whole language of the demo model: writes texts, checks texts, and writes openings.

`generate_text` and `check_text` walk the same rules (see `language.engine`), so the second accepts
what the first writes. The check covers all that the rules require: sums are right, facts and prices
are true, names stay the same, JSON parses, and its total is the sum of its prices.
"""

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass

from milliways.benchmarks.demo.language import answers, facts, guide, orders, stories, sums, table
from milliways.benchmarks.demo.language.engine import Grammar, Trace

# The weights of the kinds of text. Sums are short and hard, so they are more frequent.
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
    """The result of checking a text. `reason` is empty if the text is in the language."""

    in_language: bool
    kind: str | None = None
    reason: str = ""


def generate_text(rng: random.Random, kind: str | None = None) -> str:
    """One text of the language. Without a kind, one is drawn with `KIND_WEIGHTS`."""
    if kind is None:
        kind = rng.choices(list(KIND_WEIGHTS), weights=list(KIND_WEIGHTS.values()))[0]
    return GRAMMAR.generate(kind, rng)


def check_text(text: str) -> Verdict:
    """Whether the whole text is in the language; if not, the reason says where it fails."""
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
    """Prompts to complete: the first two to five words of texts, without a trailing space."""
    prompts = []
    while len(prompts) < count:
        words = generate_text(rng).split(" ")
        num_words = rng.randint(2, 5)
        if num_words < len(words):
            prompts.append(" ".join(words[:num_words]))
    return prompts


def _order_fault(text: str) -> str:
    """Checks an order with a JSON parser, as its receiver would; empty if it is correct."""
    try:
        order = json.loads(text[text.index("{") :])
    except ValueError as error:
        return f"is not JSON: {error}"
    if not set(ORDER_KEYS[:4]) <= set(order) <= set(ORDER_KEYS):
        return f"has the keys {sorted(order)}, expected {list(ORDER_KEYS)}; the note is optional"
    if order["total"] != sum(dish["price"] for dish in order["dishes"]):
        return f"total {order['total']} is not the sum of the prices"
    return ""


def _explain(text: str, trace: Trace) -> str:
    found = text[trace.furthest : trace.furthest + 20] or "the end"
    wanted = sorted(trace.expected)[:4]
    return f"at {trace.furthest}: found {found!r}, expected one of {wanted}"
