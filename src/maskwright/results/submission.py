"""Results of a whole data set in the files that benchmarks take: COCO, Cityscapes and ADE20K.

Formats: https://cocodataset.org/#format-results; the headers of cityscapesscripts/evaluation/*.py; the README of
CSAILVision/sceneparsing. What is unusual: everything is written as it comes, so a test set needs no memory, and a file
with all results appears under its name only when all are in it.
"""

from __future__ import annotations

import json
import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import PIL.Image

from maskwright.config.categories import load_categories
from maskwright.errors import MaskwrightError
from maskwright.results.save import encode_png, instance_results, panoptic_annotation, panoptic_image
from maskwright.results.segmentation import Segmentation
from maskwright.runtime.atomic_write import AtomicFile, write_files_atomically
from maskwright.structures.annotations import Category, Task

Benchmark = Literal["coco", "cityscapes", "ade20k"]


def open_submission(benchmark: Benchmark, task: Task, directory: str | Path) -> Submission:
    """A submission without an image so far.

    Args:
        benchmark: whose files are written.
        task: kind of the results.
        directory: absent or empty, as it must hold nothing else; files with all results are called after it.

    Raises:
        MaskwrightError: the benchmark takes no such results, or the folder is not empty.
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
        known = ", ".join(known for name, known in kinds if name == benchmark)
        raise MaskwrightError(f"{benchmark} takes no {task} results, but {known}; choose with --task")
    return kinds[benchmark, task](Path(directory))


class Submission(ABC):
    """Files for one benchmark and task. As a context manager, it leaves no file with all results if the block fails."""

    task: Task

    def __init__(self, directory: Path) -> None:
        if directory.is_dir() and any(directory.iterdir()):
            raise MaskwrightError(
                f"{directory}: is not empty, and a submission must hold nothing else; empty it or choose another folder"
            )
        self.directory = directory
        self.name = directory.resolve().name
        self.closed = False
        self._taken: set[int | str] = set()
        self._growing: list[AtomicFile] = []  # files with all results

    def add(self, result: Segmentation, image_id: int | str) -> None:
        """Add the result of one image.

        Args:
            result: of this submission's task, at the size of the image.
            image_id: as the annotations name the image, or the name of its file without suffix.

        Raises:
            MaskwrightError: the benchmark has no such image or other classes, or the folder cannot be written to.
            ValueError: the image was added before, the task is another, or the submission is closed.
        """
        if result.task != self.task:
            raise ValueError(f"image {image_id}: expected {self.task} results, found {result.task}")
        image = self._image(image_id)
        if self.closed or image in self._taken:
            raise ValueError(f"image {image_id}: " + ("the submission is closed" if self.closed else "added twice"))
        self._add(replace(result, categories=self._categories(result.categories)), image)
        self._taken.add(image)

    def close(self) -> None:
        """Write what only the whole gives; nothing can be added afterwards.

        Raises:
            MaskwrightError: the folder cannot be written to.
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
            for file in self._growing:
                file.discard()
        self.closed = True

    @abstractmethod
    def _add(self, result: Segmentation, image: Any) -> None: ...

    def _image(self, image_id: int | str) -> int | str:
        """The benchmark's name for an image."""
        return PurePosixPath(str(image_id)).name

    def _categories(self, categories: tuple[Category, ...]) -> tuple[Category, ...]:
        """The classes with the benchmark's ids."""
        return categories

    def _finish(self) -> None:
        for file in self._growing:
            file.publish()


class CocoInstances(Submission):
    """COCO results lists: NAME_segm.json with masks, and NAME_bbox.json with the boxes around them.

    Two files, as the COCO API takes the area of a box, where there is one, for that of the mask.
    """

    task = "instance"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._files = {key: _JsonList(directory / f"{self.name}_{kind}.json", "[") for key, kind in _COCO_KINDS.items()}
        self._growing += self._files.values()

    def _image(self, image_id: int | str) -> int:
        return _coco_number(image_id)

    def _add(self, result: Segmentation, image: int) -> None:
        for row in instance_results(result, image):
            for key, file in self._files.items():
                file.add({name: row[name] for name in ("image_id", "category_id", key, "score")})

    def _finish(self) -> None:
        for file in self._files.values():
            file.end("]\n")
        super()._finish()


_COCO_KINDS = {"segmentation": "segm", "bbox": "bbox"}


class _Panoptic(Submission):
    """A COCO panoptic json and its pictures."""

    task = "panoptic"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._annotations = _JsonList(directory / f"{self.name}.json", '{"annotations": [')
        self._growing.append(self._annotations)
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
        self._deliver()

    def _deliver(self) -> None:
        self._annotations.publish()

    def _write(self, name: str, content: bytes) -> None:
        write_files_atomically({self.directory / name: content})


