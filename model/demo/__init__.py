"""The small Grok-1 that ships with the package; `DEMO_DIR` is a model directory like any other."""

from pathlib import Path

DEMO_DIR: Path = Path(__file__).resolve().parent
