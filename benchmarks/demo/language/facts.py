"""The facts of the demo model's universe: worlds, guests, dishes and their prices.

Every kind of text uses them. So a dish has the same price in a menu and in an order, and a guest
has the same pronoun in a story and in a sum.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from milliways.benchmarks.demo.language.engine import Function


@dataclass(frozen=True, slots=True)
class World:
    capital: str
    moons: str
    sky: str
    dish: str
    drink: str


WORLDS: Mapping[str, World] = {
    "Vell": World("Morrow", "two moons", "green", "fern pie", "moss tea"),
    "Orrin": World("Saltgate", "no moon", "grey", "kelp broth", "salt beer"),
    "Tambria": World("Lantern", "three moons", "violet", "lamp fish", "plum wine"),
    "Quill": World("Inkwell", "one moon", "white", "paper soup", "black coffee"),
    "Mossop": World("Puddle", "four moons", "brown", "toad stew", "rain water"),
    "Harrow": World("Thorn", "two moons", "red", "root bread", "bitter cider"),
    "Lumen": World("Noon", "no moon", "golden", "sun cake", "warm lemonade"),
    "Ostra": World("Pearl", "five moons", "silver", "shell soup", "sea milk"),
    "Pellam": World("Bellows", "one moon", "orange", "smoked turnip", "ash tea"),
    "Dorne": World("Gravel", "three moons", "yellow", "stone bread", "dust gin"),
    "Fennick": World("Burrow", "two moons", "blue", "beet stew", "clover beer"),
    "Ambry": World("Cupboard", "one moon", "pink", "jam tart", "rose milk"),
    "Corrow": World("Rookery", "four moons", "black", "seed cake", "night wine"),
    "Wend": World("Crossing", "no moon", "pale", "road pie", "ginger water"),
    "Brindle": World("Patch", "five moons", "striped", "mixed pickle", "apple fizz"),
    "Nimbus": World("Drizzle", "three moons", "foggy", "cloud pudding", "steam tea"),
}

# The pronouns of each guest.
GUESTS: Mapping[str, tuple[str, str]] = {
    "Arla": ("she", "her"),
    "Bram": ("he", "his"),
    "Cleo": ("she", "her"),
    "Dunstan": ("he", "his"),
    "Elsbeth": ("she", "her"),
    "Finn": ("he", "his"),
    "Greta": ("she", "her"),
    "Hugo": ("he", "his"),
    "Iris": ("she", "her"),
    "Jasper": ("he", "his"),
    "Maud": ("she", "her"),
    "Otto": ("he", "his"),
}

STARTERS: Mapping[str, int] = {
    "comet soup": 4,
    "moon radish salad": 2,
    "pickled stardust": 3,
    "toast of the day before": 2,
    "green olive mousse": 3,
    "meteor crumble": 4,
}
MAINS: Mapping[str, int] = {
    "roast moonfish": 9,
    "gravity pie": 7,
    "nebula noodle bowl": 6,
    "slow robot stew": 8,
    "stuffed satellite": 7,
    "dumpling in orbit": 6,
    "eclipse risotto": 8,
}
SWEETS: Mapping[str, int] = {
    "black hole pudding": 5,
    "frozen sunlight": 4,
    "ring cake": 3,
    "custard from tomorrow": 5,
    "tart of lost planets": 4,
}
DRINKS: Mapping[str, int] = {
    "aurora tea": 2,
    "vacuum fizz": 3,
    "double espresso": 2,
    "old rocket cider": 4,
    "plain water": 1,
}
PRICES: Mapping[str, int] = {**STARTERS, **MAINS, **SWEETS, **DRINKS}

RULES: Mapping[str, Sequence[str]] = {
    "world": tuple(WORLDS),
    "guest": tuple(GUESTS),
    "starter": tuple(STARTERS),
    "main": tuple(MAINS),
    "sweet": tuple(SWEETS),
    "drink": tuple(DRINKS),
    "food": ("<starter>", "<main>", "<main>", "<sweet>"),
    "dish": ("<food>", "<food>", "<food>", "<drink>"),
    "number_word": ("two", "three", "four", "five", "six", "seven", "eight"),
    "hour": ("six", "seven", "eight", "nine", "ten", "eleven"),
    "weekday": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "answer_to_everything": ("The answer to life the universe and everything is of course 42",),
}


def _coins(count: int) -> str:
    return "1 coin" if count == 1 else f"{count} coins"


def _world_fact(field: str) -> Function:
    def look_up(world: str) -> str:
        return str(getattr(WORLDS[world], field))

    return look_up


FUNCTIONS: Mapping[str, Function] = {
    "capital": _world_fact("capital"),
    "moons": _world_fact("moons"),
    "sky": _world_fact("sky"),
    "speciality": _world_fact("dish"),
    "local_drink": _world_fact("drink"),
    "he": lambda name: GUESTS[name][0],
    "He": lambda name: GUESTS[name][0].capitalize(),
    "his": lambda name: GUESTS[name][1],
    "His": lambda name: GUESTS[name][1].capitalize(),
    "price": lambda dish: str(PRICES[dish]),
    "coins": lambda dish: _coins(PRICES[dish]),
    "coins_for_both": lambda one, two: _coins(PRICES[one] + PRICES[two]),
    "total": lambda *dishes: str(sum(PRICES[dish] for dish in dishes)),
    "capitalised": lambda text: text[0].upper() + text[1:],
    "differ": lambda one, two: one != two,
    "add": lambda one, two: str(int(one) + int(two)),
    "subtract": lambda one, two: str(int(one) - int(two)),
    "multiply": lambda one, two: str(int(one) * int(two)),
    "larger": lambda one, two: str(max(int(one), int(two))),
    "is_larger": lambda one, two: int(one) > int(two),
}
