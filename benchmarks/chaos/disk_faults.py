"""Damages the files of a checkpoint, and puts them right again.

Half of the files are damaged, so that a worker that starts meanwhile reads at least one of them.
Whatever is damaged is replaced by a new file, or changed in place, as programs and disks do. At the
end every file has its first content, in a new file.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random

from milliways.benchmarks.chaos.faults import Fault
from milliways.wire.errors import StartupError

# The first bytes of a file describe its arrays; weights come after them.
_HEADER_BYTES = 512


def swap(paths: Sequence[Path], random: Random) -> None:
    """Exchanges the contents of files of equal size: other weights of the right shapes."""
    by_size: dict[int, list[Path]] = {}
    for path in paths:
        by_size.setdefault(path.stat().st_size, []).append(path)
    for same in by_size.values():
        # Each gets the content of the next one.
        contents = [path.read_bytes() for path in same]
        for path, content in zip(same, contents[1:] + contents[:1], strict=True):
            _replace(path, content)


def flip_bits(paths: Sequence[Path], random: Random) -> None:
    """Flips one bit in each file, in place."""
    for path in paths:
        size = path.stat().st_size
        at = random.randrange(min(_HEADER_BYTES, size - 1), size)
        with path.open("r+b") as file:
            file.seek(at)
            (byte,) = file.read(1)
            file.seek(at)
            file.write(bytes([byte ^ 1 << random.randrange(8)]))


def truncate(paths: Sequence[Path], random: Random) -> None:
    """Cuts files short, in place."""
    for path in paths:
        os.truncate(path, random.randrange(path.stat().st_size))


def remove(paths: Sequence[Path], random: Random) -> None:
    """Removes files."""
    for path in paths:
        path.unlink()


_DAMAGE: dict[Fault, Callable[[Sequence[Path], Random], None]] = {
    Fault.SWAP_CHECKPOINT: swap,
    Fault.FLIP_BIT: flip_bits,
    Fault.TRUNCATE: truncate,
    Fault.REMOVE_FILE: remove,
}


@contextmanager
def damaged(fault: Fault, ckpt_dir: Path, draw: int) -> Generator[None]:
    """Half of the tensor files are damaged until the end.

    Raises:
        StartupError: the files cannot be changed here.
    """
    random = Random(draw)
    paths = sorted(ckpt_dir.glob("tensor*"))
    victims = paths if fault is Fault.SWAP_CHECKPOINT else random.sample(paths, len(paths) // 2)
    try:
        with tempfile.TemporaryDirectory(dir=ckpt_dir.parent) as kept:
            for path in paths:
                shutil.copyfile(path, Path(kept) / path.name)
            try:
                _DAMAGE[fault](victims, random)
                yield
            finally:
                for path in paths:
                    os.replace(Path(kept) / path.name, path)
    except OSError as error:
        raise StartupError(f"{fault.value}: {ckpt_dir} cannot be changed: {error}") from error


def _replace(path: Path, content: bytes) -> None:
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(content)
    os.replace(new, path)
