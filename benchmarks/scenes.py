"""Synthetic annotated scenes and predictions for benchmarks of metrics: blobs over regions, from a seed.

There are no images, only annotations and what a model might predict: objects that are shifted, stretched, duplicated,
of a wrong class, missed or invented, with scores of three decimals, so that some are equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from maskwright.config.categories import load_categories
from maskwright.results.segmentation import Segmentation
from maskwright.structures.annotations import Category, Target
from maskwright.structures.id_maps import id_dtype

COCO_SIZE = (480, 640)
OBJECTS = (10, 20)  # min and max per image
DETECTIONS = 100
REGIONS = 6
CITYSCAPES_SIZE = (1024, 2048)
CITYSCAPES_DETECTIONS = 30
_UNLABELED = 0

Shape = tuple[float, float, float, float, float]  # y, x of the middle; half height, half width; phase of the outline


@dataclass
class Scene:
    """Annotations and predictions of one image of COCO's size.

    Attributes:
        image_id: integer id of the image.
        things: annotated objects, one in eight a crowd region.
        found: predicted instances.
        segments: annotated things and stuff, some pixels void.
        label_map: (H, W) int64, the class of each annotated pixel, 255 in the void; what a label image holds.
        found_segments: a panoptic prediction.
        found_classes: a semantic prediction.
    """

    image_id: int
    things: Target
    found: Segmentation
    segments: Target
    label_map: np.ndarray
    found_segments: Segmentation
    found_classes: Segmentation


def coco_scenes(count: int, seed: int) -> Iterator[Scene]:
    """Yield `count` scenes."""
    instance, panoptic = load_categories("coco_instance"), load_categories("coco_panoptic")
    for number in range(count):
        yield _coco_scene(number, np.random.default_rng([seed, number]), instance, panoptic)


def coco_things(count: int, seed: int) -> Iterator[Target]:
    """Yield only the `things` of the same scenes, which takes less time."""
    classes = len(load_categories("coco_instance"))
    for number in range(count):
        shapes, labels, crowd = _objects(np.random.default_rng([seed, number]), classes)
        yield _visible_target(shapes, labels, crowd, number)[0]


def _objects(rng: np.random.Generator, classes: int) -> tuple[list[Shape], np.ndarray, np.ndarray]:
    """Sample shapes, labels and crowd flags of the annotated objects of a scene."""
    shapes = [_shape(rng, COCO_SIZE) for _ in range(int(rng.integers(OBJECTS[0], OBJECTS[1] + 1)))]
    return shapes, rng.integers(0, classes, len(shapes)), rng.random(len(shapes)) < 0.125


def _visible_target(
    shapes: list[Shape], labels: np.ndarray, crowd: np.ndarray, number: int
) -> tuple[Target, np.ndarray]:
    """Draw shapes over each other; return the target and the indices of the shapes that have a visible pixel."""
    ids, kept = _visible(_paint(shapes, COCO_SIZE))
    return _target(ids, labels[kept], crowd[kept], number), kept


def _coco_scene(
    number: int, rng: np.random.Generator, instance: tuple[Category, ...], panoptic: tuple[Category, ...]
) -> Scene:
    shapes, labels, crowd = _objects(rng, len(instance))
    things, kept = _visible_target(shapes, labels, crowd, number)
    found = _detections([shapes[i] for i in kept], labels[kept], len(instance), DETECTIONS, rng)
    masks = np.stack([_mask(shape, COCO_SIZE) for shape, _ in found])
    scores = rng.integers(0, 1000, len(found)).astype(np.float32) / 1000
    instances = Segmentation(
        "instance", COCO_SIZE, instance, np.array([label for _, label in found]), scores, instance_masks=masks
    )
    regions = [_region(rng, COCO_SIZE) for _ in range(REGIONS)]
    stuff = rng.choice(np.flatnonzero([not category.is_thing for category in panoptic]), REGIONS, replace=False)
    all_shapes, all_labels = [*regions, *shapes], np.append(stuff, labels)  # things are the first 80 in both lists
    segments, _ = _visible_target(all_shapes, all_labels, np.append(np.zeros(REGIONS, bool), crowd), number)
    guesses = [_moved(shape, rng) for shape in all_shapes]
    wrong = rng.random(len(all_labels)) < 0.1
    guessed = np.where(wrong & (all_labels < len(instance)), rng.integers(0, len(instance), len(wrong)), all_labels)
    ids, kept = _visible(_paint(guesses, COCO_SIZE))
    panoptic_found = Segmentation(
        "panoptic", COCO_SIZE, panoptic, guessed[kept], np.ones(len(kept), np.float32), segment_map=ids
    )
    classes = np.append(stuff[0], guessed[kept])[ids]
    semantic_found = Segmentation("semantic", COCO_SIZE, panoptic, np.unique(classes), label_map=classes)
    label_map = np.append(255, segments.labels.numpy())[segments.id_maps[0].numpy()]
    return Scene(number, things, instances, segments, label_map, panoptic_found, semantic_found)


def write_cityscapes_truth(folder: Path, count: int, seed: int) -> list[str]:
    """Write a Cityscapes folder with a val split of black images; return the names of the images."""
    images, annotations = (folder / kind / "val" / "town" for kind in ("leftImg8bit", "gtFine"))
    for place in (images, annotations):
        place.mkdir(parents=True)
    names = []
    for number in range(count):
        name, ids = f"town_{number:06d}_000019", _cityscapes_ids(np.random.default_rng([seed, number]))
        Image.new("RGB", ids.shape[::-1]).save(images / f"{name}_leftImg8bit.png")
        Image.fromarray(ids.astype(np.uint16)).save(annotations / f"{name}_gtFine_instanceIds.png")
        classes = np.where(ids < 1000, ids, ids // 1000).astype(np.uint8)
        Image.fromarray(classes).save(annotations / f"{name}_gtFine_labelIds.png")
        names.append(name)
    return names


def cityscapes_detections(target: Target, categories: tuple[Category, ...], seed: int) -> Segmentation:
    """Make predicted instances that resemble the annotated ones, with all thing classes."""
    rng, size = np.random.default_rng([seed, 1]), (int(target.id_maps.shape[1]), int(target.id_maps.shape[2]))
    things = np.flatnonzero([category.is_thing for category in categories])
    known = [i for i in range(len(target)) if categories[int(target.labels[i])].is_thing]
    masks = [np.roll(target.masks[i].numpy(), rng.integers(-8, 9, 2), (0, 1)) for i in known]
    labels = [int(target.labels[i]) for i in known]
    while len(masks) < CITYSCAPES_DETECTIONS:
        masks.append(_mask(_shape(rng, size), size))
        labels.append(int(things[len(masks) % len(things)]))
    scores = rng.integers(0, 1000, len(masks)).astype(np.float32) / 1000
    return Segmentation("instance", size, categories, np.array(labels), scores, instance_masks=np.stack(masks))


def _cityscapes_ids(rng: np.random.Generator) -> np.ndarray:
    """Return (H, W) values of an instanceIds image: road, sky, void, objects and groups."""
    classes = load_categories("cityscapes")
    things = [category.id for category in classes if category.is_thing]
    shapes = [_region(rng, CITYSCAPES_SIZE) for _ in range(REGIONS)]
    shapes += [_shape(rng, CITYSCAPES_SIZE) for _ in range(int(rng.integers(OBJECTS[0], OBJECTS[1] + 1)))]
    values = [7, 23, 11, 8, 21, _UNLABELED][:REGIONS]
    for number in range(len(shapes) - REGIONS):
        label = int(rng.choice(things))
        values.append(label * 1000 + number if rng.random() < 0.9 else label)  # without an instance id it is a group
    return np.array([7, *values])[_paint(shapes, CITYSCAPES_SIZE)]


def _detections(
    shapes: list[Shape], labels: np.ndarray, classes: int, count: int, rng: np.random.Generator
) -> list[tuple[Shape, int]]:
    """Make up to three predictions of each shape, 70 % of them with its class, and false ones up to `count`."""
    found = []
    for number in range(count):
        known = number < 3 * len(shapes)
        shape = _moved(shapes[number % len(shapes)], rng) if known else _shape(rng, COCO_SIZE)
        right = known and rng.random() < 0.7
        found.append((shape, int(labels[number % len(shapes)] if right else rng.integers(0, classes))))
    return found


def _shape(rng: np.random.Generator, size: tuple[int, int]) -> Shape:
    """Sample a shape at any position, with radii from a sixtieth to a third of the height."""
    radii = np.exp(rng.uniform(np.log(size[0] / 60), np.log(size[0] / 3), 2))
    return (
        rng.uniform(0, size[0]), rng.uniform(0, size[1]), float(radii[0]), float(radii[1]), rng.uniform(0, 6.3)
    )  # fmt: skip


def _region(rng: np.random.Generator, size: tuple[int, int]) -> Shape:
    """Sample a shape at any position, as large as half of the image."""
    return rng.uniform(0, size[0]), rng.uniform(0, size[1]), size[0] / 2, size[1] / 3, rng.uniform(0, 6.3)


def _moved(shape: Shape, rng: np.random.Generator) -> Shape:
    y, x, tall, wide, phase = shape
    down, across, taller, wider = rng.normal(0, 0.1, 4)
    return y + down * tall, x + across * wide, tall * (1 + taller), wide * (1 + wider), phase + rng.normal(0, 0.1)


def _outline(shape: Shape) -> list[tuple[float, float]]:
    """Return x, y along an ellipse with a wavy border."""
    y, x, tall, wide, phase = shape
    angle = np.linspace(0, 2 * np.pi, 80, endpoint=False)
    radius = 1 + 0.15 * np.sin(3 * angle + phase) + 0.08 * np.sin(7 * angle + 2 * phase)
    radius += 0.03 * np.sin(19 * angle + 5 * phase)
    across, down = x + wide * radius * np.cos(angle), y + tall * radius * np.sin(angle)
    return list(zip(across.tolist(), down.tolist(), strict=True))


def _mask(shape: Shape, size: tuple[int, int]) -> np.ndarray:
    """Draw a shape as a mask (H, W) bool."""
    canvas = Image.new("L", size[::-1])
    ImageDraw.Draw(canvas).polygon(_outline(shape), fill=1)
    return np.asarray(canvas).view(bool)


def _paint(shapes: list[Shape], size: tuple[int, int]) -> np.ndarray:
    """Draw shapes over each other as ids 1.., (H, W) int32; 0 is background."""
    canvas = Image.new("L", size[::-1])
    for number, shape in enumerate(shapes, 1):
        ImageDraw.Draw(canvas).polygon(_outline(shape), fill=number)
    return np.asarray(canvas).astype(np.int32)


def _visible(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Renumber ids to 1.. without gaps; also return the former id - 1 of each."""
    kept = np.unique(ids)
    kept = kept[kept > 0]
    table = np.zeros(int(ids.max()) + 1, np.int32)
    table[kept] = np.arange(1, len(kept) + 1)
    return table[ids], kept - 1


def _target(ids: np.ndarray, labels: np.ndarray, crowd: np.ndarray, image_id: int) -> Target:
    """Make a target with the smallest id type, as readers do."""
    size, ids = (ids.shape[0], ids.shape[1]), ids.astype(id_dtype(len(labels)))
    return Target(torch.from_numpy(ids)[None], torch.from_numpy(labels), torch.from_numpy(crowd), image_id, size)
