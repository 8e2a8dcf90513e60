"""What can be found wrong with the files of a model before any worker starts."""

from pathlib import Path

from milliways.cluster.host.model_bytes import checkpoint_bytes
from milliways.cluster.settings.config import ModelSettings
from milliways.model.checkpoint import Checkpoint, check_unchangeable, part_names
from milliways.model.errors import ManifestError
from milliways.model.manifest import read_manifest
from milliways.model.model_dir import load_tokenizer, resolve_model_dir
from milliways.wire.placement import ModelBytes

MAPPED = "mapped"
_VALUE_BYTES = {"float32": 4, "bfloat16": 2}


def check_files(settings: ModelSettings) -> ModelBytes:
    """Checks the files of a model; returns the sizes of its parts.

    Raises:
        CheckpointError, ModelConfigError, TokenizerError: a file is unreadable or invalid.
        ManifestError: the manifest is not one of this model.
        ChangeableFileError: somebody may change experts that would stay in their files.
    """
    model_dir = resolve_model_dir(settings.path)
    with Checkpoint.open(model_dir) as checkpoint:
        load_tokenizer(model_dir, checkpoint.config.vocab_size)
        if settings.manifest:
            check_manifest(Path(settings.manifest), checkpoint)
        if settings.experts == MAPPED:
            check_mapped(checkpoint)
        return checkpoint_bytes(checkpoint, _VALUE_BYTES[settings.dtype])


def read_sizes(settings: ModelSettings) -> ModelBytes:
    """The sizes of a model, from its files.

    Raises:
        CheckpointError, ModelConfigError: a file is unreadable or invalid; says which and why.
    """
    with Checkpoint.open(resolve_model_dir(settings.path)) as checkpoint:
        return checkpoint_bytes(checkpoint, _VALUE_BYTES[settings.dtype])


def check_manifest(path: Path, checkpoint: Checkpoint) -> None:
    """Checks that a manifest is one of this model.

    Raises:
        ManifestError: it cannot be read, or has no digest of a part of the model.
    """
    missing = read_manifest(path).missing_of(part_names(checkpoint))
    if missing:
        reason = f"has no digest of {missing[0]}, and of {len(missing) - 1} more parts of the model"
        raise ManifestError(path, reason)


def check_mapped(checkpoint: Checkpoint) -> None:
    """Checks that nobody can change the experts that would stay in their files.

    Raises:
        ChangeableFileError: somebody can.
    """
    for spec in checkpoint.specs:
        if spec.role.is_expert:
            check_unchangeable(checkpoint.record(spec).path)
