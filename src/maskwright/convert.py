"""`maskwright convert`: a checkpoint of another implementation becomes one of ours."""

from __future__ import annotations

from pathlib import Path

from maskwright.checkpoint import Checkpoint, read_checkpoint, save_checkpoint
from maskwright.errors import CheckpointError


def convert(source: Path, destination: Path, *, categories: str | None = None) -> Checkpoint:
    """Read `source`, whatever its layout, and write it as `destination`.

    Args:
        source: see `checkpoint.read_checkpoint`.
        destination: a `.safetensors` file.
        categories: class list, a built-in name or a YAML file; None guesses by the number of classes.

    Returns:
        What was written; `dropped` names the entries left out on purpose.

    Raises:
        CheckpointError: the source cannot be used, or the destination has another suffix. Nothing is written then.
    """
    if destination.suffix != ".safetensors":
        raise CheckpointError(f"destination {destination} must end in .safetensors")
    checkpoint = read_checkpoint(source, categories)
    save_checkpoint(destination, checkpoint)
    return checkpoint
