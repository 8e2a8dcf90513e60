"""The user's cache folder, for files that can be made again: compiled programs, bench models."""

import os
from pathlib import Path


def user_cache_dir() -> Path:
    """Our folder in the user's cache; it may not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "milliways"


def keep_programs() -> None:
    """Lets JAX keep compiled programs in the user's cache, unless the environment says where."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(user_cache_dir() / "programs"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