class CityscapesPanoptic(_Panoptic):
    """NAME.json and the folder NAME, as Cityscapes' panoptic evaluation takes them."""

    def _image(self, image_id: int | str) -> str:
        return _cityscapes_name(image_id)

    def _categories(self, categories: tuple[Category, ...]) -> tuple[Category, ...]:
        return _cityscapes_classes(categories)


class CocoPanoptic(_Panoptic):
    """NAME.zip with NAME.json and the folder NAME, as COCO's server takes them."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._archive = _Archive(directory / f"{self.name}.zip")
        self._growing.append(self._archive)

    def _image(self, image_id: int | str) -> int:
        return _coco_number(image_id)

    def _write(self, name: str, content: bytes) -> None:
        self._archive.add(name, content)

    def _deliver(self) -> None:
        self._archive.end(self._annotations.partial, f"{self.name}.json")
        self._annotations.discard()
        self._archive.publish()


class CityscapesLabels(Submission):
    """CITY_SEQUENCE_FRAME_pred.png of every image: label ids, 0 where the result has no class."""

    task = "semantic"

    def _image(self, image_id: int | str) -> str:
        return _cityscapes_name(image_id)

    def _categories(self, categories: tuple[Category, ...]) -> tuple[Category, ...]:
        return _cityscapes_classes(categories)

    def _add(self, result: Segmentation, image: str) -> None:
        _write_labels(self.directory / f"{image}_pred.png", result, [category.id for category in result.categories])


class CityscapesInstances(Submission):
    """CITY_SEQUENCE_FRAME_pred.txt of every image, with a line for each picture in the folder `masks`."""

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
    """A picture of every image, called as it is: 1 to 150 for the classes in their order, 0 for none."""

    task = "semantic"

    def _categories(self, categories: tuple[Category, ...]) -> tuple[Category, ...]:
        if len(categories) != _ADE20K_CLASSES:
            raise MaskwrightError(
                f"a submission to ADE20K has {_ADE20K_CLASSES} classes, but the results have {len(categories)} "
                f"({categories[0].name}, ...); use a model of ADE20K"
            )
        return categories

    def _add(self, result: Segmentation, image: str) -> None:
        _write_labels(self.directory / f"{image}.png", result, list(range(1, _ADE20K_CLASSES + 1)))


_ADE20K_CLASSES = 150


def _write_labels(path: Path, result: Segmentation, values: list[int]) -> None:
    picture = result.map_labels(np.array([*values, 0], dtype=np.uint8))
    write_files_atomically({path: encode_png(PIL.Image.fromarray(picture))})


def _coco_number(image_id: int | str) -> int:
    name = PurePosixPath(str(image_id)).name
    if not name.isdecimal():
        raise MaskwrightError(
            f"image '{image_id}' has no number, and COCO names images by number; give the files their numbers as "
            "names (000000000139.jpg), or use maskwright evaluate --submission, which takes those of the json"
        )
    return int(name)


def _cityscapes_name(image_id: int | str) -> str:
    found = re.match(r".+_\d{6}_\d{6}(?=_|$)", PurePosixPath(str(image_id)).name)
    if not found:
        raise MaskwrightError(
            f"image '{image_id}' is not called like those of Cityscapes, "
            "CITY_SEQUENCE_FRAME (berlin_000000_000019_leftImg8bit.png); give the files their names back"
        )
    return found.group()


def _cityscapes_classes(categories: tuple[Category, ...]) -> tuple[Category, ...]:
    official = {category.name: category for category in load_categories("cityscapes")}
    foreign = [category.name for category in categories if category.name not in official]
    if foreign:
        raise MaskwrightError(
            f"'{foreign[0]}' is no class of Cityscapes, so it has no label id there; use a model of its classes "
            "(maskwright convert has --categories cityscapes for checkpoints without names)"
        )
    return tuple(official[category.name] for category in categories)


class _JsonList(AtomicFile):
    """A JSON file with a list that grows."""

    def __init__(self, path: Path, head: str) -> None:
        super().__init__(path)
        self._before = head

    def add(self, entry: dict[str, Any]) -> None:
        """Write one entry."""
        with self.writing() as file:
            file.write(f"{self._before}{json.dumps(entry)}".encode())
        self._before = ",\n"

    def end(self, tail: str) -> None:
        """Write what follows the list. The file is complete, but not yet published."""
        with self.writing() as file:
            file.write(((self._before if self._before != ",\n" else "") + tail).encode())
            file.flush()


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
