"""Menus and bookings of a restaurant at the far end of things."""

from collections.abc import Mapping, Sequence

RULES: Mapping[str, Sequence[str]] = {
    "table": ("<menu>", "<menu>", "<booking>", "<booking>", "<dinner_talk>", "<dinner_talk>"),
    "menu": (
        "<menu_head>\nTo begin: <starter:s>, <!coins s>.\nThen: <main:m>, <!coins m>.\n"
        "To end: <sweet:e>, <!coins e>.\n<menu_foot>",
        "<menu_head>\nTo begin: <starter:s>, <!coins s>.\nThen: <main:m>, <!coins m>; or "
        "<main:n>, <!coins n>.\nTo drink: <drink:d>, <!coins d>.<?differ m n>",
        "<menu_head>\nThen: <main:m>, <!coins m>.\nTo end: <sweet:e>, <!coins e>.\n"
        "To drink: <drink:d>, <!coins d>.\n<menu_foot>",
        "<menu_head>\nTo begin: <starter:s>, <!coins s>.\nTo end: <sweet:e>, <!coins e>.\n"
        "<menu_foot>",
    ),
    "menu_head": (
        "Menu of the <restaurant>",
        "Menu for <weekday> night",
        "Tonight at the <restaurant>",
        "The <restaurant>, <weekday> menu",
    ),
    "restaurant": (
        "Last Lantern", "Second Helping", "Closing Time", "Final Course", "Quiet Comet",
        "Late Supper", "Far Table",
    ),
    "menu_foot": (
        "The universe ends at <hour>; please order before.",
        "Towels are free. Tips are welcome.",
        "Ask the waiter about the view.",
        "All dishes can be served yesterday.",
        "The kitchen closes when the stars do.",
        "We do not serve time travellers twice.",
    ),
    "booking": (
        "Booking: a table for <number_word> on <weekday> at <hour>, for <guest:g>. "
        "<!He g> would like <seat>. <booking_end>",
        "<guest:g> has booked a table for <number_word> on <weekday> at <hour>. "
        "<!He g> asks for <seat> and will bring <companion>. <booking_end>",
        "Dear <restaurant>, please keep a table for <number_word> on <weekday> at <hour>. "
        "I would like <seat>. Yours, <guest>.",
        "Dear <guest:g>, your table for <number_word> is ready on <weekday> at <hour>. "
        "You will have <seat>. <booking_end>",
        "Note for <weekday>: <guest:g> will be late and <!his g> soup will be early. <booking_end>",
    ),
    "seat": (
        "a seat by the window",
        "the corner near the piano",
        "a view of the last star",
        "the table under the clock",
        "a chair that does not float",
        "the quiet side of the galaxy",
    ),
    "companion": (
        "a small robot", "an old friend", "a very polite ghost", "two cousins from Wend",
        "a harp", "a cat named Thursday",
    ),
    "booking_end": (
        "No mushrooms, please.",
        "Gravity has been requested.",
        "The bill was paid in the past.",
        "Please light the lamps.",
        "Hats may be left with the octopus.",
        "The end of the world is included.",
    ),
    "dinner_talk": (
        '"A table for <number_word:n>, please," said <guest:g>. "A table for <=n>," said the '
        'waiter, "<waiter_remark>." <dinner_end>',
        '"What do you recommend?" asked <guest:g>. "The <food:f>," said the waiter. '
        '"It is <!coins f>, <waiter_remark>." <dinner_end>',
        'The waiter brought the <food:f>. "I ordered the <food:o>," said <guest:g>. '
        '"You will," said the waiter.<?differ f o>',
        "<guest:g> ordered the <food:f> and a <glass> of <drink:d>. "
        "That made <!coins_for_both f d>. <dinner_end>",
        "<guest:g> looked at the menu, and the menu looked at <guest:h>. <dinner_end><?differ g h>",
    ),
    "glass": ("glass", "cup", "bowl", "bucket"),
    "waiter_remark": (
        "and the view is free",
        "as it was foretold",
        "if you do not mind the meteors",
        "and worth every crumb",
        "but mind the step into the void",
        "for as long as time lasts",
    ),
    "dinner_end": (
        "Outside, a star went out.",
        "The piano played something brown.",
        "Nobody clapped, but everybody smiled.",
        "It was a good evening for it.",
        "Somewhere a spoon fell upwards.",
        "The candles burned a little brighter.",
    ),
}  # fmt: skip
