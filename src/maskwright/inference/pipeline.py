"""Images in, `Segmentation`s out: the one way that prediction and evaluation share.

An image is seen at the sizes of `evaluate.scales`; at each as it is and, with `evaluate.flip`, also with left and right
exchanged, as a whole or through a sliding window. An image larger than `evaluate.tile_size` is cut, and each
tile goes this way as an image of its own.

Unusual: all that the network is shown, be it images, flips, windows or tiles, is one stream of pictures, of which
neighbours of one size share a forward pass. Padding is seen by the network; so a batch never changes a result.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, groupby, islice
from typing import TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from maskwright.config.schema import EvaluateConfig
from maskwright.data.images.resize import resize_image
from maskwright.data.images.tiled_tiff import ImageReader
from maskwright.errors import MaskwrightError
from maskwright.inference.merge_tiles import start_mosaic
from maskwright.inference.postprocess import segment
from maskwright.inference.preprocess import Prepared, prepare_whole
from maskwright.inference.test_time_augmentation import ClassScores, View, class_scores
from maskwright.inference.tiling import Rectangle, cut_tiles, window_starts
from maskwright.models.segmenter import Segmenter
from maskwright.results.segmentation import Segmentation
from maskwright.runtime.background import prefetch
from maskwright.runtime.device import autocast
from maskwright.structures.annotations import Task, pad_images
from maskwright.structures.predictions import MaskPrediction, PixelPrediction

Item = TypeVar("Item")
Key = TypeVar("Key")


class Inference:
    """A model and how it is used.

    Args:
        model: in evaluation mode, on its device.
        config: views, windows, tiles and thresholds.
        tasks: which results are made of each prediction; None makes that of `config`.
        precision: "fp32", "bf16" or "fp16".
        batch_size: pictures per forward pass.
        forward: gives the final prediction in the model's place (see `compile_forward`); None takes the model.

    Raises:
        MaskwrightError: the model cannot do a task.
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
    ) -> None:
        self.tasks: tuple[Task, ...] = (config.task,) if tasks is None else tuple(tasks)
        for task in self.tasks:
            model.check_task(task)
        self.model, self.config = model, config
        self.precision, self.batch_size = precision, batch_size
        self.device = next(model.parameters()).device
        self.forward = forward or (lambda images, padding: model(images, padding).final)

    def segment(self, images: Iterable[tuple[Prepared | ImageReader, Key]]) -> Iterator[tuple[Segmentation, Key]]:
        """The results in order, each at its image's size; images are taken only when they are needed.

        Args:
            images: see `prepare`; a picture that is not prepared is segmented in tiles. Each has something of the
                caller's beside it, which comes out beside the result, or beside that of each task in turn.

        Raises:
            ImageError: a part of a picture that is read in parts is damaged.
        """
        for result, key in self.try_segment(images):
            if isinstance(result, MaskwrightError):
                raise result
            yield result, key

    def try_segment(
        self, images: Iterable[tuple[Prepared | ImageReader | MaskwrightError, Key]]
    ) -> Iterator[tuple[Segmentation | MaskwrightError, Key]]:
        """As `segment`, but an error that stands in an image's place comes out in its place, and so do new ones."""
        keys: deque[Key] = deque()

        def taken() -> Iterator[Prepared | ImageReader | MaskwrightError]:
            for image, key in images:
                keys.append(key)
                yield image

        for whole, run in groupby(taken(), lambda image: isinstance(image, Prepared)):
            segment_run = self._segment_whole if whole else partial(map, self._segment_single)
            for results in segment_run(cast(Iterator, run)):
                key = keys.popleft()
                for result in results:
                    yield result, key

    def semantic_stages(self, pixels: np.ndarray) -> list[Segmentation]:
        """What the semantic layer behind each stage of the backbone says of an image (H, W, 3) uint8, fine to coarse.

        Empty for a model without such layers. The image is seen once, as a whole.
        """
        if self.model.config.semantic_attention is None:
            return []
        picture = resize_image(pixels, self.config.short_side, self.config.max_side)
        images, padding = pad_images([torch.from_numpy(picture).permute(2, 0, 1)], self.model.size_divisor)
        with torch.no_grad(), autocast(self.device, self.precision):
            maps = self.model(images.to(self.device), padding.to(self.device)).semantic_maps
        height, width = images.shape[-2:]
        views = (View(PixelPrediction(stage), (height, width), picture.shape[:2]) for stage in maps)
        size, categories = pixels.shape[:2], self.model.categories
        stages = [segment([v], "semantic", output_size=size, categories=categories, config=self.config) for v in views]
        for stage in stages:
            stage.image = pixels
        return stages

    def _segment_single(self, image: ImageReader | MaskwrightError) -> Iterator[Segmentation | MaskwrightError]:
        """The results of a picture that is cut, or the error."""
        try:
            if isinstance(image, MaskwrightError):
                raise image
            yield from self._segment_tiles(image)
        except MaskwrightError as error:
            yield error

    def _segment_tiles(self, picture: ImageReader) -> Iterator[Segmentation]:
        """The result of each task, put together from those of the tiles."""
        tile = self.config.tile_size or max(picture.size)
        overlap = tile // 8 if self.config.tile_overlap is None else self.config.tile_overlap
        tiles = cut_tiles(picture.size, tile, overlap)
        mask_bytes = self.config.tile_mask_megabytes * 10**6
        mosaics = [start_mosaic(task, picture.size, self.model.categories, mask_bytes) for task in self.tasks]
        parts = (prepare_whole(picture.read(*part.area), self.config) for part in tiles)
        for part, results in zip(tiles, self._segment_whole(prefetch(parts)), strict=True):
            for mosaic, result in zip(mosaics, results, strict=True):
                mosaic.add(part, result)
        while mosaics:
            result = mosaics.pop(0).finish()
            result.image = picture.pixels
            yield result

    def _segment_whole(self, images: Iterable[Prepared]) -> Iterator[Iterator[Segmentation]]:
        """The results of each image, one for each task, to be taken before those of the next image."""
        waiting: deque[Prepared] = deque()

        def pictures() -> Iterator[Tensor]:
            for image in images:
                waiting.append(image)
                yield from self._pictures(image)

        predictions = self._predict(pictures())
        for first in predictions:
            image = waiting.popleft()
            yield self._decide(image, self._views(image, chain((first,), predictions)))

    def _decide(self, image: Prepared, views: Iterator[View | ClassScores]) -> Iterator[Segmentation]:
        height, width = image.pixels.shape[:2]
        kept = list(views) if len(self.tasks) > 1 else views
        for task in self.tasks:
            result = segment(
                kept, task, output_size=(height, width), categories=self.model.categories, config=self.config
            )
            result.image = image.pixels
            yield result

    def _pictures(self, image: Prepared) -> Iterator[Tensor]:
        """(3, H, W) uint8 each: all that the network is shown of an image."""
        for scale, flipped in self._sights(image):
            pixels = torch.from_numpy(scale).permute(2, 0, 1)
            pixels = pixels.flip(-1) if flipped else pixels
            for window in self._windows(scale):
                yield pixels[:, window.top : window.bottom, window.left : window.right]

    def _views(self, image: Prepared, predictions: Iterator[View]) -> Iterator[View | ClassScores]:
        """What the network says about each sight of an image."""
        for scale, flipped in self._sights(image):
            windows = self._windows(scale)
            if self.config.window_size is None:
                yield next(predictions)._replace(flipped=flipped)
            else:
                yield _slide(windows, islice(predictions, len(windows)), scale.shape[:2], flipped)

    def _sights(self, image: Prepared) -> Iterator[tuple[np.ndarray, bool]]:
        """The pictures of an image, and whether they are flipped."""
        return ((scale, flipped) for scale in image.scales for flipped in (False, True)[: 1 + self.config.flip])

    def _windows(self, picture: np.ndarray) -> list[Rectangle]:
        """Where the window stands as it slides over a picture; the whole picture where there is none."""
        height, width = picture.shape[:2]
        if self.config.window_size is None:
            return [Rectangle(0, 0, height, width)]
        rows, columns = self.config.window_size
        down, across = self.config.window_stride or (round(rows * 2 / 3), round(columns * 2 / 3))
        return [
            Rectangle(top, left, min(top + rows, height), min(left + columns, width))
            for top in window_starts(height, rows, max(1, down))
            for left in window_starts(width, columns, max(1, across))
        ]

    def _predict(self, pictures: Iterable[Tensor]) -> Iterator[View]:
        """What the network says about each picture, not flipped."""
        for _, run in groupby(pictures, lambda picture: picture.shape):
            while batch := list(islice(run, self.batch_size)):
                images, padding = pad_images(batch, self.model.size_divisor)
                with torch.no_grad(), autocast(self.device, self.precision):
                    final = self.forward(images.to(self.device), padding.to(self.device))
                height, width = images.shape[-2:]
                for index, picture in enumerate(batch):
                    yield View(final.image(index), (height, width), (picture.shape[1], picture.shape[2]))


def _slide(windows: list[Rectangle], predictions: Iterable[View], size: tuple[int, int], flipped: bool) -> ClassScores:
    """The mean over windows of the scores in each place, at the size of the picture that they slid over.

    As mmseg's `slide_inference`: logits are averaged where the model has such.
    """
    total = count = torch.zeros(())
    are_logits = False
    for window, prediction in zip(windows, predictions, strict=True):
        scores = class_scores(prediction)
        are_logits = scores.are_logits
        values = scores.at_input()
        if total.ndim == 0:
            total, count = values.new_zeros(len(values), *size), values.new_zeros(size)
        place = (slice(window.top, window.bottom), slice(window.left, window.right))
        total[:, *place] += values
        count[place] += 1
    return ClassScores(total / count, are_logits, size, size, flipped)
