"""Tiny datasets on disk, and recipes for models that train on them in seconds.

Each image has a blue upper half (sky) and a green lower half (grass), with one or two red rectangles (box) and a white
one (card). The same scenes are written in each annotation format.
"""

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

from maskwright.checkpoints.checkpoint import make_checkpoint, save_checkpoint
from maskwright.config.recipe import parse_recipe
from maskwright.data.build import open_dataset, train_loader
from maskwright.models import build_model
from maskwright.runtime.device import create_accelerator
from maskwright.training.optimizer import build_optimizer
from maskwright.training.step import build_criterion, train_step

CATEGORIES = [
    {"id": 3, "name": "sky", "isthing": 0, "color": [70, 130, 180]},
    {"id": 7, "name": "grass", "isthing": 0, "color": [60, 160, 60]},
    {"id": 8, "name": "box", "isthing": 1, "color": [200, 40, 40]},
    {"id": 20, "name": "card", "isthing": 1, "color": [230, 230, 230]},
]
COLORS = {3: (60, 110, 220), 7: (40, 160, 50), 8: (210, 40, 40), 20: (240, 240, 240)}


def scene(number, size=(64, 64)):
    """Return the id map (H, W) with ids from 1, and the category id of each segment; depends on `number` only."""
    rng = np.random.default_rng(number)
    height, width = size
    ids = np.ones(size, dtype=np.int32)
    ids[height // 2 :] = 2
    categories = [3, 7]
    for category in (8, 20, 8)[: 2 + number % 2]:
        top, left = int(rng.integers(0, max(1, height - 20))), int(rng.integers(0, max(1, width - 20)))
        categories.append(category)
        ids[top : top + int(rng.integers(12, 20)), left : left + int(rng.integers(12, 20))] = len(categories)
    present = [i for i in range(1, len(categories) + 1) if (ids == i).any()]
    return np.searchsorted([0, *present], ids).astype(np.int32), [categories[i - 1] for i in present]


def scene_image(number, size=(64, 64)):
    """Render the scene as an image with a little noise."""
    ids, categories = scene(number, size)
    colors = np.array([(0, 0, 0), *(COLORS[category] for category in categories)])
    noise = np.random.default_rng(1000 + number).integers(-12, 13, (*size, 3))
    return np.clip(colors[ids] + noise, 0, 255).astype(np.uint8)


def write_images(folder: Path, count, size):
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.fromarray(scene_image(number, size)).save(folder / f"images/{number:02d}.png")
    return [
        {"id": 10 + number, "file_name": f"{number:02d}.png", "height": size[0], "width": size[1]}
        for number in range(count)
    ]


def write_panoptic(folder: Path, count=4, size=(64, 64), crowds=()):
    """Write COCO panoptic annotations; in the images `crowds`, the last segment is a crowd region."""
    images, annotations = write_images(folder, count, size), []
    (folder / "masks").mkdir(exist_ok=True)
    for number, image in enumerate(images):
        ids, categories = scene(number, size)
        Image.fromarray(np.stack([ids, ids * 0, ids * 0], -1).astype(np.uint8)).save(folder / f"masks/{number:02d}.png")
        segments = [
            {"id": i, "category_id": category, "iscrowd": int(number in crowds and i == len(categories))}
            for i, category in enumerate(categories, 1)
        ]
        annotations.append({"image_id": image["id"], "file_name": image["file_name"], "segments_info": segments})
    document = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    (folder / "panoptic.json").write_text(json.dumps(document))
    return folder


def write_instances(folder: Path, count=4, size=(64, 64), empty=(), crowd_only=()):
    """Write COCO instances as uncompressed RLE; the images `empty` have none, those in `crowd_only` only crowds."""
    images, annotations = write_images(folder, count, size), []
    for number, image in enumerate(images):
        ids, categories = scene(number, size)
        for i, category in enumerate(categories, 1):
            if category in (3, 7) or number in empty:
                continue
            mask = ids == i
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": category,
                    "iscrowd": int(number in crowd_only),
                    "area": int(mask.sum()),
                    "segmentation": {"size": list(size), "counts": rle_counts(mask)},
                }
            )
    things = [category for category in CATEGORIES if category["isthing"]]
    document = {"images": images, "annotations": annotations, "categories": things}
    (folder / "instances.json").write_text(json.dumps(document))
    return folder


