"""A grammar whose rules both generate a text and recognise it.

Rules are strings in a small notation. The modules beside this one hold them as data:

    (a|b|)          one of the alternatives; the last one here is empty
    <dish>          a text of the rule `dish`
    <dish:d>        the same; the text is remembered as `d`
    <=d>            the text that was remembered as `d`
    <!price d>      the result of the function `price` for `d`
    <?differ a b>   no text; a condition: the function `differ` must return true

`Grammar.generate` walks a rule, and draws every choice from the given generator. `Grammar.match`
walks the same tree over a given text, and backtracks over the choices. Both visit the parts in the
same order with the same memory, so both accept the same texts. The memory (`<=d>`, `<!...>`) makes
the language more than context-free.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import no_type_check

Memory = Mapping[str, str]
Function = Callable[..., str | bool]


@dataclass(frozen=True, slots=True)
class Literal:
    text: str


@dataclass(frozen=True, slots=True)
class Series:
    parts: tuple["Node", ...]


@dataclass(frozen=True, slots=True)
class Choice:
    options: tuple["Node", ...]


@dataclass(frozen=True, slots=True)
class Reference:
    rule: str
    remember_as: str | None


@dataclass(frozen=True, slots=True)
class Repeated:
    name: str


@dataclass(frozen=True, slots=True)
class Computed:
    function: str
    arguments: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Condition:
    function: str
    arguments: tuple[str, ...]


Node = Literal | Series | Choice | Reference | Repeated | Computed | Condition


class GrammarError(ValueError):
    """A rule is invalid. That is a bug of ours, found when the grammar is built."""


class ConditionFailed(Exception):
    """The drawn choices break a condition; the text is drawn again."""


# Tests check types and shapes in every call. A match makes thousands of calls and has no shapes, so
# these checks would take longer than the match: hence `no_type_check` here and below.
@no_type_check
@dataclass(slots=True)
class Trace:
    """How far a failed match came, and what was expected there: the reason of the failure."""

    furthest: int = 0
    expected: set[str] = field(default_factory=set)

    def note(self, position: int, expected: str) -> None:
        if position > self.furthest:
            self.furthest = position
            self.expected = set()
        if position == self.furthest:
            self.expected.add(expected)


def parse_rule(source: str) -> Node:
    """Reads one rule in the notation above."""
    node, end = _parse_choice(source, 0)
    if end != len(source):
        raise GrammarError(f"unbalanced ')' at {end} in {source!r}")
    return node


def _parse_choice(source: str, start: int) -> tuple[Node, int]:
    options: list[Node] = []
    position = start
    while True:
        option, position = _parse_series(source, position)
        options.append(option)
        if position == len(source) or source[position] == ")":
            break
        position += 1
    return (options[0] if len(options) == 1 else Choice(tuple(options))), position


def _parse_series(source: str, start: int) -> tuple[Node, int]:
    parts: list[Node] = []
    position = start
    while position < len(source) and source[position] not in "|)":
        part, position = _parse_part(source, position)
        parts.append(part)
    return (parts[0] if len(parts) == 1 else Series(tuple(parts))), position


def _parse_part(source: str, start: int) -> tuple[Node, int]:
    if source[start] == "(":
        node, end = _parse_choice(source, start + 1)
        if end == len(source):
            raise GrammarError(f"'(' at {start} is never closed in {source!r}")
        return node, end + 1
    if source[start] == "<":
        end = source.index(">", start)
        return _parse_tag(source[start + 1 : end]), end + 1
    end = start
    while end < len(source) and source[end] not in "(|)<":
        end += 1
    return Literal(source[start:end]), end


def _parse_tag(tag: str) -> Node:
    match tag[0]:
        case "=":
            return Repeated(tag[1:])
        case "!":
            function, *arguments = tag[1:].split()
            return Computed(function, tuple(arguments))
        case "?":
            function, *arguments = tag[1:].split()
            return Condition(function, tuple(arguments))
    rule, _, name = tag.partition(":")
    return Reference(rule, name or None)


@no_type_check
class Grammar:
    """Rules by name (several strings are alternatives), and the functions that they may call."""

    def __init__(
        self, rules: Mapping[str, Sequence[str]], functions: Mapping[str, Function]
    ) -> None:
        self._functions = dict(functions)
        self._rules: dict[str, Node] = {
            name: Choice(tuple(parse_rule(source) for source in sources))
            for name, sources in rules.items()
        }
        for node in self._rules.values():
            self._check_names(node)

    def generate(self, rule: str, rng: random.Random, attempts_max: int = 1000) -> str:
        """A text of the rule. It is drawn again until its conditions hold."""
        for _ in range(attempts_max):
            try:
                return self._write(self._rules[rule], rng, {})
            except ConditionFailed:
                continue
        raise GrammarError(
            f"{attempts_max} texts of rule {rule!r} were drawn; none fits its conditions"
        )

    def match(self, rule: str, text: str, trace: Trace | None = None) -> bool:
        """Whether the rule can generate the whole text."""
        trace = trace if trace is not None else Trace()
        for end, _ in self._read(self._rules[rule], text, 0, {}, trace):
            if end == len(text):
                return True
            trace.note(end, "the end")
        return False

    def _write(self, node: Node, rng: random.Random, memory: dict[str, str]) -> str:
        match node:
            case Literal(text):
                return text
            case Series(parts):
                return "".join([self._write(part, rng, memory) for part in parts])
            case Choice(options):
                return self._write(options[int(rng.random() * len(options))], rng, memory)
            case Reference(rule, name):
                text = self._write(self._rules[rule], rng, memory)
                if name:
                    memory[name] = text
                return text
            case Repeated(name):
                return memory[name]
            case Computed():
                return self._compute(node, memory)
            case Condition():
                if not self._holds(node, memory):
                    raise ConditionFailed
                return ""

    def _read(
        self, node: Node, text: str, start: int, memory: Memory, trace: Trace
    ) -> Iterator[tuple[int, Memory]]:
        """Every (end, memory) with which the node can match the text from `start` on."""
        match node:
            case Literal(expected):
                yield from _read_exactly(expected, text, start, memory, trace)
            case Series(parts):
                yield from self._read_series(parts, text, start, memory, trace)
            case Choice(options):
                for option in options:
                    yield from self._read(option, text, start, memory, trace)
            case Reference(rule, name):
                for end, after in self._read(self._rules[rule], text, start, memory, trace):
                    yield end, {**after, name: text[start:end]} if name else after
            case Repeated(name):
                yield from _read_exactly(memory[name], text, start, memory, trace)
            case Computed():
                yield from _read_exactly(self._compute(node, memory), text, start, memory, trace)
            case Condition():
                if self._holds(node, memory):
                    yield start, memory

    def _read_series(
        self, parts: tuple[Node, ...], text: str, start: int, memory: Memory, trace: Trace
    ) -> Iterator[tuple[int, Memory]]:
        if not parts:
            yield start, memory
            return
        for end, after in self._read(parts[0], text, start, memory, trace):
            yield from self._read_series(parts[1:], text, end, after, trace)

    def _compute(self, node: Computed, memory: Memory) -> str:
        answer = self._functions[node.function](*(memory[name] for name in node.arguments))
        assert isinstance(answer, str)
        return answer

    def _holds(self, node: Condition, memory: Memory) -> bool:
        return bool(self._functions[node.function](*(memory[name] for name in node.arguments)))

    def _check_names(self, node: Node) -> None:
        match node:
            case Series(parts) | Choice(parts):
                for part in parts:
                    self._check_names(part)
            case Reference(rule, _) if rule not in self._rules:
                raise GrammarError(f"a rule refers to {rule!r}, which does not exist")
            case Computed(function, _) | Condition(function, _) if function not in self._functions:
                raise GrammarError(f"a rule calls {function!r}, which does not exist")


@no_type_check
def _read_exactly(
    expected: str, text: str, start: int, memory: Memory, trace: Trace
) -> Iterator[tuple[int, Memory]]:
    if text.startswith(expected, start):
        yield start + len(expected), memory
    elif start + len(expected) >= trace.furthest:
        trace.note(start + _common_length(expected, text, start), expected)


@no_type_check
def _common_length(expected: str, text: str, start: int) -> int:
    length = 0
    for wanted, found in zip(expected, text[start:], strict=False):
        if wanted != found:
            break
        length += 1
    return length
