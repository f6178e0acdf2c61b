"""Convert the outputs of a file with `contents` "result" to a `Segmentation`."""

from __future__ import annotations

import numpy as np
from PIL import Image

from maskwright.inference.exported.metadata import ExportMetadata
from maskwright.results.segmentation import Segmentation


def read_decision(
    outputs: dict[str, np.ndarray], metadata: ExportMetadata, input_size: tuple[int, int], output_size: tuple[int, int]
) -> Segmentation:
    """Return the result for one image.

    Maps and masks have the size of the network's input. They are cropped to the image and resized to `output_size` with
    nearest-neighbor interpolation.

    Args:
        outputs: of one image, without the dimension B; see `docs/export.md`.
        metadata: of the file.
        input_size: (height, width) of the image in the network's input.
        output_size: (height, width) of the result.
    """

    def resize(map_: np.ndarray) -> np.ndarray:
        return _resize_nearest(map_[: input_size[0], : input_size[1]], output_size)

    if metadata.task == "semantic":
        label_map = resize(outputs["label_map"]).astype(np.int64)
        labels = np.flatnonzero(np.bincount(label_map.ravel(), minlength=len(metadata.categories)))
        return Segmentation("semantic", output_size, metadata.categories, labels, label_map=label_map)
    labels, scores = outputs["labels"].astype(np.int64), outputs["scores"].astype(np.float32)
    kept = labels >= 0
    labels, scores = labels[kept], scores[kept]
    if metadata.task == "panoptic":
        segment_map = resize(outputs["segment_map"]).astype(np.int32)
        return Segmentation("panoptic", output_size, metadata.categories, labels, scores, segment_map=segment_map)
    masks = [resize(mask) for mask in outputs["masks"][kept]]
    stacked = np.stack(masks) if masks else np.zeros((0, *output_size), dtype=bool)
    return Segmentation(
        "instance", output_size, metadata.categories, labels, scores, instance_masks=stacked.astype(bool)
    )


def _resize_nearest(map_: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if map_.shape == tuple(size):
        return map_
    image = Image.fromarray(map_.astype(np.int32) if map_.dtype != bool else map_.astype(np.uint8))
    return np.array(image.resize((size[1], size[0]), Image.Resampling.NEAREST))
