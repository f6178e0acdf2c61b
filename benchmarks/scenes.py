"""Annotated scenes and results that resemble them, for comparisons of scores: blobs over regions, from a seed alone.

No picture is made, only what is annotated and what a model might have found: objects that are moved, stretched, found
several times, of a wrong class, lost or invented, with scores of three decimals, so that some are equal.
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
OBJECTS = (10, 20)  # in an image, at least and at most
DETECTIONS = 100
REGIONS = 6
CITYSCAPES_SIZE = (1024, 2048)
CITYSCAPES_DETECTIONS = 30
_UNLABELED = 0

Shape = tuple[float, float, float, float, float]  # y, x of the middle; half height, half width; phase of the outline


@dataclass
class Scene:
    """One image of COCO's size: what is annotated and what was found.

    Attributes:
        image_id: number of the image.
        things: annotated objects, one in eight a crowd region.
        found: instances.
        segments: annotated things and stuff, some pixels void.
        found_segments: a panoptic result.
        found_classes: a semantic result.
    """

    image_id: int
    things: Target
    found: Segmentation
    segments: Target
    found_segments: Segmentation
    found_classes: Segmentation


def coco_scenes(count: int, seed: int) -> Iterator[Scene]:
    """`count` scenes, made one by one."""
    instance, panoptic = load_categories("coco_instance"), load_categories("coco_panoptic")
    for number in range(count):
        yield _coco_scene(number, np.random.default_rng([seed, number]), instance, panoptic)


def coco_things(count: int, seed: int) -> Iterator[Target]:
    """What is annotated in the same scenes as `things`, without the rest, which takes longer."""
    classes = len(load_categories("coco_instance"))
    for number in range(count):
        shapes, labels, crowd = _objects(np.random.default_rng([seed, number]), classes)
        yield _visible_target(shapes, labels, crowd, number)[0]


def _objects(rng: np.random.Generator, classes: int) -> tuple[list[Shape], np.ndarray, np.ndarray]:
    """Shapes, labels and crowd flags of what is annotated in one scene."""
    shapes = [_shape(rng, COCO_SIZE) for _ in range(int(rng.integers(OBJECTS[0], OBJECTS[1] + 1)))]
    return shapes, rng.integers(0, classes, len(shapes)), rng.random(len(shapes)) < 0.125


def _visible_target(
    shapes: list[Shape], labels: np.ndarray, crowd: np.ndarray, number: int
) -> tuple[Target, np.ndarray]:
    """A target of shapes painted over each other, and which of them have a pixel left."""
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
    return Scene(number, things, instances, segments, panoptic_found, semantic_found)


def write_cityscapes_truth(folder: Path, count: int, seed: int) -> list[str]:
    """A Cityscapes folder with a val split whose pictures are black; gives the names of the images."""
    pictures, annotations = (folder / kind / "val" / "town" for kind in ("leftImg8bit", "gtFine"))
    for place in (pictures, annotations):
        place.mkdir(parents=True)
    names = []
    for number in range(count):
        name, ids = f"town_{number:06d}_000019", _cityscapes_ids(np.random.default_rng([seed, number]))
        Image.new("RGB", ids.shape[::-1]).save(pictures / f"{name}_leftImg8bit.png")
        Image.fromarray(ids.astype(np.uint16)).save(annotations / f"{name}_gtFine_instanceIds.png")
        classes = np.where(ids < 1000, ids, ids // 1000).astype(np.uint8)
        Image.fromarray(classes).save(annotations / f"{name}_gtFine_labelIds.png")
        names.append(name)
    return names


def cityscapes_detections(target: Target, categories: tuple[Category, ...], seed: int) -> Segmentation:
    """Instances that resemble the annotated ones, of every class with instances, so that none is without a result."""
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
    """(H, W) values of an instance picture: road, sky, void, objects and groups."""
    classes = load_categories("cityscapes")
    things = [category.id for category in classes if category.is_thing]
    shapes = [_region(rng, CITYSCAPES_SIZE) for _ in range(REGIONS)]
    shapes += [_shape(rng, CITYSCAPES_SIZE) for _ in range(int(rng.integers(OBJECTS[0], OBJECTS[1] + 1)))]
    values = [7, 23, 11, 8, 21, _UNLABELED][:REGIONS]
    for number in range(len(shapes) - REGIONS):
        label = int(rng.choice(things))
        values.append(label * 1000 + number if rng.random() < 0.9 else label)  # without a number it is a group
    return np.array([7, *values])[_paint(shapes, CITYSCAPES_SIZE)]


def _detections(
    shapes: list[Shape], labels: np.ndarray, classes: int, count: int, rng: np.random.Generator
) -> list[tuple[Shape, int]]:
    """Up to three guesses at each shape, seven in ten of its class, and inventions up to `count`."""
    found = []
    for number in range(count):
        known = number < 3 * len(shapes)
        shape = _moved(shapes[number % len(shapes)], rng) if known else _shape(rng, COCO_SIZE)
        right = known and rng.random() < 0.7
        found.append((shape, int(labels[number % len(shapes)] if right else rng.integers(0, classes))))
    return found


def _shape(rng: np.random.Generator, size: tuple[int, int]) -> Shape:
    """Anywhere, from a sixtieth to a third of the height in radius."""
    radii = np.exp(rng.uniform(np.log(size[0] / 60), np.log(size[0] / 3), 2))
    return (
        rng.uniform(0, size[0]), rng.uniform(0, size[1]), float(radii[0]), float(radii[1]), rng.uniform(0, 6.3)
    )  # fmt: skip


def _region(rng: np.random.Generator, size: tuple[int, int]) -> Shape:
    """Anywhere, as large as half of the picture."""
    return rng.uniform(0, size[0]), rng.uniform(0, size[1]), size[0] / 2, size[1] / 3, rng.uniform(0, 6.3)


def _moved(shape: Shape, rng: np.random.Generator) -> Shape:
    y, x, tall, wide, phase = shape
    down, across, taller, wider = rng.normal(0, 0.1, 4)
    return y + down * tall, x + across * wide, tall * (1 + taller), wide * (1 + wider), phase + rng.normal(0, 0.1)


def _outline(shape: Shape) -> list[tuple[float, float]]:
    """x, y along an ellipse whose border is wavy at three lengths."""
    y, x, tall, wide, phase = shape
    angle = np.linspace(0, 2 * np.pi, 80, endpoint=False)
    radius = 1 + 0.15 * np.sin(3 * angle + phase) + 0.08 * np.sin(7 * angle + 2 * phase)
    radius += 0.03 * np.sin(19 * angle + 5 * phase)
    across, down = x + wide * radius * np.cos(angle), y + tall * radius * np.sin(angle)
    return list(zip(across.tolist(), down.tolist(), strict=True))


def _mask(shape: Shape, size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool."""
    picture = Image.new("L", size[::-1])
    ImageDraw.Draw(picture).polygon(_outline(shape), fill=1)
    return np.asarray(picture).view(bool)


def _paint(shapes: list[Shape], size: tuple[int, int]) -> np.ndarray:
    """(H, W) int32 ids 1.. of shapes painted over each other; 0 stays where there is none."""
    picture = Image.new("L", size[::-1])
    for number, shape in enumerate(shapes, 1):
        ImageDraw.Draw(picture).polygon(_outline(shape), fill=number)
    return np.asarray(picture).astype(np.int32)


def _visible(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids 1.. without gaps, and the former number less one of each."""
    kept = np.unique(ids)
    kept = kept[kept > 0]
    table = np.zeros(int(ids.max()) + 1, np.int32)
    table[kept] = np.arange(1, len(kept) + 1)
    return table[ids], kept - 1


def _target(ids: np.ndarray, labels: np.ndarray, crowd: np.ndarray, image_id: int) -> Target:
    """As readers have it: numbers are bytes where they can be."""
    size, ids = (ids.shape[0], ids.shape[1]), ids.astype(id_dtype(len(labels)))
    return Target(torch.from_numpy(ids)[None], torch.from_numpy(labels), torch.from_numpy(crowd), image_id, size)
