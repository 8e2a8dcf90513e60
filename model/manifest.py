"""Which model is this? A manifest has a digest of the bytes of each part of a model.

    manifest = Manifest({"config.json": "6d1f...", "language_model/rms_norm/scale": "09ab..."})
    manifest.differing(other)      # the names of parts that are not the same bytes

A part is a tensor, one expert of a tensor (`transformer/decoder_layer_3/moe/linear/w[5]`), or one
of the small files beside the tensors. A digest is XXH3's with 128 bits, as 32 hexadecimal digits.
It finds every fault of a disk, and every file that is another. It is no defence against somebody
who makes two files with the same digest on purpose.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from milliways.model.errors import CheckpointError, ManifestError

# The files beside the tensors on which tokens or texts depend.
SMALL_FILES = ("config.json", "tokenizer.model", "chat_template.jinja", "tokenizer_config.json")
# The digest of a small file that a model does not have.
ABSENT = "0" * 32
_FORMAT = "milliways-manifest-1"
_DIGEST = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Manifest:
    """Digests by the name of the part. Nobody changes the mapping."""

    digests: Mapping[str, str] = field(default_factory=dict[str, str])

    def __len__(self) -> int:
        return len(self.digests)

    @cached_property
    def identity(self) -> str:
        """A digest of the manifest itself, 32 hexadecimal digits; empty if it has no part."""
        if not self.digests:
            return ""
        lines = "".join(f"{name} {digest}\n" for name, digest in sorted(self.digests.items()))
        return hashlib.sha256(lines.encode()).hexdigest()[:32]

    def differing(self, other: "Manifest") -> list[str]:
        """The parts that both have, with other digests, in order."""
        return sorted(
            name
            for name, digest in other.digests.items()
            if self.digests.get(name, digest) != digest
        )

    def missing_of(self, names: Iterable[str]) -> list[str]:
        """Those of the names that it has no digest of, in order."""
        return sorted(name for name in names if name not in self.digests)

    def with_all(self, other: "Manifest") -> "Manifest":
        """The parts of both; where they differ, this one's digest counts."""
        if other.digests.items() <= self.digests.items():
            return self
        return Manifest({**other.digests, **self.digests})

    def to_json(self) -> str:
        """The text of a manifest file: one line for each part."""
        content = {
            "format": _FORMAT,
            "identity": self.identity,
            "digests": dict(sorted(self.digests.items())),
        }
        return json.dumps(content, indent=1)


EMPTY_MANIFEST = Manifest()


def read_manifest(path: Path) -> Manifest:
    """Reads a file that `to_json` wrote, such as the output of `milliways inspect --digest`.

    Raises:
        ManifestError: the file cannot be read, or is not a manifest; says what is wrong.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ManifestError(path, f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ManifestError(path, f"is not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ManifestError(path, f"has no field format = {_FORMAT!r}")
    fields = cast("dict[str, Any]", content)
    digests = fields.get("digests")
    if not isinstance(digests, dict) or not digests:
        raise ManifestError(path, "has no field digests with at least one part")
    for name, digest in cast("dict[str, Any]", digests).items():
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise ManifestError(path, f"digest of {name} = {digest!r}: must be 32 hex digits")
    manifest = Manifest(cast("dict[str, str]", digests))
    if fields.get("identity") != manifest.identity:
        raise ManifestError(path, "was changed: its identity is not that of its digests")
    return manifest


def digest_small_files(model_dir: Path, names: Iterable[str] = SMALL_FILES) -> Manifest:
    """The digests of the files beside the tensors; `ABSENT` for those that the model has not.

    Raises:
        CheckpointError: a file is there, but cannot be read.
    """
    return Manifest({name: _digest_file(model_dir / name) for name in names})


def digest_of(content: bytes) -> str:
    """The digest of some bytes."""
    # Imported here: clients import this module, and digest nothing.
    import xxhash

    return xxhash.xxh3_128_hexdigest(content)


def read_if_there(path: Path) -> bytes | None:
    """The content of a file; None if there is no such file.

    Raises:
        CheckpointError: it is there, and cannot be read.
    """
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}") from error


def _digest_file(path: Path) -> str:
    content = read_if_there(path)
    return ABSENT if content is None else digest_of(content)
