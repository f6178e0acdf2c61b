"""Results of a whole dataset as the files that the servers of COCO, Cityscapes and ADE20K accept.

Formats: https://cocodataset.org/#format-results; the headers of cityscapesscripts/evaluation/*.py; the README of
CSAILVision/sceneparsing. Unusual: results are written image by image, so memory does not grow with the test
set, and a file with all results gets its final name only once it is complete.
"""

from __future__ import annotations

import json
import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import PIL.Image

from maskwright.config.categories import load_categories
from maskwright.errors import MaskwrightError
from maskwright.results.coco import instance_results, panoptic_annotation, panoptic_image
from maskwright.results.json_list import JsonList
from maskwright.results.save import encode_png
from maskwright.results.segmentation import Segmentation
from maskwright.runtime.atomic_write import AtomicFile, write_files_atomically
from maskwright.structures.annotations import Category, Task

Benchmark = Literal["coco", "cityscapes", "ade20k"]


def open_submission(benchmark: Benchmark, task: Task, directory: str | Path) -> Submission:
    """Start a submission.

    Args:
        benchmark: the server's format.
        task: kind of the results.
        directory: empty or not existing, because it must hold nothing else; files with all results get its name.

    Raises:
        MaskwrightError: the benchmark does not score this task, or the folder is not empty.
    """
    kinds = {
        ("coco", "instance"): CocoInstances,
        ("coco", "panoptic"): CocoPanoptic,
        ("cityscapes", "semantic"): CityscapesLabels,
        ("cityscapes", "instance"): CityscapesInstances,
        ("cityscapes", "panoptic"): CityscapesPanoptic,
        ("ade20k", "semantic"): Ade20kLabels,
    }
    if (benchmark, task) not in kinds:
        supported = " or ".join(kind for name, kind in kinds if name == benchmark)
        raise MaskwrightError(
            f"{benchmark} submissions are {supported}, not {task}",
            where="--submission",
            remedy="choose one with --task",
        )
    return kinds[benchmark, task](Path(directory))


class Submission(ABC):
    """Files for one benchmark and task. Used as a context manager, it publishes nothing if the block fails."""

    task: Task

    def __init__(self, directory: Path) -> None:
        if directory.is_dir() and any(directory.iterdir()):
            raise MaskwrightError(
                "the folder is not empty, and a submission must hold nothing else",
                where=directory,
                remedy="empty it or choose another folder",
            )
        self.directory = directory
        self.name = directory.resolve().name
        self.closed = False
        self._taken: set[int | str] = set()
        self._unfinished: list[AtomicFile] = []  # with all results

    def add(self, result: Segmentation, image_id: int | str) -> None:
        """Add the result of one image.

        Args:
            result: of this submission's task, at the size of the image.
            image_id: the annotations' id of the image, or its file name without suffix.

        Raises:
            MaskwrightError: the image name or the classes are not the benchmark's, or the folder is not writable.
            ValueError: the image was added before, the result is of another task, or the submission is closed.
        """
        if result.task != self.task:
            raise ValueError(f"image {image_id}: expected {self.task} results, found {result.task}")
        image = self._image(image_id)
        if self.closed or image in self._taken:
            raise ValueError(f"image {image_id}: " + ("the submission is closed" if self.closed else "added twice"))
        self._add(replace(result, categories=self._categories(result.categories)), image)
        self._taken.add(image)

    def check_names(self, image_ids: Sequence[int | str]) -> list[MaskwrightError | None]:
        """Return for each image the reason why the submission cannot contain it, else None."""
        first: dict[int | str, int | str] = {}
        found: list[MaskwrightError | None] = []
        for image_id in image_ids:
            try:
                other = first.setdefault(self._image(image_id), image_id)
                found.append(None if other is image_id else _taken_twice(image_id, other))
            except MaskwrightError as error:
                found.append(error)
        return found

    def close(self) -> None:
        """Complete and publish the files; no image can be added afterwards.

        Raises:
            MaskwrightError: the folder is not writable.
        """
        if not self.closed:
            self._finish()
            self.closed = True

    def __enter__(self) -> Submission:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            for file in self._unfinished:
                file.discard()
        self.closed = True

    @abstractmethod
    def _add(self, result: Segmentation, image: Any) -> None: ...

    def _image(self, image_id: int | str) -> int | str:
        """Return the benchmark's name of an image."""
        return PurePosixPath(str(image_id)).name

    def _categories(self, categories: tuple[Category, ...]) -> tuple[Category, ...]:
        """Return the classes with the benchmark's ids."""
        return categories

    def _finish(self) -> None:
        for file in self._unfinished:
            file.publish()


