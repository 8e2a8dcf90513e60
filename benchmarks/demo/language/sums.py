"""Small sums, as formulas, sentences and stories. All of them are right."""

from collections.abc import Mapping, Sequence

RULES: Mapping[str, Sequence[str]] = {
    "sums": (
        "<bare>\n<bare>\n<bare>",
        "<bare>\n<bare>\n<bare>\n<bare>",
        "Sums for <weekday>:\n<bare>\n<bare>\n<bare>",
        "<spoken> <spoken>",
        "<spoken> <spoken> <spoken>",
        "<tale>",
        "<tale> <spoken>",
    ),
    "bare": (
        "<small:a> + <small:b> = <!add a b>",
        "<small:a> + <small:b> = <!add a b>",
        "<teen:a> - <small:b> = <!subtract a b>",
        "<digit:a> x <digit:b> = <!multiply a b>",
    ),
    "small": tuple(str(number) for number in range(1, 11)),
    "teen": tuple(str(number) for number in range(10, 21)),
    "digit": tuple(str(number) for number in range(2, 7)),
    "spoken": (
        "<small:a> and <small:b> make <!add a b>.",
        "<teen:a> less <small:b> is <!subtract a b>.",
        "<digit:a> times <digit:b> is <!multiply a b>.",
    ),
    "tale": (
        "<guest:g> has <small:a> <counted:c> and finds <small:b> more. "
        "Now <!he g> has <!add a b> <=c>.",
        "<guest:g> had <teen:a> <counted:c> and lost <digit:b>. "
        "Now <!he g> has <!subtract a b> <=c>.",
        "There are <digit:a> tables with <digit:b> <counted:c> on each. "
        "That makes <!multiply a b> <=c>.",
        "<guest:g> ate <digit:a> <counted:c> at noon and <digit:b> at night. "
        "That makes <!add a b> <=c>.",
    ),
    "counted": ("spoons", "moons", "towels", "olives", "stars", "dumplings", "teapots", "tickets"),
}
