"""The files beside the tensors: configuration, tokenizer and chat template, read once, as bytes.

    files = SmallFiles.read(model_dir)
    files.config(), files.manifest, files.checkpoint()

A process that has them can give them to another one whose own files are gone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from milliways.model.checkpoint import Checkpoint, find_directories, missing_config_hint
from milliways.model.config import CONFIG_FILE, GROK_1, ModelConfig, parse_config
from milliways.model.manifest import ABSENT, SMALL_FILES, Manifest, digest_of, read_if_there
from milliways.model.model_dir import description_dir
from milliways.model.tokenizer import TOKENIZER_FILE, Tokenizer


@dataclass(frozen=True, slots=True)
class SmallFiles:
    """The contents of those files that the model has, by name. Nobody changes the mapping."""

    # Where they were read, and where the tensors are. Either may be gone by now.
    folder: Path
    ckpt_dir: Path
    contents: Mapping[str, bytes]

    @classmethod
    def read(cls, model_dir: Path) -> "SmallFiles":
        """Reads the files of a model directory.

        Raises:
            CheckpointError: there is no such directory, or a file cannot be read.
        """
        ckpt_dir, _ = find_directories(model_dir)
        folder = description_dir(model_dir)
        read = {name: read_if_there(folder / name) for name in SMALL_FILES}
        contents = {name: content for name, content in read.items() if content is not None}
        return cls(folder, ckpt_dir, contents)

    @property
    def manifest(self) -> Manifest:
        """The digests of the files; `ABSENT` for those that the model does not have."""
        digests = {name: digest_of(content) for name, content in self.contents.items()}
        return Manifest(dict.fromkeys(SMALL_FILES, ABSENT) | digests)

    def config(self) -> ModelConfig:
        """The configuration; Grok-1's if there is no `config.json`.

        Raises:
            ModelConfigError: it is invalid.
        """
        content = self.contents.get(CONFIG_FILE)
        return GROK_1 if content is None else parse_config(content, self.folder / CONFIG_FILE)

    def tokenizer(self, vocab_size: int) -> Tokenizer | None:
        """The tokenizer; None if the model has none.

        Raises:
            TokenizerError: it is invalid, or its number of pieces is not `vocab_size`.
        """
        content = self.contents.get(TOKENIZER_FILE)
        if content is None:
            return None
        return Tokenizer.parse(content, self.folder / TOKENIZER_FILE, vocab_size)

    def checkpoint(self) -> Checkpoint:
        """The tensors. Each file is scanned when it is first asked for.

        Raises:
            ModelConfigError: the configuration is invalid.
        """
        hint = "" if CONFIG_FILE in self.contents else missing_config_hint(self.folder)
        return Checkpoint(self.ckpt_dir, self.config(), hint)
