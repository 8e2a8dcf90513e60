"""What a worker reads of a model directory, and the digests of all that it has read."""

from pathlib import Path

from milliways.model.checkpoint import CheckedTensors, Checkpoint
from milliways.model.checkpoint.checked_tensors import Elsewhere
from milliways.model.config import ModelConfig
from milliways.model.errors import OtherModelError
from milliways.model.manifest import Manifest, digest_small_files
from milliways.model.model_dir import description_dir, load_tokenizer
from milliways.wire.errors import StartupError


class ModelFiles:
    """Owns the checkpoint. Configuration and tokenizer are read once, tensors when they are loaded.

    A file of which this worker holds no part may be missing.
    """

    def __init__(self, model_dir: Path) -> None:
        """Reads the files beside the tensors.

        Raises:
            CheckpointError, ModelConfigError, TokenizerError: what is wrong with which file.
        """
        # Where configuration and tokenizer are.
        self._small_files_dir = description_dir(model_dir)
        self.checkpoint = Checkpoint.open_lazily(model_dir)
        self.tensors = CheckedTensors(self.checkpoint)
        self._small_files = digest_small_files(model_dir)
        self.tokenizer = load_tokenizer(model_dir, self.config.vocab_size)

    @property
    def config(self) -> ModelConfig:
        return self.checkpoint.config

    @property
    def loaded(self) -> Manifest:
        """The digests of all that was loaded, and of the files beside the tensors."""
        return self._small_files.with_all(self.tensors.found)

    def expect(self, wanted: Manifest, elsewhere: Elsewhere | None = None) -> None:
        """Refuses other bytes than the wanted ones from now on.

        `elsewhere` is asked for parts whose file cannot be read.

        Raises:
            OtherModelError: a file beside the tensors is that of another model.
            StartupError: it was, and is right by now; or tensors that are loaded are of another.
                This process must not live on.
        """
        self.tensors.wanted, self.tensors.elsewhere = wanted, elsewhere
        self.tensors.faults.clear()
        differing = wanted.differing(self.loaded)
        if not differing:
            return
        part = differing[0]
        now = digest_small_files(self._small_files_dir)
        if part in now.digests and wanted.differing(now):
            found, right = now.digests[part], wanted.digests[part]
            raise OtherModelError(self._small_files_dir / part, part, found, right)
        raise StartupError(f"{part} was read when it was another model's; the worker starts again")

    def close(self) -> None:
        """Releases all maps of files, and ends the thread that reads ahead."""
        self.tensors.close()
        self.checkpoint.close()
