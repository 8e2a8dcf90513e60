"""The user's cache folder, for files that can be made again: compiled programs, bench models."""

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def user_cache_dir() -> Path:
    """Our folder in the user's cache. It exists.

    If the user has no home or may not write there, it is below the folder for temporary files.

    Raises:
        OSError: neither can be written; names the variables that say where they are.
    """
    for base in _bases():
        folder = base / "milliways"
        if _is_usable(folder):
            return folder
    return _temporary_cache()


def keep_programs() -> None:
    """Lets JAX keep compiled programs in the user's cache, unless the environment says where."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        # Programs can be compiled again.
        with suppress(OSError):
            os.environ["JAX_COMPILATION_CACHE_DIR"] = str(user_cache_dir() / "programs")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


def _bases() -> Iterator[Path]:
    if base := os.environ.get("XDG_CACHE_HOME"):
        yield Path(base)
    try:
        yield Path.home() / ".cache"
    except RuntimeError:
        # No HOME, and the system does not know this user.
        return


def _is_usable(folder: Path) -> bool:
    # Only making it shows whether it can be made: /proc says that it can be written.
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def _temporary_cache() -> Path:
    """A folder of this user alone, in a place where other users may make folders too."""
    folder = Path(tempfile.gettempdir()) / f"milliways-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    if not is_ours or found.st_mode & 0o022:
        text = f"{folder}: not a folder of this user alone; set HOME or XDG_CACHE_HOME"
        raise PermissionError(text)
    return folder
