"""Question and answer pairs about the worlds, the menu, and everything."""

from collections.abc import Mapping, Sequence

RULES: Mapping[str, Sequence[str]] = {
    "answers": ("<pair>\n<pair>", "<pair>\n<pair>", "<pair>", "<answer_alone>"),
    "pair": ("<pair_about_world>", "<pair_about_world>", "<pair_about_dish>", "<pair_of_wisdom>"),
    "pair_about_world": (
        "Question: What is the capital of <world:w>?\nAnswer: The capital of <=w> is <!capital w>.",
        "Question: What colour is the sky on <world:w>?\n"
        "Answer: The sky on <=w> is <!sky w>.",
        "Question: How many moons does <world:w> have?\nAnswer: It has <!moons w>.",
        "Question: What do people eat on <world:w>?\nAnswer: On <=w> they eat <!speciality w>.",
        "Question: What do people drink on <world:w>?\nAnswer: They drink <!local_drink w>.",
    ),
    "pair_about_dish": (
        "Question: What does the <food:d> cost?\nAnswer: The <=d> is <!coins d>.",
        "Question: How much is the <drink:d>?\nAnswer: The <=d> is <!coins d>.",
        "Question: Is the <food:d> good?\nAnswer: <dish_verdict>",
    ),
    "dish_verdict": (
        "Yes, and it is only <!coins d>.",
        "Nobody has ever complained twice.",
        "It is good on <weekday>.",
        "The chef thinks so.",
    ),
    "pair_of_wisdom": (
        "Question: What is the answer to life the universe and everything?\n"
        "Answer: <answer_to_everything>.",
        "Question: Why <why>?\nAnswer: Because <because>.",
        "Question: Where can I find <thing>?\nAnswer: <where>.",
        "Question: May I bring my <pet>?\nAnswer: <permission>.",
    ),
    "why": (
        "is the soup blue", "do the stars go out", "is the waiter smiling", "are there no clocks",
        "is my chair humming", "does the moon follow me",
    ),
    "because": (
        "nobody told it to stop",
        "the chef is in love",
        "it is nearly <hour>",
        "the universe is older than it looks",
        "somebody has to",
        "it was raining on <world>",
    ),
    "thing": (
        "a towel", "the way out", "true love", "my luggage", "the captain", "a quiet table",
    ),
    "where": (
        "Behind the second moon on the left",
        "Try the kitchen",
        "On <world>, under the stairs",
        "Exactly where you left it",
        "Ask the octopus in the cloakroom",
    ),
    "pet": ("dragon", "robot", "goat", "black hole", "grandmother", "goldfish"),
    "permission": (
        "Yes, if it pays for itself",
        "Only on <weekday>",
        "Of course, we have a bowl for it",
        "Not again",
        "Yes, but keep it away from the piano",
    ),
    "answer_alone": (
        "<answer_to_everything>.",
        "<answer_to_everything>.",
        "<answer_to_everything>. <answer_comment>",
    ),
    "answer_comment": (
        "The question is still in the kitchen.",
        "Nobody remembers the question.",
        "It took <number_word> million years to work out.",
        "Please do not ask again before dessert.",
    ),
}  # fmt: skip
