"""The small data sets of these files, computed with integers alone, so that they are the same for ever.

Every image shows a blue half (sky) over a green half (grass), a red rectangle (box) and a white one (card).
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 64
CATEGORIES = [
    {"id": 3, "name": "sky", "isthing": 0},
    {"id": 7, "name": "grass", "isthing": 0},
    {"id": 8, "name": "box", "isthing": 1},
    {"id": 20, "name": "card", "isthing": 1},
]
IDS = (3, 7, 8, 20)
COLORS = ((60, 110, 220), (40, 160, 50), (210, 40, 40), (240, 240, 240))


def scene(number):
    """Give the (64, 64) map of 0 sky, 1 grass, 2 box and 3 card."""
    scene = np.zeros((SIDE, SIDE), dtype=np.uint8)
    scene[SIDE // 2 :] = 1
    top, left = 4 + 7 * number % 17, 3 + 11 * number % 13
    scene[top : top + 14 + number % 5, left : left + 16] = 2
    top, left = 40 - 9 * number % 23, 34 + 5 * number % 11
    scene[top : top + 15, left : left + 13 + number % 4] = 3
    return scene


def pixels(number, channels=3):
    """Give the image of a scene, (64, 64, channels), with a little noise; the fourth channel is the colors' mean."""
    colors = np.array([(*color, sum(color) // 3) for color in COLORS])[:, :channels]
    rows, columns, layers = np.ogrid[:SIDE, :SIDE, :channels]
    noise = (rows * rows * 31 + columns * columns * 17 + rows * columns * 7 + layers * 13 + number * 5) % 25 - 12
    return np.clip(colors[scene(number)] + noise, 0, 255)


def write_images(folder: Path, count):
    (folder / "images").mkdir(parents=True)
    for number in range(count):
        Image.fromarray(pixels(number).astype(np.uint8)).save(folder / f"images/{number:02d}.png")


def write_panoptic(folder: Path, count=4):
    """Write images, masks and panoptic.json."""
    write_images(folder, count)
    (folder / "masks").mkdir()
    annotations = []
    for number in range(count):
        ids = scene(number) + 1
        Image.fromarray(np.stack([ids, ids * 0, ids * 0], -1)).save(folder / f"masks/{number:02d}.png")
        segments = [{"id": i, "category_id": category, "iscrowd": 0} for i, category in enumerate(IDS, 1)]
        annotations.append({"image_id": 10 + number, "file_name": f"{number:02d}.png", "segments_info": segments})
    write_json(folder / "panoptic.json", "png", annotations, CATEGORIES)


def write_labels(folder: Path, count=4):
    """Write images, and label maps in which each category has its id."""
    write_images(folder, count)
    (folder / "labels").mkdir()
    for number in range(count):
        Image.fromarray(np.array(IDS, dtype=np.uint8)[scene(number)]).save(folder / f"labels/{number:02d}.png")


def write_four_channels(folder: Path, count=4):
    """Write images of four channels with 16 bits, and instances.json."""
    (folder / "images").mkdir(parents=True)
    annotations = []
    for number in range(count):
        np.save(folder / f"images/{number:02d}.npy", (pixels(number, 4) * 16).astype(np.uint16))
        for label in (2, 3):
            mask = scene(number) == label
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 10 + number,
                    "category_id": IDS[label],
                    "iscrowd": 0,
                    "area": int(mask.sum()),
                    "segmentation": {"size": [SIDE, SIDE], "counts": run_lengths(mask)},
                }
            )
    write_json(folder / "instances.json", "npy", annotations, CATEGORIES[2:])


def write_json(file, suffix, annotations, categories):
    numbers = sorted({annotation["image_id"] - 10 for annotation in annotations})
    images = [
        {"id": 10 + number, "file_name": f"{number:02d}.{suffix}", "height": SIDE, "width": SIDE} for number in numbers
    ]
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def run_lengths(mask):
    """Count the zeros and ones of a mask in turn, down the columns, as COCO does."""
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff([0, *changes, flat.size]).tolist()
    return [0, *counts] if flat[0] else counts


def write_data(folder: Path):
    """Write all data sets, each in a folder of its own."""
    write_panoptic(folder / "panoptic")
    write_labels(folder / "labels")
    write_four_channels(folder / "four_channels")
