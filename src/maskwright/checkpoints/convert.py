"""Convert checkpoints between our format and those of other implementations (`maskwright convert`)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from maskwright.checkpoints.checkpoint import Checkpoint, read_checkpoint, save_checkpoint
from maskwright.checkpoints.write_foreign import write_detectron2, write_openmmlab, write_transformers
from maskwright.errors import CheckpointError

Target = Literal["maskwright", "transformers", "detectron2", "mmdetection", "mmsegmentation"]

_SUFFIXES = {
    "maskwright": (".safetensors",),
    "detectron2": (".pkl", ".pth"),
    "mmdetection": (".pth",),
    "mmsegmentation": (".pth",),
}


def convert(
    source: Path,
    destination: Path,
    *,
    to: Target = "maskwright",
    categories: str | None = None,
    overwrite: bool = False,
) -> Checkpoint:
    """Read a checkpoint of any known layout and write it in another.

    Args:
        source: see `checkpoint.read_checkpoint`.
        destination: a `.safetensors` file for maskwright, a new folder for transformers, a `.pkl` or `.pth` file for
            detectron2, a `.pth` file for mmdetection and mmsegmentation.
        to: the layout to write.
        categories: class list, a built-in name or a YAML file; None as for `read_checkpoint`.
        overwrite: replace an existing file; an existing folder is never replaced.

    Returns:
        The checkpoint that was written; `dropped` lists the entries dropped on purpose.

    Raises:
        CheckpointError: the source cannot be read, the destination is unsuitable, or the other implementation cannot
            express the model. Nothing is written then.
    """
    _check_destination(destination, to, overwrite)
    checkpoint = read_checkpoint(source, categories)
    match to:
        case "maskwright":
            save_checkpoint(destination, checkpoint)
        case "transformers":
            write_transformers(destination, checkpoint)
        case "detectron2":
            write_detectron2(destination, checkpoint)
        case "mmdetection":
            write_openmmlab(destination, checkpoint, "panoptic_head")
        case "mmsegmentation":
            write_openmmlab(destination, checkpoint, "decode_head")
    return checkpoint


def _check_destination(destination: Path, to: Target, overwrite: bool) -> None:
    if to == "transformers":
        if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
            raise CheckpointError(f"destination {destination} exists", remedy="choose a new folder, or remove it first")
        return
    if destination.suffix not in _SUFFIXES[to]:
        raise CheckpointError(f"destination {destination} must end in {' or '.join(_SUFFIXES[to])} for {to}")
    if destination.is_dir() or (destination.exists() and not overwrite):
        raise CheckpointError(
            f"destination {destination} exists", remedy="choose a new file, or replace it with --overwrite"
        )
