"""From images to `Segmentation`s: the pipeline that prediction and evaluation share.

    image -> crops -> batches of one size -> network -> predictions grouped by image -> segment

The crops of an image are the whole image, or the windows of a sliding window, at each of `evaluate.scales` and, with
`evaluate.flip`, also flipped horizontally. An image larger than `evaluate.tile_size` is cut into tiles, and each tile
goes through the pipeline as a separate image.

Unusual: crops of different images share a batch, but only crops of one size do. The network sees padding, so padding
crops to a common size would change results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Generic, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from maskwright.config.schema import EvaluateConfig
from maskwright.data.images.tiled_tiff import ImageReader
from maskwright.errors import MaskwrightError
from maskwright.inference.exported_model import ExportedModel
from maskwright.inference.mask_upsampling import CropPrediction, SemanticScores
from maskwright.inference.merge_tiles import start_merge
from maskwright.inference.nothing_found import NothingFound, first_hint
from maskwright.inference.preprocess import Prepared, prepare, prepare_whole, resize_for_network
from maskwright.inference.segment import class_scores, segment
from maskwright.inference.sliding_window import WindowMean, list_windows
from maskwright.inference.test_time_augmentation import MeanScores
from maskwright.inference.tiling import Rectangle, cut_tiles
from maskwright.models.segmenter import Segmenter
from maskwright.results.segmentation import Segmentation
from maskwright.runtime.background import prefetch
from maskwright.runtime.device import autocast
from maskwright.structures.annotations import Task, pad_images
from maskwright.structures.predictions import MaskPrediction, PixelPrediction

Key = TypeVar("Key")


class Crop(NamedTuple):
    """One input of the network.

    Attributes:
        image: the image that it is part of.
        scale: the image resized to one of its scales, (H, W, C).
        flip: whether the resized image is flipped horizontally.
        box: the part of the (flipped) resized image that the network sees.
    """

    image: ImageInProgress
    scale: np.ndarray
    flip: bool
    box: Rectangle

    def pixels(self) -> Tensor:
        """Return the crop (C, h, w)."""
        pixels = self.scale[:, ::-1] if self.flip else self.scale
        pixels = pixels[self.box.top : self.box.bottom, self.box.left : self.box.right]
        return torch.from_numpy(pixels.copy() if self.flip else pixels).permute(
            2, 0, 1
        )  # torch has no negative strides


@dataclass
class ImageInProgress(Generic[Key]):
    """An image and the predictions for its crops so far.

    Attributes:
        prepared: the image at each scale.
        key: the caller's key for the image.
        missing: crops without a prediction.
        predictions: for each scale and flip that is complete; or the mean of all, once the last one is there.
        windows: class scores of the windows of the current scale and flip.
        mean: class scores of the scales and flips so far, if only these are needed.
    """

    prepared: Prepared
    key: Key
    missing: int = 0
    predictions: list[CropPrediction | SemanticScores] = field(default_factory=list)
    windows: WindowMean | None = None
    mean: MeanScores | None = None


class Pipeline:
    """A model, and how it is applied to images.

    Args:
        model: in evaluation mode, on its device.
        config: scales, flip, windows, tiles and thresholds.
        tasks: the kinds of results for each image; None is `config.task`.
        precision: "fp32", "bf16" or "fp16".
        batch_size: crops per forward pass.
        forward: returns the final prediction in place of the model (see `compile_forward`).
        confidence: also compute `Segmentation.confidence`.

    Raises:
        MaskwrightError: the model cannot do a task, or its windows would cut patches.
    """

    def __init__(
        self,
        model: Segmenter,
        config: EvaluateConfig,
        tasks: Sequence[Task] | None = None,
        *,
        precision: str = "fp32",
        batch_size: int = 1,
        forward: Callable[[Tensor, Tensor], MaskPrediction | PixelPrediction] | None = None,
        confidence: bool = False,
    ) -> None:
        self.tasks: tuple[Task, ...] = (config.task,) if tasks is None else tuple(tasks)
        model.check_window(config.window_size)
        for task in self.tasks:
            model.check_task(task)
        if isinstance(model, ExportedModel):
            model.check_settings(config, precision, confidence)
        self.model, self.config = model, config
        self.precision, self.batch_size, self.confidence = precision, batch_size, confidence
        self.device = model.pixel_mean.device
        self.nothing_found: dict[Task, NothingFound] = {
            task: NothingFound(config) for task in self.tasks if task != "semantic"
        }
        self.forward = forward or (lambda images, padding: model(images, padding).final)

    def prepare(self, image: ImageReader) -> Prepared | ImageReader:
        """Resize an image for the network; see `preprocess.prepare`."""
        return prepare(image, self.config, self.model.fixed_size)

    def segment(self, images: Iterable[tuple[Prepared | ImageReader, Key]]) -> Iterator[tuple[Segmentation, Key]]:
        """Yield the results in the order of the images, each at the size of its image.

        Images are read only when they are needed, so that few are in memory.

        Args:
            images: see `prepare`; an image that is not prepared is segmented in tiles. Each comes with a key, which is
                returned with the result, or with the result of each task in turn.

        Raises:
            ImageError: a tile of an image that is read in parts is damaged.
        """
        for result, key in self.try_segment(images):
            if isinstance(result, MaskwrightError):
                raise result
            yield result, key

    def try_segment(
        self, images: Iterable[tuple[Prepared | ImageReader | MaskwrightError, Key]]
    ) -> Iterator[tuple[Segmentation | MaskwrightError, Key]]:
        """Yield results as `segment` does; in place of an image that failed to load or to segment, yield its error."""
        for is_prepared, run in groupby(images, lambda pair: isinstance(pair[0], Prepared)):
            if is_prepared:
                yield from self._segment_whole(cast(Iterator[tuple[Prepared, Key]], run))
            else:
                for image, key in cast(Iterator[tuple[ImageReader | MaskwrightError, Key]], run):
                    for result in self._segment_tiles(image):
                        yield result, key

    def semantic_stages(self, pixels: np.ndarray) -> list[Segmentation]:
        """Return the class map predicted by the semantic layer after each backbone stage, fine to coarse.

        Args:
            pixels: (H, W, 3) uint8; the network sees it once, as a whole.

        Returns:
            One semantic result per stage; empty for a model without such layers.
        """
        if self.model.config.semantic_attention is None or isinstance(self.model, ExportedModel):
            return []
        resized = resize_for_network(pixels, self.config)
        images, padding = pad_images([torch.from_numpy(resized).permute(2, 0, 1)], self.model.size_divisor)
        with torch.no_grad(), autocast(self.device, self.precision):
            maps = self.model(images.to(self.device), padding.to(self.device)).semantic_maps
        stages = []
        for logits in maps:
            prediction = CropPrediction(PixelPrediction(logits), _size(images), resized.shape[:2])
            stages.append(self._decide([prediction], "semantic", pixels))
        return stages

    def predict(self, images: Iterable[tuple[Prepared, Key]]) -> Iterator[ImageInProgress[Key]]:
        """Yield each image with all its predictions, in order."""
        for batch in _batches(self._crops(images), self.batch_size):
            for crop, prediction in zip(batch, self._forward(batch), strict=True):
                self._add(crop, prediction)
                if not crop.image.missing:
                    yield crop.image

    def _segment_whole(self, images: Iterable[tuple[Prepared, Key]]) -> Iterator[tuple[Segmentation, Key]]:
        """Yield the result of each image for each task."""
        if isinstance(self.model, ExportedModel) and self.model.decides:
            for prepared, key in images:
                yield self._decided_inside(self.model, prepared), key
            return
        for image in self.predict(images):
            for task in self.tasks:
                yield self._decide(image.predictions, task, image.prepared.pixels), image.key

    def _segment_tiles(self, image: ImageReader | MaskwrightError) -> Iterator[Segmentation | MaskwrightError]:
        """Yield the result of a large image for each task, merged from those of its tiles; or the error."""
        if isinstance(image, MaskwrightError):
            yield image
            return
        side = self.config.tile_size or max(image.size)
        mask_bytes = self.config.tile_mask_megabytes * 10**6
        merged = {task: start_merge(task, image.size, self.model.categories, mask_bytes) for task in self.tasks}
        tiles = cut_tiles(image.size, side, self.config.tile_overlap)
        try:
            prepared = prefetch(
                (prepare_whole(image.read(*tile.area), self.config, self.model.fixed_size), tile) for tile in tiles
            )
            for result, tile in self._segment_whole(prepared):
                merged[result.task].add(tile, result)
        except MaskwrightError as error:
            yield error
            return
        for task in self.tasks:
            result = merged.pop(task).finish()
            result.image = image.pixels
            yield result

    def _crops(self, images: Iterable[tuple[Prepared, Key]]) -> Iterator[Crop]:
        """Yield the crops of all images, in order."""
        for prepared, key in images:
            image = ImageInProgress(prepared, key)
            if self.tasks == ("semantic",) and len(prepared.scales) * (1 + self.config.flip) > 1:
                image.mean = MeanScores(prepared.pixels.shape[:2])
            crops = self.list_crops(image)
            image.missing = len(crops)
            yield from crops

    def list_crops(self, image: ImageInProgress) -> list[Crop]:
        """List the crops of an image that are passed to the network."""
        return [
            Crop(image, scale, flip, box)
            for scale in image.prepared.scales
            for flip in ((False, True) if self.config.flip else (False,))
            for box in self._boxes(scale)
        ]

    def _boxes(self, scale: np.ndarray) -> list[Rectangle]:
        height, width = scale.shape[:2]
        if self.config.window_size is None:
            return [Rectangle(0, 0, height, width)]
        return list_windows((height, width), self.config.window_size, self.config.window_stride)

    def _forward(self, batch: list[Crop]) -> Iterator[CropPrediction]:
        """Yield the prediction for each crop of a batch."""
        images, padding = pad_images(
            [crop.pixels() for crop in batch], self.model.size_divisor, self._padded_size(batch)
        )
        with torch.no_grad(), autocast(self.device, self.precision):
            final = self.forward(images.to(self.device), padding.to(self.device))
        for index, crop in enumerate(batch):
            yield CropPrediction(final.image(index), _size(images), crop.box.size)

    def _padded_size(self, batch: list[Crop]) -> tuple[int, int] | None:
        """Return the size to which a batch must be padded; None is the least one that the model takes."""
        pad = self.config.pad_size
        height, width = batch[0].box.size
        if self.model.fixed_size or pad is None:
            return self.model.fixed_size
        divisor = self.model.size_divisor
        return (
            -(-max(height, pad[0]) // divisor) * divisor,
            -(-max(width, pad[1]) // divisor) * divisor,
        )

    def _add(self, crop: Crop, prediction: CropPrediction) -> None:
        """Add the prediction for a crop to those of its image.

        Class scores are summed as they arrive, so only the prediction of one crop is in memory at a time.
        """
        image = crop.image
        image.missing -= 1
        complete: CropPrediction | SemanticScores
        if self.config.window_size is None:
            complete = prediction._replace(flipped=crop.flip)
        else:
            image.windows = image.windows or WindowMean(crop.scale.shape[:2], len(self._boxes(crop.scale)))
            image.windows.add(crop.box, class_scores(prediction))
            if image.windows.missing:
                return
            complete = image.windows.mean()._replace(flipped=crop.flip)
            image.windows = None
        if image.mean is None:
            image.predictions.append(complete)
            return
        at_output = self.config.semantic_resolution == "output"
        image.mean.add(class_scores(complete, image.mean.output_size if at_output else None))
        if not image.missing:
            image.predictions.append(image.mean.mean())

    def _decided_inside(self, model: ExportedModel, prepared: Prepared) -> Segmentation:
        """Return the result for one image from a file that holds the decision."""
        (scale,) = prepared.scales
        images, padding = pad_images([torch.from_numpy(scale).permute(2, 0, 1)], size=model.fixed_size)
        result = model.decide(images, padding, scale.shape[:2], prepared.pixels.shape[:2])
        result.image = prepared.pixels
        return result

    def _decide(
        self, predictions: Sequence[CropPrediction | SemanticScores], task: Task, pixels: np.ndarray
    ) -> Segmentation:
        categories, size = self.model.categories, pixels.shape[:2]
        result = segment(
            predictions,
            task,
            output_size=size,
            categories=categories,
            config=self.config,
            confidence_map=self.confidence,
        )
        result.image = pixels
        if task in self.nothing_found:
            self.nothing_found[task].add(result, predictions)
        return result

    def hint(self) -> str | None:
        """Return on one line what to change, if nothing was found in all images so far; None otherwise."""
        return first_hint(self.nothing_found)


def _batches(crops: Iterable[Crop], batch_size: int) -> Iterator[list[Crop]]:
    """Group neighboring crops of one size into batches."""
    batch: list[Crop] = []
    for crop in crops:
        if batch and crop.box.size != batch[0].box.size:
            yield batch
            batch = []
        batch.append(crop)
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def _size(images: Tensor) -> tuple[int, int]:
    return images.shape[-2], images.shape[-1]
