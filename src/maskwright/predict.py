"""`maskwright predict` and `Predictor`: pictures in, `Segmentation`s out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Unpack, overload

import numpy as np
import torch
from pydantic import ValidationError

from maskwright.checkpoint import load_model
from maskwright.data.image import ImageSource, find_images, load_image
from maskwright.data.transforms import resize_for_prediction
from maskwright.device import autocast, pick_device
from maskwright.errors import MaskwrightError
from maskwright.models.mask2former import Mask2Former
from maskwright.postprocess import segment
from maskwright.recipe import EvaluateConfig
from maskwright.results import save, unique_names
from maskwright.structures import Segmentation, Task, pad_images

if TYPE_CHECKING:
    from typing_extensions import TypedDict

    class Choices(TypedDict, total=False, closed=True):
        """What a call may decide otherwise than the checkpoint; see `Predictor.__call__`."""

        task: Task | None
        object_threshold: float | None
        overlap_threshold: float | None
        top_k: int | None
        score_threshold: float | None


logger = logging.getLogger(__name__)


class Predictor:
    """A model with everything around it that turns a picture into a result.

        predictor = Predictor("model.safetensors")
        result = predictor("street.jpg")
        result.overlay().save("street_overlay.png")

    Args:
        checkpoint: a weight file of any known layout, or a loaded model.
        device: e.g. "cpu", "cuda:0", "mps"; None takes the machine's accelerator.
        precision: "fp32", "bf16" or "fp16".
        batch_size: images per forward pass; only images of equal size share one, so it never changes a result.

    Raises:
        CheckpointError: the file cannot be used.
        MaskwrightError: the device cannot be used.
    """

    def __init__(
        self,
        checkpoint: str | Path | Mask2Former,
        *,
        device: str | None = None,
        precision: str = "fp32",
        batch_size: int = 1,
    ) -> None:
        self.device = pick_device(device)
        loaded = checkpoint if isinstance(checkpoint, Mask2Former) else load_model(checkpoint)
        self.model: Mask2Former = loaded.to(self.device).eval()
        self.precision = precision
        self.batch_size = batch_size

    @property
    def settings(self) -> EvaluateConfig:
        """How the checkpoint says images are prepared and decided on."""
        return self.model.evaluate_config

    @overload
    def __call__(self, images: ImageSource, **choices: Unpack[Choices]) -> Segmentation: ...

    @overload
    def __call__(
        self, images: list[ImageSource] | tuple[ImageSource, ...], **choices: Unpack[Choices]
    ) -> list[Segmentation]: ...

    def __call__(
        self,
        images: ImageSource | list[ImageSource] | tuple[ImageSource, ...],
        *,
        task: Task | None = None,
        object_threshold: float | None = None,
        overlap_threshold: float | None = None,
        top_k: int | None = None,
        score_threshold: float | None = None,
    ) -> Segmentation | list[Segmentation]:
        """Segment one image, or a list of images.

        Args:
            images: path, PIL image, array (H, W) or (H, W, 3|4), tensor (3, H, W), or the bytes of a picture file; or
                a list of them.
            task: "semantic", "instance" or "panoptic"; None takes what the checkpoint was made for.
            object_threshold: least class score of a panoptic segment, 0..1.
            overlap_threshold: least visible share of a panoptic segment, 0..1.
            top_k: most instances per image.
            score_threshold: least score of an instance, 0..1.

        Returns:
            One result for one image, a list for a list.

        Raises:
            ImageError: an image cannot be read.
            MaskwrightError: the model has no classes for the task, or a threshold is out of range.
        """
        chosen = {
            "task": task,
            "object_threshold": object_threshold,
            "overlap_threshold": overlap_threshold,
            "top_k": top_k,
            "score_threshold": score_threshold,
        }
        values = self.settings.model_dump() | {key: value for key, value in chosen.items() if value is not None}
        try:
            config = EvaluateConfig.model_validate(values)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            key, found = ".".join(map(str, problem["loc"])), problem["input"]
            raise MaskwrightError(f"{key} is {found!r}: {problem['msg'][:1].lower()}{problem['msg'][1:]}") from None
        self.check_task(config.task)
        if isinstance(images, list | tuple):
            return list(self._segment(images, config))
        return next(self._segment([images], config))

    def check_task(self, task: Task) -> None:
        """Raise MaskwrightError where the model has no classes for the task."""
        if task == "instance" and not any(category.is_thing for category in self.model.categories):
            raise MaskwrightError(
                "this checkpoint has no thing classes, so it cannot find instances; use task semantic"
            )

    def _segment(self, sources: Sequence[ImageSource], config: EvaluateConfig) -> Iterator[Segmentation]:
        """Results in order; runs of images that have one size are batched."""
        prepared = ((source, load_image(source)) for source in sources)
        resized = ((source, image, self._resize(image, config)) for source, image in prepared)
        for _, run in groupby(resized, key=lambda item: item[2].shape):
            batch: list = []
            for item in run:
                batch.append(item)
                if len(batch) == self.batch_size:
                    yield from self._segment_batch(batch, config)
                    batch = []
            if batch:
                yield from self._segment_batch(batch, config)

    def _resize(self, image: np.ndarray, config: EvaluateConfig) -> np.ndarray:
        return resize_for_prediction(image, config.short_side, config.max_side)

    @torch.no_grad()
    def _segment_batch(self, batch: list, config: EvaluateConfig) -> Iterator[Segmentation]:
        pictures = [torch.from_numpy(resized).permute(2, 0, 1) for _, _, resized in batch]
        images, padding = pad_images(pictures)
        height, width = images.shape[-2:]
        with autocast(self.device, self.precision):
            output = self.model(images.to(self.device), padding.to(self.device))
        for index, (source, image, resized) in enumerate(batch):
            result = segment(
                output.final.image(index),
                config.task,
                padded_size=(height, width),
                input_size=resized.shape[:2],
                output_size=image.shape[:2],
                categories=self.model.categories,
                config=config,
            )
            result.image = image
            result.source = str(source) if isinstance(source, str | Path) else None
            yield result


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
    on_image: Callable[[Path, int], None] | None = None,
    **choices: Unpack[Choices],
) -> Predictions:
    """Segment files, folders and globs, and write what `Segmentation.save` writes for each.

    A picture that cannot be read does not stop the others.

    Args:
        predictor: see `Predictor`.
        inputs: files, folders (searched recursively) and globs.
        output: folder of the results.
        on_image: called with each file, before it is read, and the number of files.
        choices: task and thresholds, as in `Predictor.__call__`.

    Raises:
        ImageError: an input names nothing.
    """
    paths = find_images(inputs)
    summary = Predictions()
    for path, name in zip(paths, unique_names(paths), strict=True):
        if on_image:
            on_image(path, len(paths))
        try:
            result = predictor(path, **choices)
        except MaskwrightError as error:
            summary.failures.append((path, str(error)))
            continue
        save(result, output, name)
        summary.done += 1
    return summary
