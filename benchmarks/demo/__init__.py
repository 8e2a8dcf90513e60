"""The language of the demo model, and its training.

    import random
    from milliways.benchmarks.demo.grammar import check_text, generate_text

    text = generate_text(random.Random(0))
    print(text, check_text(text).in_language)

It owns the grammar and its rules (`grammar`, `language`), the training (`training`), and a check of
what a trained model writes (`sample_check`).

Invariants:

- `check_text` accepts every text that `generate_text` writes: both walk the same rules.
- A seed decides every text and every training row.
- Nothing here is imported when serving, and it is not part of the installed package.
"""
