"""Segment images with an exported file, without PyTorch. Users get it as `maskwright_runtime.Predictor`."""

from __future__ import annotations

from pathlib import Path
from typing import overload

import numpy as np

from maskwright.data.images.load import ImageSource
from maskwright.data.images.multichannel import load_pixels
from maskwright.data.images.resize import network_size, resize_to, shrink_to_fit
from maskwright.errors import MaskwrightError
from maskwright.inference.exported.decisions import read_decision
from maskwright.inference.exported.metadata import ExportMetadata
from maskwright.inference.exported.postprocess import Sizes, decide
from maskwright.inference.exported.runtimes import open_exported
from maskwright.inference.exported.settings import Settings, settings_of
from maskwright.inference.merge_tiles import start_merge
from maskwright.inference.tiling import Rectangle, cut_tiles
from maskwright.results.segmentation import Segmentation


class ExportedPredictor:
    """An exported file that segments images of any type and size, one at a time.

    Args:
        path: an `.onnx` file, or an `.xml` file with its `.bin` beside it (OpenVINO).
        device: "cpu", or "cuda" with onnxruntime-gpu; None is the CPU.

    Attributes:
        metadata: classes, sizes, thresholds and origin; see `ExportMetadata`.
        runtime: name of the library that runs the file.

    Raises:
        MaskwrightError: the file is missing, damaged or not written by maskwright, or its runtime is not installed.
    """

    def __init__(self, path: str | Path, *, device: str | None = None) -> None:
        file = open_exported(path, device)
        self.path, self.runtime, self.metadata, self._run = file.path, file.runtime, file.metadata, file.run

    @overload
    def __call__(self, images: ImageSource, **options: object) -> Segmentation: ...

    @overload
    def __call__(
        self, images: list[ImageSource] | tuple[ImageSource, ...], **options: object
    ) -> list[Segmentation]: ...

    def __call__(
        self, images: ImageSource | list[ImageSource] | tuple[ImageSource, ...], **options: object
    ) -> Segmentation | list[Segmentation]:
        """Segment one image, or a list of images.

        Args:
            images: a path, a PIL image, an array (H, W) or (H, W, 3|4), or the bytes of an image file; or a list of
                these. A file for images with other channels takes what `load_channels` takes.
            options: keys of a recipe's `evaluate` section, such as `task="instance"` or `score_threshold=0.5`; see
                `settings_of` for those that can be followed.

        Returns:
            One result for one image, a list for a list, each at the size of its image.

        Raises:
            ImageError: an image cannot be read.
            MaskwrightError: the file cannot follow an option.
        """
        if isinstance(images, list | tuple):
            return [self._predict(image, options) for image in images]
        return self._predict(images, options)

    def _predict(self, source: ImageSource, options: dict[str, object]) -> Segmentation:
        try:
            settings = settings_of(self.metadata, **options)
        except MaskwrightError as error:
            raise error.located_in(self.path) from None
        pixels = load_pixels(source, self.metadata.model.get("channels"))
        if settings.tile_size is not None and max(pixels.shape[:2]) > settings.tile_size:
            result = self._segment_tiles(pixels, settings, settings.tile_size)
        else:
            result = self._segment(pixels, settings)
        result.image = pixels
        result.source = str(source) if isinstance(source, str | Path) else None
        return result

    def _segment_tiles(self, pixels: np.ndarray, settings: Settings, side: int) -> Segmentation:
        size = pixels.shape[0], pixels.shape[1]
        merge = start_merge(settings.task, size, self.metadata.categories, settings.tile_mask_megabytes * 10**6)
        for tile in cut_tiles(size, side, settings.tile_overlap):
            rows, columns = tile.area.slices_in(Rectangle(0, 0, *size))
            merge.add(tile, self._segment(pixels[rows, columns], settings))
        return merge.finish()

    def _segment(self, pixels: np.ndarray, settings: Settings) -> Segmentation:
        padded, image_size = fit(pixels, self.metadata)
        outputs = {name: array[0] for name, array in self._run(padded[None]).items()}
        result_size = pixels.shape[0], pixels.shape[1]
        if self.metadata.contents == "result":
            return read_decision(outputs, self.metadata, image_size, result_size)
        return decide(outputs, settings, self.metadata.categories, Sizes(self.metadata.size, image_size, result_size))


def fit(pixels: np.ndarray, metadata: ExportMetadata) -> tuple[np.ndarray, tuple[int, int]]:
    """Prepare an image for a file.

    Args:
        pixels: (H, W, C) uint8 or float32.
        metadata: of the file.

    Returns:
        The input (C, H, W) float32, with the image at its top left and the mean pixel elsewhere; and the
        (height, width) of the image in it.
    """
    size = shrink_to_fit(network_size((pixels.shape[0], pixels.shape[1]), metadata.sizing), metadata.size)
    padded = np.empty((metadata.channels, *metadata.size), dtype=np.float32)
    padded[:] = np.array(metadata.pixel_mean, dtype=np.float32)[:, None, None]
    padded[:, : size[0], : size[1]] = resize_to(pixels, size).transpose(2, 0, 1)
    return padded, size
