"""The small Grok-1 that ships with the package.

    from milliways.model.config import load_config
    from milliways.model.demo import DEMO_DIR

    print(load_config(DEMO_DIR).num_layers)

It owns data only: `DEMO_DIR` is a model directory like any other, with ckpt-0, config.json and
tokenizer.model. `benchmarks/demo` made it.

Invariants: the files do not change without a new training run; recorded answers depend on them.
"""

from pathlib import Path

DEMO_DIR: Path = Path(__file__).resolve().parent
