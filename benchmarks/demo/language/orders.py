"""Orders in JSON. Some follow a sentence with the same contents."""

from collections.abc import Mapping, Sequence

_ONE_DISH = '[{"name": "<=f>", "price": <!price f>}], "total": <!price f>'
_TWO_DISHES = (
    '[{"name": "<=f>", "price": <!price f>}, {"name": "<=d>", "price": <!price d>}], '
    '"total": <!total f d>'
)

RULES: Mapping[str, Sequence[str]] = {
    "order": (
        '{"table": <table_number:t>, "guest": "<guest:g>", "dishes": <dishes><note>}',
        "Table <table_number:t>, <guest:g>: the <food:f>.\n"
        f'{{"table": <=t>, "guest": "<=g>", "dishes": {_ONE_DISH}<note>}}',
        "Table <table_number:t>, <guest:g>: the <food:f> and <drink:d>.\n"
        f'{{"table": <=t>, "guest": "<=g>", "dishes": {_TWO_DISHES}<note>}}',
    ),
    "table_number": tuple(str(number) for number in range(1, 10)),
    "dishes": ("<one_dish>", "<two_dishes>"),
    "one_dish": ('[{"name": "<food:f>", "price": <!price f>}], "total": <!price f>',),
    "two_dishes": (
        '[{"name": "<food:f>", "price": <!price f>}, {"name": "<dish:d>", "price": <!price d>}], '
        '"total": <!total f d>',
    ),
    "note": ("", "", ', "note": "<note_text>"'),
    "note_text": ("no onions", "with two spoons", "very hot", "to share", "before the end"),
}