class CocoInstances(Submission):
    """COCO results lists: NAME_segm.json with masks, and NAME_bbox.json with the boxes around them.

    There are two files because the COCO API uses the area of a box, if present, instead of the mask's.
    """

    task = "instance"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._files = {key: JsonList(directory / f"{self.name}_{kind}.json", "[") for key, kind in _COCO_KINDS.items()}
        self._unfinished += self._files.values()

    def _image(self, image_id: int | str) -> int:
        return _coco_number(image_id)

    def _add(self, result: Segmentation, image: int) -> None:
        for entry in instance_results(result, image):
            for key, file in self._files.items():
                file.add({name: entry[name] for name in ("image_id", "category_id", key, "score")})

    def _finish(self) -> None:
        for file in self._files.values():
            file.end("]\n")
        super()._finish()


_COCO_KINDS = {"segmentation": "segm", "bbox": "bbox"}


class _Panoptic(Submission):
    """A COCO panoptic JSON file and its PNGs."""

    task = "panoptic"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._annotations = JsonList(directory / f"{self.name}.json", '{"annotations": [')
        self._unfinished.append(self._annotations)
        self._images: list[dict[str, Any]] = []
        self._classes: tuple[Category, ...] = ()

    def _add(self, result: Segmentation, image: int | str) -> None:
        file = f"{image:012d}.png" if isinstance(image, int) else f"{image}.png"
        self._write(f"{self.name}/{file}", encode_png(panoptic_image(result)))
        self._annotations.add(panoptic_annotation(result, image, file))
        self._images.append({"id": image, "height": int(result.size[0]), "width": int(result.size[1])})
        self._classes = result.categories

    def _finish(self) -> None:
        kinds = [{"id": c.id, "name": c.name, "isthing": int(c.is_thing)} for c in self._classes]
        self._annotations.end(f'],\n"images": {json.dumps(self._images)},\n"categories": {json.dumps(kinds)}}}\n')
        self._publish()

    def _publish(self) -> None:
        self._annotations.publish()

    def _write(self, name: str, content: bytes) -> None:
        write_files_atomically({self.directory / name: content})


class CityscapesPanoptic(_Panoptic):
    """NAME.json and the folder NAME, as Cityscapes' panoptic evaluation expects them."""

    def _image(self, image_id: int | str) -> str:
        return _cityscapes_name(image_id)

    def _categories(self, categories: tuple[Category, ...]) -> tuple[Category, ...]:
        return _cityscapes_classes(categories)


class CocoPanoptic(_Panoptic):
    """NAME.zip with NAME.json and the folder NAME, as COCO's server expects them."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._archive = _Archive(directory / f"{self.name}.zip")
        self._unfinished.append(self._archive)

    def _image(self, image_id: int | str) -> int:
        return _coco_number(image_id)

    def _write(self, name: str, content: bytes) -> None:
        self._archive.add(name, content)

    def _publish(self) -> None:
        self._archive.end(self._annotations.partial, f"{self.name}.json")
        self._annotations.discard()
        self._archive.publish()


class CityscapesLabels(Submission):
    """CITY_SEQUENCE_FRAME_pred.png of each image: label ids, 0 for pixels without a class."""

    task = "semantic"

    def _image(self, image_id: int | str) -> str:
        return _cityscapes_name(image_id)

    def _categories(self, categories: tuple[Category, ...]) -> tuple[Category, ...]:
        return _cityscapes_classes(categories)

    def _add(self, result: Segmentation, image: str) -> None:
        _write_labels(self.directory / f"{image}_pred.png", result, [category.id for category in result.categories])


class CityscapesInstances(Submission):
    """CITY_SEQUENCE_FRAME_pred.txt of each image, with a line for each PNG in the folder `masks`."""

    task = "instance"

    def _image(self, image_id: int | str) -> str:
        return _cityscapes_name(image_id)

    def _categories(self, categories: tuple[Category, ...]) -> tuple[Category, ...]:
        return _cityscapes_classes(categories)

    def _add(self, result: Segmentation, image: str) -> None:
        scores = np.ones(len(result)) if result.scores is None else result.scores
        files: dict[Path, bytes] = {}
        lines = []
        for number, (mask, label, score) in enumerate(zip(result.masks, result.labels, scores, strict=True)):
            name, category = f"masks/{image}_{number:03d}.png", result.categories[label].id
            files[self.directory / name] = encode_png(PIL.Image.fromarray(mask))
            lines.append(f"{name} {category} {float(score)!r}\n")
        write_files_atomically(files | {self.directory / f"{image}_pred.txt": "".join(lines).encode()})


class Ade20kLabels(Submission):
    """A PNG of each image, with the image's name: 1 to 150 for the classes in order, 0 for none."""

    task = "semantic"

    def _categories(self, categories: tuple[Category, ...]) -> tuple[Category, ...]:
        if len(categories) != _ADE20K_CLASSES:
            raise MaskwrightError(
                f"a submission to ADE20K has {_ADE20K_CLASSES} classes, but the results have {len(categories)} "
                f"({categories[0].name}, ...)",
                remedy="use a model trained on ADE20K",
            )
        return categories

    def _add(self, result: Segmentation, image: str) -> None:
        _write_labels(self.directory / f"{image}.png", result, list(range(1, _ADE20K_CLASSES + 1)))


