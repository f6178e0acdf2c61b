"""`maskwright rank`: choose the images of a folder that are worth labeling next, and show them.

The images should be uncertain (`uncertainty`) and differ from each other. So the least confident images become
candidates, and the requested number is chosen to cover all candidates, by the greedy k-center algorithm of Sener and
Savarese, "Active Learning for Convolutional Neural Networks: A Core-Set Approach" (ICLR 2018): the next image is always
the one farthest from the images chosen so far.

Only the features of the candidates are in memory, however many images are read.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import PIL.Image

from maskwright.data.images.resize import resize_to
from maskwright.data.images.tiled_tiff import ImageReader
from maskwright.data.images.warn import forget
from maskwright.errors import MaskwrightError
from maskwright.inference.exported_model import ExportedModel
from maskwright.inference.inputs import find_inputs
from maskwright.inference.pipeline import Pipeline
from maskwright.inference.predict_each import is_large
from maskwright.inference.predictor import Predictor, attach_image, open_input
from maskwright.inference.preprocess import Prepared, prepare, prepare_whole
from maskwright.inference.tiling import cut_tiles
from maskwright.inference.uncertainty import FeatureRecorder, class_uncertainty
from maskwright.results.contact_sheet import CELL, contact_sheet
from maskwright.results.own_files import RANK_COLUMNS, check_replaceable
from maskwright.results.save import encode_png
from maskwright.runtime.atomic_write import write_files_atomically
from maskwright.runtime.background import prefetch

CANDIDATES = 5  # least confident images per chosen one, but at most half of all images
MAX_SHOWN = 100  # images on the contact sheet


@dataclass
class RankedImage:
    """An image, and why it is worth labeling.

    Attributes:
        path: the image file.
        uncertainty: 0..1, see `class_uncertainty`.
        unsure_of: name of the class with the largest share of it.
        feature: (C,) float32 of length 1.
        distance: 0..2, between its feature and the closest one of another image in the list; None if it is alone.
    """

    path: Path
    uncertainty: float
    unsure_of: str
    feature: np.ndarray = field(repr=False)
    distance: float | None = None


@dataclass
class Ranking:
    """Outcome of a ranking.

    Attributes:
        images: the images to label, least confident first.
        done: number of images that were compared.
        failures: (file, reason) of images that could not be read.
    """

    images: list[RankedImage] = field(default_factory=list)
    done: int = 0
    failures: list[tuple[Path, str]] = field(default_factory=list)


def rank_files(
    predictor: Predictor,
    inputs: Sequence[str],
    output: Path,
    *,
    count: int = 20,
    on_image: Callable[[Path, int], None] | None = None,
    **options: object,
) -> Ranking:
    """Choose the images to label next, and write `rank.csv` and the contact sheet `rank.png`.

    The same images and options give the same list. An image that cannot be read does not stop the others. Both files
    are written at the end; without any image that can be read, none is.

    Args:
        predictor: see `Predictor`.
        inputs: files, folders (searched recursively) and globs.
        output: folder of the two files.
        count: number of images to choose.
        on_image: called after each file with the file and the total number of files.
        options: as for `Predictor.__call__`.

    Raises:
        ImageError: an input matches nothing.
        MaskwrightError: the count is not positive, the model has no classes for the task, an option is out of range, or
            the files cannot be written.
    """
    if count < 1:
        raise MaskwrightError(f"found {count}, expected at least 1 image", where="count")
    forget()
    table, sheet = output / "rank.csv", output / "rank.png"
    check_replaceable([table, sheet])
    if isinstance(predictor.model, ExportedModel):
        raise MaskwrightError(
            "an exported file has no features of the backbone, which are compared here",
            where=predictor.model.file.path,
            remedy="use the checkpoint",
        )
    pipeline = predictor.pipeline(confidence=False, **options)
    paths = find_inputs(inputs, output)
    ranking = Ranking()
    candidates: list[RankedImage] = []
    for path, measured in measure_images(pipeline, paths):
        if isinstance(measured, MaskwrightError):
            ranking.failures.append((path, str(measured)))
        else:
            ranking.done += 1
            candidates.append(measured)
            candidates = least_confident(candidates, CANDIDATES * count)
        if on_image:
            on_image(path, len(paths))
    ranking.images = choose(least_confident(candidates, max(count, ranking.done // 2)), count)
    if ranking.images:
        drawing = _draw(ranking.images[:MAX_SHOWN], pipeline)
        write_files_atomically({table: _encode_table(ranking.images), sheet: encode_png(drawing)})
    return ranking


def measure_images(pipeline: Pipeline, paths: Sequence[Path]) -> Iterator[tuple[Path, RankedImage | MaskwrightError]]:
    """Yield each image with its measures, or with the error if it cannot be read."""
    recorder = FeatureRecorder(pipeline.model)
    recording = Pipeline(pipeline.model, pipeline.config, precision=pipeline.precision, forward=recorder)
    opened = ((path, _open(path, pipeline)) for path in paths)
    for path, image in prefetch(opened, lambda item: not isinstance(item[1], MaskwrightError) and is_large(item[1])):
        if isinstance(image, MaskwrightError):
            yield path, image
            continue
        try:
            yield path, _measure(path, image, recording, recorder)
        except MaskwrightError as error:
            yield path, error


def least_confident(images: Sequence[RankedImage], count: int) -> list[RankedImage]:
    """Return the least confident images in order; ties are broken by path."""
    return sorted(images, key=lambda image: (-image.uncertainty, image.path))[:count]


def choose(candidates: Sequence[RankedImage], count: int) -> list[RankedImage]:
    """Return `count` images that cover the candidates, in the candidates' order, with the distances between them.

    Args:
        candidates: least confident first; the first is always chosen.
        count: positive.
    """
    if not candidates:
        return []
    features = np.stack([image.feature for image in candidates])
    chosen = [0]
    distances = _distances(features, features[0])
    while len(chosen) < min(count, len(candidates)):
        distances[chosen] = -1
        chosen.append(int(distances.argmax()))
        distances = np.minimum(distances, _distances(features, features[chosen[-1]]))
    chosen.sort()
    listed = []
    for index in chosen:
        others = [other for other in chosen if other != index]
        distance = float(_distances(features[others], features[index]).min()) if others else None
        listed.append(replace(candidates[index], distance=distance))
    return listed


def _distances(features: np.ndarray, one: np.ndarray) -> np.ndarray:
    """Return the Euclidean distances (N,) of features (N, C) to one (C,)."""
    return np.linalg.norm(features - one, axis=1)


def _open(path: Path, pipeline: Pipeline) -> ImageReader | MaskwrightError:
    try:
        return open_input(path, pipeline)
    except MaskwrightError as error:
        return error


def _measure(path: Path, image: ImageReader, pipeline: Pipeline, recorder: FeatureRecorder) -> RankedImage:
    """Measure an image; one that is larger than `tile_size` as the mean of its tiles."""
    categories, config = pipeline.model.categories, pipeline.config
    tiles = cut_tiles(image.size, config.tile_size or max(image.size), 0)
    prepared = ((prepare_whole(image.read(*tile.area), config), None) for tile in tiles)
    unsure = np.zeros(len(categories))
    for part in pipeline.predict(prepared):
        unsure += class_uncertainty(part.predictions, part.prepared.scales[0].shape[:2], categories, config)
    unsure /= len(tiles)
    return RankedImage(path, float(unsure.sum()), categories[int(unsure.argmax())].name, recorder.take())


def _encode_table(images: Sequence[RankedImage]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(RANK_COLUMNS)
    for rank, image in enumerate(images, 1):
        distance = "" if image.distance is None else f"{image.distance:.4f}"
        writer.writerow([rank, image.path, f"{image.uncertainty:.4f}", distance, image.unsure_of])
    return text.getvalue().encode("utf-8", "surrogateescape")


def _draw(images: Sequence[RankedImage], pipeline: Pipeline) -> PIL.Image.Image:
    """Draw the contact sheet: overlays with rank and name, uncertainty and class."""
    captions = [
        (f"{rank}. {image.path.name}", f"uncertainty {image.uncertainty:.2f}, mostly of {image.unsure_of}")
        for rank, image in enumerate(images, 1)
    ]
    return contact_sheet([_overlay(image.path, pipeline) for image in images], captions)


def _overlay(path: Path, pipeline: Pipeline) -> PIL.Image.Image:
    """Return the overlay of an image at about the size of a cell; gray if the file is gone by now."""
    try:
        image = open_input(path, pipeline)
        prepared = prepare(image, pipeline.config)
        if isinstance(prepared, Prepared):  # results have the size of the pixels, so only these are made small
            prepared = prepared._replace(pixels=_shrink(prepared.pixels))
        ((result, _),) = pipeline.segment([(prepared, None)])
        if not isinstance(prepared, Prepared):
            attach_image(result, image)
        overlay = result.overlay()
    except MaskwrightError:
        return PIL.Image.new("RGB", CELL, "lightgray")
    overlay.thumbnail(CELL)
    return overlay


def _shrink(pixels: np.ndarray) -> np.ndarray:
    """Return an image (H, W, C) that fits into a cell of the sheet."""
    factor = min(1.0, CELL[1] / pixels.shape[0], CELL[0] / pixels.shape[1])
    height, width = (max(1, round(side * factor)) for side in pixels.shape[:2])
    return resize_to(pixels, (height, width))
