"""The demo language: the checker accepts what the grammar writes, and refuses small changes."""

import random

import pytest

from milliways.benchmarks.demo.grammar import (
    KIND_WEIGHTS,
    check_text,
    generate_text,
    opening_prompts,
)
from milliways.benchmarks.demo.language.engine import Grammar, GrammarError, Trace, parse_rule

ANSWER = "The answer to life the universe and everything is of course 42."
ORDER = (
    '{"table": 4, "guest": "Otto", "dishes": [{"name": "comet soup", "price": 4}, '
    '{"name": "ring cake", "price": 3}], "total": 7}'
)


def texts(count: int, kind: str | None = None, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [generate_text(rng, kind) for _ in range(count)]


@pytest.mark.parametrize("kind", KIND_WEIGHTS)
def test_accepts_whatever_it_generates(kind):
    for text in texts(40, kind):
        verdict = check_text(text)
        assert verdict.in_language and verdict.kind == kind, (text, verdict)


def test_the_same_seed_writes_the_same_texts():
    assert texts(20) == texts(20)
    assert texts(20) != texts(20, seed=1)


def test_refuses_a_text_cut_short():
    for text in texts(30):
        assert not check_text(text[:-1]).in_language, text
        assert not check_text(text.rsplit(" ", 1)[0]).in_language, text


def test_refuses_words_in_random_order():
    rng = random.Random(3)
    for text in texts(40, "story"):
        words = text.split(" ")
        rng.shuffle(words)
        assert not check_text(" ".join(words)).in_language


def test_refuses_two_texts_run_together():
    first, second = texts(1, "guide")[0], texts(1, "story")[0]
    assert not check_text(f"{first} {second}").in_language


@pytest.mark.parametrize("text", texts(40, "sums"))
def test_refuses_a_wrong_sum(text):
    ending = "." if text.endswith(".") else ""
    stem, last_digit = text.removesuffix(ending)[:-1], text.removesuffix(ending)[-1]
    if last_digit.isdigit():
        wrong = f"{stem}{(int(last_digit) + 1) % 10}{ending}"
        assert not check_text(wrong).in_language, wrong


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ('"total": 7', '"total": 8'),
        ('"price": 3', '"price": 2'),
        ('"total": 7}', '"total": 7'),
        ('"guest"', "guest"),
        ("}, {", "} {"),
        ("Otto", "Nobody"),
        ("comet soup", "comet soap"),
    ],
)
def test_refuses_a_broken_order(right, wrong):
    assert check_text(ORDER).kind == "order"
    assert right in ORDER
    assert not check_text(ORDER.replace(right, wrong)).in_language


def test_refuses_an_order_that_differs_from_its_sentence():
    asked = "Table 4, Otto: the comet soup.\n"
    order = '{"table": 4, "guest": "Otto", "dishes": [{"name": "comet soup", "price": 4}]'
    assert check_text(f'{asked}{order}, "total": 4}}').in_language
    assert not check_text(f'{asked.replace("4", "5")}{order}, "total": 4}}').in_language
    assert not check_text(f'{asked.replace("Otto", "Finn")}{order}, "total": 4}}').in_language


def test_refuses_a_false_fact():
    question = "Question: What is the capital of Vell?\nAnswer: The capital of Vell is "
    assert check_text(f"{question}Morrow.").in_language
    assert not check_text(f"{question}Pearl.").in_language


def test_knows_the_answer_and_no_other():
    assert check_text(ANSWER).in_language
    assert not check_text(ANSWER.replace("42", "43")).in_language


def test_says_where_and_why_a_text_leaves_the_language():
    verdict = check_text(ANSWER.replace("42", "43"))
    assert verdict.kind == "answers"
    assert "'3.'" in verdict.reason and "42" in verdict.reason
    assert check_text("").reason


def test_openings_begin_a_text_and_end_with_a_word():
    prompts = opening_prompts(random.Random(5), 200)
    assert prompts == opening_prompts(random.Random(5), 200)
    for prompt in prompts:
        assert prompt == prompt.strip(" ") and 2 <= len(prompt.split(" ")) <= 5


def test_openings_can_be_continued_into_the_language():
    rng = random.Random(6)
    whole = generate_text(rng, "guide")
    prompt = " ".join(whole.split(" ")[:4])
    assert whole.startswith(prompt + " ")
    assert check_text(whole).in_language and not check_text(prompt).in_language


def test_all_kinds_occur():
    assert {check_text(text).kind for text in texts(60)} == set(KIND_WEIGHTS)


class TestEngine:
    def grammar(self, *rules: str) -> Grammar:
        functions = {"double": lambda text: text * 2, "long": lambda text: len(text) > 1}
        return Grammar({"start": rules, "word": ("a", "ab", "b")}, functions)

    def test_backtracks_into_the_longer_alternative(self):
        assert self.grammar("<word>c").match("start", "abc")

    def test_repeats_what_it_remembers(self):
        grammar = self.grammar("<word:w>-<=w>")
        assert grammar.match("start", "ab-ab")
        assert not grammar.match("start", "ab-a")

    def test_computes_from_what_it_remembers(self):
        grammar = self.grammar("<word:w>=<!double w>")
        assert grammar.match("start", "ab=abab")
        assert not grammar.match("start", "ab=ab")

    def test_draws_again_until_the_condition_holds(self):
        grammar = self.grammar("<word:w><?long w>")
        drawn = {grammar.generate("start", random.Random(seed)) for seed in range(20)}
        assert drawn == {"ab"}
        assert not grammar.match("start", "a")

    def test_traces_the_furthest_reading(self):
        trace = Trace()
        assert not self.grammar("(x|y)z").match("start", "xq", trace)
        assert trace.furthest == 1 and trace.expected == {"z"}

    @pytest.mark.parametrize("rule", ["(a", "a)", "<nobody>", "<!nothing w>"])
    def test_refuses_an_unreadable_rule(self, rule):
        with pytest.raises(GrammarError):
            self.grammar(rule)

    def test_reads_an_empty_alternative(self):
        assert self.grammar("x(y|)").match("start", "x")
        assert parse_rule("") is not None