_ADE20K_CLASSES = 150


def _write_labels(path: Path, result: Segmentation, values: list[int]) -> None:
    labels = result.map_labels(np.array([*values, 0], dtype=np.uint8))
    write_files_atomically({path: encode_png(PIL.Image.fromarray(labels))})


def _taken_twice(image_id: int | str, other: int | str) -> MaskwrightError:
    return MaskwrightError(
        f"the submission has one place for this image and '{other}'",
        where=f"image '{image_id}'",
        remedy="rename one of them",
    )


def _coco_number(image_id: int | str) -> int:
    name = PurePosixPath(str(image_id)).name
    if not name.isdecimal():
        raise MaskwrightError(
            "the image id is not a number, as COCO's are",
            where=f"image '{image_id}'",
            remedy="name the files by their numbers (000000000139.jpg), or use `maskwright evaluate --submission`, "
            "which takes the ids of the annotations",
        )
    return int(name)


def _cityscapes_name(image_id: int | str) -> str:
    found = re.match(r".+_\d{6}_\d{6}(?=_|$)", PurePosixPath(str(image_id)).name)
    if not found:
        raise MaskwrightError(
            "expected a Cityscapes name, CITY_SEQUENCE_FRAME (berlin_000000_000019_leftImg8bit.png)",
            where=f"image '{image_id}'",
            remedy="restore the original file names",
        )
    return found.group()


def _cityscapes_classes(categories: tuple[Category, ...]) -> tuple[Category, ...]:
    official = {category.name: category for category in load_categories("cityscapes")}
    unknown = [category.name for category in categories if category.name not in official]
    if unknown:
        raise MaskwrightError(
            f"'{unknown[0]}' is not a class of Cityscapes",
            remedy="use a model with its classes; for checkpoints without names, `maskwright convert` has --categories "
            "cityscapes",
        )
    return tuple(official[category.name] for category in categories)


class _Archive(AtomicFile):
    """A zip that grows. Its images are PNGs, and are not compressed again."""

    _zip: zipfile.ZipFile | None = None

    def discard(self) -> None:
        """Close the archive and remove it."""
        with suppress(OSError, ValueError):
            if self._zip is not None:
                self._zip.close()  # before its file is closed: zipfile would write to it when collected
        super().discard()

    def add(self, name: str, content: bytes) -> None:
        """Write one image."""
        with self._writing_zip() as archive:
            archive.writestr(name, content)

    def end(self, document: Path, name: str) -> None:
        """Add a document. The archive is complete, but not yet published."""
        with self._writing_zip() as archive:
            archive.write(document, name, zipfile.ZIP_DEFLATED)
            archive.close()

    @contextmanager
    def _writing_zip(self) -> Generator[zipfile.ZipFile]:
        with self.writing() as file:
            self._zip = self._zip or zipfile.ZipFile(file, "w")
            yield self._zip
