"""What a worker reads of a model directory, and the digests of all that it has read."""

import logging
from collections.abc import Sequence
from dataclasses import replace

from milliways.model.checkpoint import CheckedTensors
from milliways.model.checkpoint.checked_tensors import Elsewhere
from milliways.model.config import ModelConfig
from milliways.model.errors import CheckpointError, OtherModelError
from milliways.model.manifest import Manifest, digest_small_files
from milliways.model.model_dir import resolve_model_dir
from milliways.model.small_files import SmallFiles
from milliways.wire.errors import StartupError

logger = logging.getLogger(__name__)


class ModelFiles:
    """Owns the checkpoint. Configuration and tokenizer are read once, tensors when they are loaded.

    A file of which this worker holds no part may be missing. With `known`, which other workers of
    the cluster have read, the files beside the tensors may be missing too, or be others.
    """

    def __init__(self, name: str, known: SmallFiles | None = None) -> None:
        """Reads the files beside the tensors of a model that the settings name.

        Raises:
            CheckpointError, ModelConfigError, TokenizerError: what is wrong with which file.
        """
        self.small_files, self._small_fault = _small_files(name, known)
        self._small_manifest = self.small_files.manifest
        self.checkpoint = self.small_files.checkpoint()
        self.tensors = CheckedTensors(self.checkpoint)
        self.tokenizer = self.small_files.tokenizer(self.config.vocab_size)

    @property
    def config(self) -> ModelConfig:
        return self.checkpoint.config

    @property
    def loaded(self) -> Manifest:
        """The digests of all that was loaded, and of the files beside the tensors."""
        return self._small_manifest.with_all(self.tensors.found)

    @property
    def faults(self) -> Sequence[str]:
        """What is wrong with files whose content came from others."""
        return [*filter(None, [self._small_fault]), *self.tensors.faults]

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
        folder = self.small_files.folder
        now = digest_small_files(folder)
        if part in now.digests and wanted.differing(now):
            found, right = now.digests[part], wanted.digests[part]
            raise OtherModelError(folder / part, part, found, right)
        raise StartupError(f"{part} was read when it was another model's; the worker starts again")

    def close(self) -> None:
        """Releases all maps of files, and ends the thread that reads ahead."""
        self.tensors.close()
        self.checkpoint.close()


def _small_files(name: str, known: SmallFiles | None) -> tuple[SmallFiles, str]:
    """The files to go by, and what is wrong with those of this worker; empty if nothing is.

    Raises:
        CheckpointError: they cannot be read, and nobody knows them.
    """
    try:
        read = SmallFiles.read(resolve_model_dir(name))
    except CheckpointError as error:
        if known is None:
            raise
        logger.warning("%s; the content that other workers have read is used", error)
        return known, str(error)
    if known is None:
        return read, ""
    differing = known.manifest.differing(read.manifest)
    if not differing:
        return read, ""
    part = differing[0]
    found, right = read.manifest.digests[part], known.manifest.digests[part]
    fault = str(OtherModelError(read.folder / part, part, found, right))
    logger.warning("%s; the content that other workers have read is used", fault)
    return replace(read, contents=known.contents), fault
