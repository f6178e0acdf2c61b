"""The `evaluate` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from maskwright.config.schema.base import Factor, Fraction, Positive, Side, Strict

MetricName = Literal["mean_iou", "pq", "ap", "boundary_ap", "cityscapes_iou", "cityscapes_ap", "ece"]


class EvaluateConfig(Strict):
    """Prediction and evaluation: preparation of images, post-processing and scores."""

    section = "evaluate"

    task: Literal["semantic", "instance", "panoptic"] = Field(description="kind of results")
    metrics: tuple[MetricName, ...] | None = Field(
        None,
        description="scores to compute; the first decides which model is best. Task panoptic computes all of them, the "
        "others those of their task; null, or none for the task, is mean_iou (semantic), ap (instance), pq (panoptic). "
        "ece adds the expected calibration error, of pixels (semantic) or of the scores of segments",
    )
    max_images: Positive | None = Field(None, description="number of images to evaluate; null is all")
    batch_size: Positive = Field(
        1, description="max images per forward pass; only images of the same size share a batch"
    )

    # Size of images
    size: tuple[Side, Side] | None = Field(
        None,
        description="height, width in pixels to which every image is resized, whatever its shape; null is short_side",
    )
    size_divisor: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        None,
        description="both sides are rounded up to a multiple of it by resizing, as in transformers; null pads instead",
    )
    short_side: Side | None = Field(
        None, description="length in pixels to which the short side is resized; null keeps the image's size"
    )
    max_side: Positive | None = Field(
        None, description="max length of the long side in pixels after resizing; null is unlimited"
    )

    pad_size: tuple[Side, Side] | None = Field(
        None,
        description="height and width in pixels to which smaller images are padded after resizing, as EoMT's are, "
        "whose position table is for one size; null pads only to whole strides or patches",
    )

    # Post-processing
    semantic_resolution: Literal["input", "output"] = Field(
        "output",
        description="size at which masks are combined to class scores: output is that of the original image, input "
        "that of the resized image, and the scores are resized afterwards",
    )
    object_threshold: Fraction = Field(0.8, description="min class score of a panoptic segment")
    overlap_threshold: Fraction = Field(
        0.8, description="min visible fraction of a panoptic segment's mask; segments below it are dropped"
    )
    top_k: Positive = Field(100, description="max instances per image")
    score_threshold: Fraction = Field(0.0, description="min score of an instance")

    # Test-time augmentation
    scales: tuple[Factor, ...] = Field(
        (1.0,), min_length=1, description="factors of the image size; class scores are averaged over them (semantic)"
    )
    flip: bool = Field(False, description="also predict the horizontally flipped image, and average both")

    # Large images
    window_size: tuple[Positive, Positive] | None = Field(
        None,
        description="height and width in pixels of a sliding window over the resized image; overlapping class scores "
        "are averaged (semantic); null is no window",
    )
    window_stride: tuple[Positive, Positive] | Literal["even"] | None = Field(
        None,
        description="vertical and horizontal stride of the window in pixels; even spaces as few windows as possible "
        "evenly, as EoMT does; null is two thirds of window_size",
    )
    tile_size: Positive | None = Field(
        None,
        description="side in pixels of square tiles: larger images are cut into tiles that are segmented one by one, "
        "and objects across seams are merged; null is no tiles",
    )
    tile_overlap: Annotated[int, Field(ge=0)] | None = Field(
        None, description="min overlap of neighboring tiles in pixels; null is an eighth of tile_size"
    )
    tile_mask_megabytes: Positive = Field(
        256,
        description="memory for the run-length encoded masks of all instances of a tiled image, in 10^6 bytes; beyond "
        "it, those with the lowest scores are dropped with a warning. Enough for 100,000 objects with smooth outlines",
    )

    @model_validator(mode="after")
    def _check_crops(self) -> EvaluateConfig:
        if self.size and (self.short_side or self.max_side):
            raise ValueError(f"size {list(self.size)} cannot be combined with short_side and max_side; set one to null")
        if self.task != "semantic" and self.scales != (1.0,):
            raise ValueError(f"scales {list(self.scales)} are for task semantic; for task {self.task} set flip")
        if self.task != "semantic" and self.window_size:
            raise ValueError(
                f"window_size {list(self.window_size)} is for task semantic; for task {self.task} set tile_size"
            )
        if self.window_size and self.tile_size:
            raise ValueError(
                f"window_size {list(self.window_size)} and tile_size {self.tile_size} cannot be combined; set one"
            )
        if self.window_stride and not self.window_size:
            raise ValueError(f"window_stride {self.window_stride} needs window_size; set it too")
        if (
            isinstance(self.window_stride, tuple)
            and self.window_size
            and (self.window_stride[0] > self.window_size[0] or self.window_stride[1] > self.window_size[1])
        ):
            raise ValueError(
                f"window_stride {list(self.window_stride)} leaves gaps between windows of {list(self.window_size)}; "
                "decrease it"
            )
        if self.tile_overlap is not None and not self.tile_size:
            raise ValueError(f"tile_overlap {self.tile_overlap} needs tile_size; set it too")
        if self.tile_size and self.tile_overlap is not None and self.tile_overlap >= self.tile_size:
            raise ValueError(f"tile_overlap {self.tile_overlap} must be below tile_size {self.tile_size}")
        return self

    @model_validator(mode="after")
    def _check(self) -> EvaluateConfig:
        chosen = self.metrics or ()
        if len(set(chosen)) < len(chosen):
            raise ValueError(f"metrics {list(chosen)} has duplicates; name each metric once")
        for pair in (("mean_iou", "cityscapes_iou"), ("ap", "cityscapes_ap")):
            if set(pair) <= set(chosen):
                raise ValueError(
                    f"metrics has {' and '.join(pair)}, whose scores have the same names; keep one of them"
                )
        return self
