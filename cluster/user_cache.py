"""Where this user's machine keeps what can be made again: compiled programs, bench models."""

import os
from pathlib import Path


def user_cache_dir() -> Path:
    """Our folder in the user's cache; need not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "milliways"
