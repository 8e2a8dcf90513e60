"""Short stories: somebody, a habit, an event and how it ended."""

from collections.abc import Mapping, Sequence

RULES: Mapping[str, Sequence[str]] = {
    "story": (
        "<story_start> <habit> <event> <reaction> <ending>",
        "<story_start> <event> <reaction> <ending>",
        "<story_start> <habit> <event> <ending>",
        "<robot_start> <robot_event> <robot_ending>",
        "<meeting> <meeting_talk> <meeting_ending>",
    ),
    "story_start": (
        "Once there was a <temper> <job> called <guest:h>.",
        "On <world> there lived a <temper> <job> called <guest:h>.",
        "<guest:h> was the only <job> on <world>.",
        "Nobody knew why <guest:h> had become a <job>.",
        "Long after the last war there was a <job> by the name of <guest:h>.",
    ),
    "temper": (
        "young", "retired", "nervous", "stubborn", "clever", "lonely", "cheerful", "left-handed",
    ),
    "job": (
        "pilot", "baker", "lighthouse keeper", "map maker", "clock mender", "star counter",
        "gardener", "night porter", "dragon dentist",
    ),
    "habit": (
        "Every morning <!he h> <daily>.",
        "Every <weekday> <!he h> <daily> and <daily>.",
        "<!He h> <daily>, because <!his h> <relative> had done the same.",
        "Most of all <!he h> liked to be left alone with <!his h> <treasure>.",
    ),
    "daily": (
        "swept the stars off the roof",
        "wrote a letter to the moon",
        "polished <!his h> <treasure>",
        "drank a cup of tea with the tide",
        "taught the cat to navigate",
        "counted the ships going by",
        "watered the telescope",
    ),
    "treasure": ("telescope", "bicycle", "brass compass", "blue teapot", "accordion", "tin rocket"),
    "relative": ("mother", "grandfather", "aunt", "teacher"),
    "event": (
        "One night <visitor> knocked at the door.",
        "One day <!his h> <treasure> began to speak.",
        "Then the sun forgot to rise.",
        "Then came a letter with no words in it.",
        "One <weekday> the sea went away for <number_word> hours.",
        "One evening <visitor> fell out of the sky.",
        "Then <visitor> asked for a place to sleep.",
    ),
    "visitor": (
        "a very small king", "a lost comet", "an elderly astronaut", "a talking suitcase",
        "a polite storm", "a dragon with a toothache", "a postman from the future",
    ),
    "reaction": (
        "<!He h> put the kettle on.",
        "<=h> was not surprised at all.",
        "<=h> laughed until the windows shook.",
        "<!He h> asked <!his h> <relative> for advice.",
        "<!He h> packed <!his h> <treasure> and ran.",
        "<=h> thought about it for <number_word> days.",
        "<!He h> said nothing, and then <!he h> said it again.",
    ),
    "ending": (
        "After that, nothing was ever quite so quiet.",
        "They are still good friends.",
        "And that is why the moon is never late.",
        "<=h> never told anyone, except the cat.",
        "In the end <!he h> went home and slept for a week.",
        "It made <!his h> tea go cold, but <!he h> did not mind.",
        "The next day <!he h> opened a restaurant.",
        "Some say that <!he h> is up there still.",
    ),
    "robot_start": (
        "There was a robot who wanted to <robot_wish>.",
        "The oldest robot on <world> dreamed of a way to <robot_wish>.",
        "A robot was built to <robot_duty>, but it wished to <robot_wish>.",
    ),
    "robot_wish": (
        "learn the violin", "taste soup", "grow a garden", "be a lighthouse", "tell a joke",
        "fall asleep", "swim in the sea",
    ),
    "robot_duty": ("count sand", "open doors", "sort the mail", "carry trays", "guard a bridge"),
    "robot_event": (
        "It practised for <number_word> hundred years.",
        "It asked a <job>, who only shook his head.",
        "It read every book in the library and ate one.",
        "Its makers laughed, and then they lent it a ladder.",
        "One <weekday> it simply walked out.",
    ),
    "robot_ending": (
        "Now you can hear it when the wind is right.",
        "It was not good at it, but it was happy.",
        "The other robots said nothing, but they hummed.",
        "It still sends a postcard every <weekday>.",
        "When it succeeded, it cried a little oil.",
    ),
    "meeting": (
        "<guest:a> met <guest:b> on the ship to <world>.<?differ a b>",
        "<guest:a> and <guest:b> shared an umbrella on <world>.<?differ a b>",
        "<guest:a> found <guest:b> at the bottom of a well.<?differ a b>",
    ),
    "meeting_talk": (
        '"You look lost," said <=a>. "I am early," said <=b>.',
        '"Is this the end?" asked <=a>. "It is the middle," said <=b>.',
        '"I know a good place to eat," said <=a>. "I know a better one," said <=b>.',
        '"What is the time?" asked <=a>. "Which one?" asked <=b>.',
        "<=a> had a <treasure>, and <=b> had a plan.",
    ),
    "meeting_ending": (
        "They have been married for <number_word> years.",
        "They never spoke of it again.",
        "Together they missed <number_word> ships and did not care.",
        "It was the beginning of a long dinner.",
        "They are still looking for the way out.",
    ),
}  # fmt: skip
