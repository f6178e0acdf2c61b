"""`maskwright predict` and `Predictor`: pictures in, `Segmentation`s out.

While the network sees one picture, the next one is read and the one before is written, each in a thread of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Unpack, overload

from maskwright.checkpoints.checkpoint import load_model
from maskwright.config.recipe import change_settings
from maskwright.config.schema import EvaluateConfig
from maskwright.data.images.load import MAX_PIXELS, ImageSource, find_images
from maskwright.data.images.multichannel import load_pixels
from maskwright.data.images.tiled_tiff import ArrayImage, ImageReader, open_image
from maskwright.errors import MaskwrightError
from maskwright.inference.compile import compile_forward
from maskwright.inference.pipeline import Inference
from maskwright.inference.preprocess import Prepared, prepare
from maskwright.models.segmenter import Segmenter
from maskwright.results.save import save, unique_names
from maskwright.results.segmentation import Segmentation
from maskwright.results.submission import Benchmark, open_submission
from maskwright.runtime.background import BackgroundWriter, prefetch
from maskwright.runtime.device import pick_device
from maskwright.structures.annotations import Task

LARGE = 2**24  # pixels; beside a picture with more nothing else is read or written, so that memory holds one of them

if TYPE_CHECKING:
    from typing_extensions import TypedDict

    class Choices(TypedDict, total=False, closed=True):
        """What a call may decide otherwise than the checkpoint; see `Predictor.__call__`."""

        task: Task | None
        object_threshold: float | None
        overlap_threshold: float | None
        top_k: int | None
        score_threshold: float | None
        short_side: int | None
        max_side: int | None
        scales: Sequence[float] | None
        flip: bool | None
        window: tuple[int, int] | None
        stride: tuple[int, int] | None
        tile: int | None
        tile_overlap: int | None
        tile_mask_megabytes: int | None


class Predictor:
    """A model with everything around it that turns a picture into a result.

        predictor = Predictor("model.safetensors")
        result = predictor("street.jpg")
        result.overlay().save("street_overlay.png")

    Args:
        checkpoint: a weight file of any known layout, or a model; see `build_model` for the settings of a fresh one.
        device: e.g. "cpu", "cuda:0", "mps"; None takes the machine's accelerator.
        precision: "fp32", "bf16" or "fp16".
        batch_size: pictures per forward pass; only such of equal size share one, so it never changes a result.
        compile: whether the network goes through `torch.compile`, with CUDA graphs on CUDA. For many pictures of one
            size: each new one takes minutes. Needs a C++ compiler.

    Raises:
        CheckpointError: the file cannot be used.
        MaskwrightError: the device cannot be used, or there is no compiler.
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
        self.device = pick_device(device)
        loaded = checkpoint if isinstance(checkpoint, Segmenter) else load_model(checkpoint)
        self.model: Segmenter = loaded.to(self.device).eval()
        self.precision = precision
        self.batch_size = batch_size
        self._forward = compile_forward(self.model, self.device) if compile else None

    @property
    def settings(self) -> EvaluateConfig:
        """How images are prepared and decided on: as the checkpoint says, or by the defaults for a fresh model."""
        return self.model.evaluate_config

    @overload
    def __call__(self, images: ImageSource, **choices: Unpack[Choices]) -> Segmentation: ...

    @overload
    def __call__(
        self, images: list[ImageSource] | tuple[ImageSource, ...], **choices: Unpack[Choices]
    ) -> list[Segmentation]: ...

    def __call__(
        self, images: ImageSource | list[ImageSource] | tuple[ImageSource, ...], **choices: Unpack[Choices]
    ) -> Segmentation | list[Segmentation]:
        """Segment one image, or a list of images.

        Args:
            images: path, PIL image, array (H, W) or (H, W, 3|4), tensor (3, H, W), or the bytes of a picture file; or
                a list of them. A model of pictures with other channels takes what `load_channels` takes.
            choices: each None, or left out, for what the checkpoint was made with.
                task: "semantic", "instance" or "panoptic".
                object_threshold: least class score of a panoptic segment, 0..1.
                overlap_threshold: least visible share of a panoptic segment, 0..1.
                top_k: most instances per image, or per tile.
                score_threshold: least score of an instance, 0..1.
                short_side, max_side: in pixels, what images are resized to.
                scales: sizes relative to that, whose class scores are averaged (semantic).
                flip: whether images are seen with left and right exchanged, too.
                window_size, window_stride: (height, width) in pixels of a sliding window and of its steps (semantic).
                tile_size, tile_overlap: side in pixels of the parts in which larger images are segmented, and the
                    least overlap of neighbours. Objects across seams are put together. For all: `EvaluateConfig`.
                tile_mask_megabytes: memory for the masks of all instances of an image in tiles.

        Returns:
            One result for one image, a list for a list. The instances of an image in tiles are runs, which `masks`
            makes arrays of; see `Segmentation`.

        Raises:
            ImageError: an image cannot be read.
            MaskwrightError: the model has no classes for the task, or a choice is out of range or contradicts another.
        """
        inference = self._inference(choices)
        sources = list(images) if isinstance(images, list | tuple) else [images]
        opened = ((source, _open(source, inference)) for source in sources)
        prepared = ((prepare(picture, inference.config), (source, picture)) for source, picture in opened)
        results = []
        for result, (source, picture) in inference.segment(prepared):
            result.source = str(source) if isinstance(source, str | Path) else None
            results.append(_with_image(result, picture))
        return results if isinstance(images, list | tuple) else results[0]

    def _inference(self, choices: Choices) -> Inference:
        config = change_settings(self.settings, **choices)
        return Inference(
            self.model, config, precision=self.precision, batch_size=self.batch_size, forward=self._forward
        )


