"""`Predictor`: a checkpoint and everything needed to segment images with it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import overload

from maskwright.config.recipe import change_settings
from maskwright.config.schema import EvaluateConfig
from maskwright.data.images.load import MAX_PIXELS, ImageSource
from maskwright.data.images.multichannel import load_pixels
from maskwright.data.images.tiled_tiff import ArrayImage, ImageReader, open_image
from maskwright.errors import MaskwrightError
from maskwright.inference.compile import compile_forward
from maskwright.inference.exported_model import ExportedModel, open_model
from maskwright.inference.pipeline import Pipeline
from maskwright.models.segmenter import Segmenter
from maskwright.results.segmentation import Segmentation
from maskwright.runtime.device import pick_device

logger = logging.getLogger(__name__)


class Predictor:
    """A model that segments images of any type and size.

        predictor = Predictor("model.safetensors")
        result = predictor("street.jpg")
        result.overlay().save("street_overlay.png")

    Args:
        checkpoint: a weight file of any known layout, the name of a published model, an exported file (`.onnx` or
            `.xml`), or a model; see `build_model` for the settings of an untrained one.
        device: e.g. "cpu", "cuda:0", "mps"; None is the machine's accelerator, or the CPU for an exported file.
        precision: "fp32", "bf16" or "fp16".
        batch_size: images per forward pass. Only images of one size share a batch, so it does not change results.
        compile: run the network through `torch.compile`, with CUDA graphs on CUDA. Each new image size takes minutes to
            compile, so this is for many images of one size. Needs a C++ compiler. Slower than the plain model on CPUs.

    Raises:
        CheckpointError: the file cannot be used.
        MaskwrightError: the device or the exported file cannot be used, or there is no compiler.
    """

    def __init__(
        self,
        checkpoint: str | Path | Segmenter,
        *,
        device: str | None = None,
        precision: str = "fp32",
        batch_size: int = 1,
        compile: bool = False,
    ) -> None:
        loaded = checkpoint if isinstance(checkpoint, Segmenter) else open_model(checkpoint, device)
        if isinstance(loaded, ExportedModel) and compile:
            raise MaskwrightError("compile is for checkpoints, not for exported files", where=loaded.file.path)
        self.device = loaded.pixel_mean.device if isinstance(loaded, ExportedModel) else pick_device(device)
        self.checkpoint = None if isinstance(checkpoint, Segmenter) else checkpoint
        self.name = "model" if isinstance(checkpoint, Segmenter) else Path(checkpoint).stem
        self.model: Segmenter = loaded.to(self.device).eval()
        self.precision = precision
        self.batch_size = batch_size
        self._hinted = False
        self._forward = compile_forward(self.model, self.device) if compile else None

    @property
    def compiles(self) -> bool:
        """Whether the network runs through `torch.compile`."""
        return self._forward is not None

    @property
    def settings(self) -> EvaluateConfig:
        """The prediction options of the checkpoint, or the defaults for an untrained model."""
        return self.model.evaluate_config

    @overload
    def __call__(self, images: ImageSource, *, confidence: bool = False, **options: object) -> Segmentation: ...

    @overload
    def __call__(
        self, images: list[ImageSource] | tuple[ImageSource, ...], *, confidence: bool = False, **options: object
    ) -> list[Segmentation]: ...

    def __call__(
        self,
        images: ImageSource | list[ImageSource] | tuple[ImageSource, ...],
        *,
        confidence: bool = False,
        **options: object,
    ) -> Segmentation | list[Segmentation]:
        """Segment one image, or a list of images.

        Args:
            images: a path, a PIL image, an array (H, W) or (H, W, 3|4), a tensor (3, H, W), or the bytes of an image
                file; or a list of these. A model for images with other channels takes what `load_channels` takes.
            confidence: also compute `Segmentation.confidence`, which no other part of the result depends on.
            options: keys of a recipe's `evaluate` section, such as `task="instance"`, `score_threshold=0.5`,
                `flip=True` or `tile_size=1024`; see `EvaluateConfig` for all. None, or no value, keeps the setting of
                the checkpoint.

        If no segment passes the thresholds in any image of a call, a warning with the best scores is logged, once for
        each predictor.

        Returns:
            One result for one image, a list for a list. The instances of an image in tiles are run-length encoded;
            `Segmentation.masks` decodes them.

        Raises:
            ImageError: an image cannot be read.
            MaskwrightError: the model has no classes for the task, or an option is unknown, out of range, or
                contradicts another.
        """
        pipeline = self.pipeline(confidence=confidence, **options)
        sources = list(images) if isinstance(images, list | tuple) else [images]
        opened = ((source, open_input(source, pipeline)) for source in sources)
        prepared = ((pipeline.prepare(image), (source, image)) for source, image in opened)
        results = []
        for result, (source, image) in pipeline.segment(prepared):
            result.source = str(source) if isinstance(source, str | Path) else None
            attach_image(result, image)
            results.append(result)
        if not self._hinted and (hint := pipeline.hint()):
            self._hinted = True
            logger.warning("%s", hint)
        return results if isinstance(images, list | tuple) else results[0]

    def pipeline(self, *, confidence: bool = False, **options: object) -> Pipeline:
        """Return the pipeline for the given options; see `__call__`."""
        config = change_settings(self.settings, **options)
        batch_size = config.batch_size if options.get("batch_size") else self.batch_size
        return Pipeline(
            self.model,
            config,
            precision=self.precision,
            batch_size=batch_size,
            forward=self._forward,
            confidence=confidence,
        )


def open_input(source: ImageSource, pipeline: Pipeline) -> ImageReader:
    """Open an image for a pipeline; if it may be tiled and its format allows it, regions are read on demand."""
    channels = pipeline.model.config.channels
    if pipeline.config.tile_size is None or channels is not None:
        return ArrayImage(load_pixels(source, channels))
    return open_image(source)


def attach_image(result: Segmentation, image: ImageReader) -> None:
    """Set the image of a result, for overlays, if it was read by regions and is not too large."""
    if result.image is None and image.size[0] * image.size[1] <= MAX_PIXELS:
        result.image = image.read(0, 0, *image.size)