def write_labels(folder: Path, count=4, size=(64, 64), ignored=()):
    """Write label maps with raw category ids; the images `ignored` are 255 everywhere."""
    write_images(folder, count, size)
    (folder / "labels").mkdir(exist_ok=True)
    for number in range(count):
        ids, categories = scene(number, size)
        labels = np.array([0, *categories], dtype=np.uint8)[ids]
        Image.fromarray(np.full_like(labels, 255) if number in ignored else labels).save(
            folder / f"labels/{number:02d}.png"
        )
    return folder


def rle_counts(mask):
    """Encode a mask as COCO's uncompressed RLE counts: column by column, zeros first."""
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff([0, *changes, flat.size]).tolist()
    return [0, *counts] if flat[0] else counts


SECTIONS = {
    "panoptic": (
        {"format": "coco_panoptic", "task": "panoptic"},
        {"images": "images", "annotations": "panoptic.json", "masks": "masks"},
    ),
    "instance": (
        {"format": "coco_instance", "task": "instance"},
        {"images": "images", "annotations": "instances.json"},
    ),
    "semantic": (
        {
            "format": "label_maps",
            "task": "semantic",
            "ignore_values": [255],
            "categories": [{"id": c["id"], "name": c["name"], "is_thing": bool(c["isthing"])} for c in CATEGORIES],
        },
        {"images": "images", "annotations": "labels"},
    ),
}


def values(folder: Path, task="panoptic", *, val=True, **changes):
    """Return the values of a recipe for one of the folders; `changes` are like train__steps=3."""
    data, split = SECTIONS[task]
    recipe = {
        "name": "tiny",
        "model": {
            "backbone": "test_resnet",
            "num_queries": 8,
            "hidden_dim": 32,
            "num_heads": 4,
            "pixel_decoder_layers": 1,
            "pixel_decoder_feedforward_dim": 32,
            "masked_decoder_layers": 2,
            "masked_decoder_feedforward_dim": 32,
        },
        "data": {**data, "root": str(folder), "train": split, "val": split if val else None},
        "train": {
            "steps": 6,
            "batch_size": 2,
            "num_workers": 0,
            "num_points": 64,
            "learning_rate": 1.0e-3,
            "backbone_lr_multiplier": 1.0,
            "max_grad_norm": 1.0,
            "log_every": 1,
            "checkpoint_every": 2,
            "augment": {"resize": "large_scale_jitter", "scale_range": [0.8, 1.25], "crop_size": [64, 64]},
        },
        "evaluate": {"task": task},
    }
    for key, value in changes.items():
        section, name = key.split("__")
        recipe[section][name] = value
    return recipe


def write_recipe(file: Path, folder: Path, task="panoptic", *, val=True, **changes):
    """Write the recipe of `values` to a YAML file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(values(folder, task, val=val, **changes)))


def recipe(folder: Path, task="panoptic", *, val=True, **changes):
    """Parse the recipe of `values`."""
    return parse_recipe(values(folder, task, val=val, **changes), "tiny")


@functools.cache
def trained_model():
    """Return a small panoptic checkpoint that finds most segments of a scene; trained once per process."""
    folder = Path(tempfile.mkdtemp(prefix="maskwright-tiny-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    wanted = recipe(
        write_panoptic(folder / "data"),
        val=False,
        train__steps=60,
        train__batch_size=2,
        train__learning_rate=2e-3,
        train__checkpoint_every=60,
        train__log_every=60,
        evaluate__object_threshold=0.4,
        evaluate__overlap_threshold=0.5,
    )
    torch.manual_seed(wanted.train.seed)
    model = build_model(wanted.model, open_dataset(wanted, "train").categories).train()
    optimizer = build_optimizer(model, wanted.train, fused=False)
    engine, criterion = create_accelerator("fp32"), build_criterion(wanted.train)
    for step, parts in zip(range(60), train_loader(wanted), strict=False):
        train_step(engine, model, optimizer, criterion, parts, wanted.train, step)
    save_checkpoint(folder / "model.safetensors", make_checkpoint(model, wanted, {}))
    return folder / "model.safetensors"