def _open(source: ImageSource, inference: Inference) -> ImageReader:
    channels = inference.model.config.channels
    if inference.config.tile_size is None or channels is not None:
        return ArrayImage(load_pixels(source, channels))
    return open_image(source)


def _with_image(result: Segmentation, picture: ImageReader) -> Segmentation:
    """The result with the picture to paint it over, also where that was read in parts, unless it is too large."""
    if result.image is None and picture.size[0] * picture.size[1] <= MAX_PIXELS:
        result.image = picture.read(0, 0, *picture.size)
    return result


@dataclass
class Predictions:
    """What a run over files did.

    Attributes:
        done: images that were segmented.
        failures: (file, reason) of those that could not be.
    """

    done: int = 0
    failures: list[tuple[Path, str]] = field(default_factory=list)


def predict(
    predictor: Predictor,
    inputs: Sequence[str],
    output: Path,
    *,
    submission: Benchmark | None = None,
    on_image: Callable[[Path, int], None] | None = None,
    **choices: Unpack[Choices],
) -> Predictions:
    """Segment files, folders and globs, and write what `Segmentation.save` writes for each, or a benchmark's files.

    A picture that cannot be read does not stop the others.

    Args:
        predictor: see `Predictor`.
        inputs: files, folders (searched recursively) and globs.
        output: folder of the results.
        submission: whose files are written (see `submission`); images are called as their files are.
        on_image: called with each file, when it has been segmented or has failed, and the number of files.
        choices: as in `Predictor.__call__`.

    Raises:
        ImageError: an input names nothing.
        MaskwrightError: the model has no classes for the task, a choice is out of range, results cannot be written, or
            the submission has no place for them.
    """
    inference = predictor._inference(choices)
    paths = find_images(inputs)
    if submission is None:
        return _each(inference, paths, partial(_save, output), on_image)
    with open_submission(submission, inference.config.task, output) as files:
        return _each(inference, paths, lambda result, name, _: files.add(result, name), on_image)


def _each(
    inference: Inference,
    paths: list[Path],
    write: Callable[[Segmentation, str, ImageReader], object],
    on_image: Callable[[Path, int], None] | None,
) -> Predictions:
    summary = Predictions()
    read = (_try_read(path, name, inference) for path, name in zip(paths, unique_names(paths), strict=True))
    with BackgroundWriter() as writer:
        for result, (path, name, picture) in inference.try_segment(prefetch(read, lambda item: _is_large(item[1][2]))):
            if isinstance(result, MaskwrightError):
                summary.failures.append((path, str(result)))
            else:
                result.source = str(path)
                writer.submit(write, result, name, picture)
                summary.done += 1
                if _is_large(picture):
                    writer.flush()
            if on_image:
                on_image(path, len(paths))
    return summary


def _try_read(
    path: Path, name: str, inference: Inference
) -> tuple[Prepared | ImageReader | MaskwrightError, tuple[Path, str, ImageReader | None]]:
    try:
        picture = _open(path, inference)
        return prepare(picture, inference.config), (path, name, picture)
    except MaskwrightError as error:
        return error, (path, name, None)


def _save(output: Path, result: Segmentation, name: str, picture: ImageReader) -> None:
    save(_with_image(result, picture), output, name)


def _is_large(picture: ImageReader | None) -> bool:
    return picture is not None and picture.size[0] * picture.size[1] > LARGE
