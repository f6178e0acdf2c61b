"""Convert checkpoints between our format and those of other implementations (`maskwright convert`)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from maskwright.checkpoints.backbone import add_base
from maskwright.checkpoints.checkpoint import Checkpoint, save_checkpoint
from maskwright.checkpoints.key_maps.key_map import State
from maskwright.checkpoints.load import read_checkpoint
from maskwright.checkpoints.write_eomt import write_eomt, write_eomt_transformers
from maskwright.checkpoints.write_foreign import write_detectron2, write_openmmlab, write_transformers
from maskwright.errors import CheckpointError, printable_list

Target = Literal["maskwright", "transformers", "detectron2", "mmdetection", "mmsegmentation", "eomt"]
Dtype = Literal["float32", "float16", "bfloat16"]

_SUFFIXES = {
    "maskwright": (".safetensors",),
    "detectron2": (".pkl", ".pth"),
    "mmdetection": (".pth",),
    "mmsegmentation": (".pth",),
    "eomt": (".bin", ".pth"),
}


def convert(
    source: Path,
    destination: Path,
    *,
    to: Target = "maskwright",
    categories: str | None = None,
    dtype: Dtype | None = None,
    overwrite: bool = False,
    base: str | None = None,
) -> Checkpoint:
    """Read a checkpoint of any known layout and write it in another.

    Args:
        source: see `read_checkpoint`.
        destination: a `.safetensors` file for maskwright, a new folder for transformers, a `.pkl` or `.pth` file for
            detectron2, a `.pth` file for mmdetection and mmsegmentation, a `.bin` or `.pth` file for eomt.
        to: the layout to write.
        categories: class list, a built-in name or a YAML file; None as for `read_checkpoint`.
        dtype: type of the weights in the file; half precision halves it, and models compute in float32 all
            the same; None keeps that of the source.
        overwrite: replace an existing file; an existing folder is never replaced.
        base: weights of the backbone, as `model.backbone_weights` names them, if the source only has deltas from them,
            as EoMT's models with DINOv3.

    Returns:
        The checkpoint that was written; `dropped` lists the entries dropped on purpose.

    Raises:
        CheckpointError: the source cannot be read, the destination is unsuitable, or the other implementation cannot
            express the model. Nothing is written then.
    """
    _check_destination(destination, to, overwrite)
    checkpoint = read_checkpoint(source, categories, allow_delta=base is not None)
    if base is not None:
        try:
            add_base(checkpoint, base)
        except CheckpointError as error:
            raise error.located_in(source) from None
    if dtype is not None:
        checkpoint.state = _cast(checkpoint.state, getattr(torch, dtype))
    match to:
        case "maskwright":
            save_checkpoint(destination, checkpoint)
        case "transformers" if checkpoint.config.family == "eomt":
            write_eomt_transformers(destination, checkpoint)
        case "transformers":
            write_transformers(destination, checkpoint)
        case "eomt":
            write_eomt(destination, checkpoint)
        case "detectron2":
            write_detectron2(destination, checkpoint)
        case "mmdetection":
            write_openmmlab(destination, checkpoint, "panoptic_head")
        case "mmsegmentation":
            write_openmmlab(destination, checkpoint, "decode_head")
    return checkpoint


def _cast(state: State, dtype: torch.dtype) -> State:
    """Return the weights in another floating-point type.

    Raises:
        CheckpointError: a value is beyond the range of the type.
    """
    cast = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    if overflown := [key for key, tensor in cast.items() if tensor.is_floating_point() and tensor.isinf().any()]:
        raise CheckpointError(
            f"{len(overflown)} weights are beyond the range of {dtype}: {printable_list(overflown)}",
            remedy="use bfloat16, whose range is that of float32",
        )
    return cast


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
