"""Training samples against the original's dataset mappers, from files to tensors, on one core, for published recipes.

Both sides get the same files, scale, crop and flip for each sample, in alternating order; processor time is measured.
The peer does the steps of the original's mappers with Pillow, OpenCV, numpy and torch: large-scale jitter to 1024 as in
`COCOPanopticNewBaselineDatasetMapper`; short side, crop and SSD colors as in `MaskFormerSemanticDatasetMapper`, with
the transforms of detectron2 that they use. Images are synthetic: noise with the spectrum of photographs, and regions.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from benchmarks.rows import Options, Part, Row, compared
from benchmarks.timing import alternate, threads, timed
from maskwright.config.categories import load_categories
from maskwright.config.recipe import Recipe, load_recipe
from maskwright.data.build import open_dataset
from maskwright.data.loader import SampleRequest, TrainingDataset, collate
from maskwright.data.transforms import Augment, CropBox
from maskwright.errors import MaskwrightError
from maskwright.structures.annotations import Target

COCO_SIZE, COCO_SEGMENTS = (480, 640), (18, 32)
CITYSCAPES_SIZE, CITYSCAPES_REGIONS = (1024, 2048), 60
IMAGES = 2
_IGNORE = 255


def bench_data(options: Options) -> Part:
    """Time training samples of COCO panoptic and Cityscapes semantic on both sides, with one thread."""
    with threads(1), tempfile.TemporaryDirectory() as folder:
        coco, cityscapes = Path(folder) / "coco", Path(folder) / "cityscapes"
        seed = options.seed
        panoptic = load_recipe("coco-panoptic-r50", [f"data.root={coco}", f"train.seed={seed}"])
        semantic = load_recipe("cityscapes-semantic-r50", [f"data.root={cityscapes}", f"train.seed={seed}"])
        first = partial(_map_panoptic, write_coco(coco, seed), panoptic)
        second = partial(_map_semantic, write_cityscapes(cityscapes, seed), semantic, np.random.default_rng(seed))
        rounds = options.rounds or 40
        return Part([_compare(panoptic, first, rounds), _compare(semantic, second, rounds)])


def _compare(recipe: Recipe, mapper: Callable[[int, CropBox], int], rounds: int) -> Row:
    """Time both sides on the samples (epoch 0, image 0), (epoch 0, image 1), (epoch 1, image 0), ..."""
    annotated, augment = open_dataset(recipe, "train"), RecordingAugment(recipe.train.augment)
    samples = TrainingDataset(annotated, augment, recipe.train.seed)
    ours, theirs = SampleCounter(len(annotated)), SampleCounter(len(annotated))
    sides = (
        lambda: collate([samples[ours.next()]], recipe.train.augment.crop_size),
        lambda: mapper(theirs.next().index, augment.window),
    )
    timings = alternate([timed(side, time.process_time) for side in sides], rounds)
    setting = "training samples from files to tensors, 1 process, 1 thread"
    return replace(compared("data", recipe.name, setting, "mapper", timings), clock="processor")


class SampleCounter:
    """Requests one sample after the other."""

    def __init__(self, images: int) -> None:
        self.images, self.count = images, -1

    def next(self) -> SampleRequest:
        """Return the next request."""
        self.count += 1
        return SampleRequest(*divmod(self.count, self.images))


class RecordingAugment(Augment):
    """An `Augment` that records its last crop, so that the peer can use the same."""

    window: CropBox

    def sample_crop(self, target: Target, generator: np.random.Generator) -> CropBox:
        """Sample a crop and record it."""
        self.window = super().sample_crop(target, generator)
        return self.window


def _map_panoptic(files: list[tuple[Path, Path, dict]], recipe: Recipe, index: int, window: CropBox) -> int:
    """Make a sample of COCO panoptic with the steps of the original; return the number of segments."""
    (image_file, png, entry), crop = files[index], recipe.train.augment.crop_size
    image = _resized(np.asarray(Image.open(image_file).convert("RGB")), window, Image.Resampling.BILINEAR)
    image = _padded(_cropped(image, window), crop, 128)
    tensor = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
    colors = _resized(np.asarray(Image.open(png).convert("RGB")), window, Image.Resampling.NEAREST)
    colors = _padded(_cropped(colors, window), crop, 255).astype(np.uint32)
    ids = colors[..., 0] + 256 * colors[..., 1] + 256 * 256 * colors[..., 2]
    segments = [segment for segment in entry["segments_info"] if not segment["iscrowd"]]
    masks = torch.stack([torch.from_numpy(np.ascontiguousarray(ids == segment["id"])) for segment in segments])
    boxes = torch.zeros(len(masks), 4)
    columns, rows = masks.any(1), masks.any(2)
    for i in range(len(masks)):
        x, y = columns[i].nonzero()[:, 0], rows[i].nonzero()[:, 0]
        if len(x) and len(y):
            boxes[i] = torch.as_tensor([x[0], y[0], x[-1] + 1, y[-1] + 1], dtype=torch.float32)
    return len(masks) if len(tensor) else 0


def _map_semantic(
    files: list[tuple[Path, Path]], recipe: Recipe, rng: np.random.Generator, index: int, window: CropBox
) -> int:
    """Make a sample of Cityscapes with the steps of the original, from train ids; return the number of classes."""
    (image_file, label), crop = files[index], recipe.train.augment.crop_size
    image = np.asarray(Image.open(image_file).convert("RGB"))
    classes = np.asarray(Image.open(label)).astype("double")
    image = _cropped(_resized(image, window, Image.Resampling.BILINEAR), window)
    whole = F.interpolate(torch.from_numpy(classes)[None, None], (window.height, window.width), mode="nearest")
    classes = _cropped(whole[0, 0].numpy(), window)
    image = _ssd_colors(image, rng)
    tensor = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
    rows, columns = crop[0] - window.crop_height, crop[1] - window.crop_width
    tensor = F.pad(tensor, [0, columns, 0, rows], value=128).contiguous()
    numbers = F.pad(torch.as_tensor(classes.astype("long")), [0, columns, 0, rows], value=_IGNORE).contiguous().numpy()
    present = np.unique(numbers)
    masks = [torch.from_numpy(np.ascontiguousarray(numbers == one)) for one in present[present != _IGNORE]]
    return len(torch.stack(masks)) if len(tensor) else 0


def _resized(array: np.ndarray, window: CropBox, kind: Image.Resampling) -> np.ndarray:
    """Resize the whole image, as in the original."""
    return np.asarray(Image.fromarray(array).resize((window.width, window.height), kind))


def _cropped(array: np.ndarray, window: CropBox) -> np.ndarray:
    bottom, right = window.top + window.crop_height, window.left + window.crop_width
    part = array[window.top : bottom, window.left : right]
    return np.flip(part, axis=1) if window.flip else part


def _padded(array: np.ndarray, size: tuple[int, int], value: int) -> np.ndarray:
    rows, columns = size[0] - array.shape[0], size[1] - array.shape[1]
    return np.pad(array, ((0, rows), (0, columns), (0, 0)), constant_values=value)


def _ssd_colors(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Apply `ColorAugSSDTransform`: each change with probability 0.5, rounded to 8 bits each time; BGR and OpenCV."""
    cv2, image = _opencv(), np.ascontiguousarray(image[..., ::-1])
    contrast_first = rng.random() < 0.5
    if rng.random() < 0.5:
        image = _converted(image, 1, rng.uniform(-32, 32))
    contrast = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else None
    if contrast is not None and contrast_first:
        image = _converted(image, contrast, 0)
    if rng.random() < 0.5:
        hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
        hsv[..., 1] = _converted(hsv[..., 1], rng.uniform(0.5, 1.5), 0)
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
    if rng.random() < 0.5:
        hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
        hsv[..., 0] = (hsv[..., 0].astype(int) + rng.integers(-18, 19)) % 180
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
    if contrast is not None and not contrast_first:
        image = _converted(image, contrast, 0)
    return image[..., ::-1]


def _opencv() -> ModuleType:
    try:
        import cv2
    except ImportError:
        raise MaskwrightError(
            "the benchmark needs OpenCV, which is not installed", remedy="pip install opencv-python-headless"
        ) from None
    cv2.setNumThreads(1)
    return cv2


def _converted(values: np.ndarray, factor: float, shift: float) -> np.ndarray:
    return np.clip(values.astype(np.float32) * factor + shift, 0, 255).astype(np.uint8)


def write_coco(folder: Path, seed: int) -> list[tuple[Path, Path, dict]]:
    """Write a dataset in the layout of COCO 2017 panoptic; return image, PNG and annotation of each sample."""
    rng, files, images = np.random.default_rng(seed), [], []
    (folder / "train2017").mkdir(parents=True)
    masks = folder / "annotations" / "panoptic_train2017"
    masks.mkdir(parents=True)
    classes = load_categories("coco_panoptic")
    categories = [{"id": one.id, "name": one.name, "isthing": int(one.is_thing)} for one in classes]
    things = [one.id for one in classes if one.is_thing]
    for number in range(IMAGES):
        count = COCO_SEGMENTS[number % len(COCO_SEGMENTS)]
        name, (height, width) = f"{number:012d}", COCO_SIZE
        image_file, png = folder / "train2017" / f"{name}.jpg", masks / f"{name}.png"
        Image.fromarray(_photograph(COCO_SIZE, rng)).save(image_file, quality=90)
        ids = rng.choice(np.arange(1, 1 << 24), count, replace=False)
        regions = ids[_regions(COCO_SIZE, count, rng)]
        Image.fromarray(np.stack([regions >> shift & 255 for shift in (0, 8, 16)], -1).astype(np.uint8)).save(png)
        labels = rng.choice(things, count).tolist()
        segments = [
            {"id": int(i), "category_id": label, "iscrowd": 0}
            for i, label in zip(ids, labels, strict=True)
            if (regions == i).any()
        ]
        entry = {"image_id": number, "file_name": png.name, "segments_info": segments}
        images.append({"id": number, "file_name": image_file.name, "height": height, "width": width})
        files.append((image_file, png, entry))
    document = {"images": images, "annotations": [entry for *_, entry in files], "categories": categories}
    (folder / "annotations" / "panoptic_train2017.json").write_text(json.dumps(document), encoding="utf-8")
    return files


def write_cityscapes(folder: Path, seed: int) -> list[tuple[Path, Path]]:
    """Write a dataset in the layout of Cityscapes; return image and label file of each sample."""
    rng, files = np.random.default_rng(seed), []
    image_folder, label_folder = (folder / kind / "train" / "town" for kind in ("leftImg8bit", "gtFine"))
    for place in (image_folder, label_folder):
        place.mkdir(parents=True)
    used = np.array([7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33, 0], dtype=np.uint8)
    for number in range(IMAGES):
        name = f"town_{number:06d}_000019"
        image_file = image_folder / f"{name}_leftImg8bit.png"
        Image.fromarray(_photograph(CITYSCAPES_SIZE, rng)).save(image_file)
        label = label_folder / f"{name}_gtFine_labelIds.png"
        meanings = rng.choice(used, CITYSCAPES_REGIONS)
        Image.fromarray(meanings[_regions(CITYSCAPES_SIZE, CITYSCAPES_REGIONS, rng)]).save(label)
        files.append((image_file, label))
    return files


def _photograph(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Return (H, W, 3) uint8 noise whose amplitude falls with frequency, as in photographs."""
    total, (height, width) = np.zeros((*size, 3), np.float32), size
    cell = min(size)
    while cell >= 1:
        coarse = rng.normal(size=(-(-height // cell), -(-width // cell), 1)) + 0.2 * rng.normal(size=3)
        planes = [
            Image.fromarray(plane.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
            for plane in np.moveaxis(coarse + 0.15 * rng.normal(size=(*coarse.shape[:2], 3)), 2, 0)
        ]
        total += np.stack([np.asarray(plane) for plane in planes], -1) * cell**0.5
        cell //= 2
    return np.clip(128 + 55 * (total - total.mean()) / total.std(), 0, 255).astype(np.uint8)


def _regions(size: tuple[int, int], count: int, rng: np.random.Generator) -> np.ndarray:
    """Return (H, W) region ids below `count`: cells around random points, with wavy borders."""
    height, width = size
    y, x = np.mgrid[:height, :width].astype(np.float32)
    y, x = y + 9 * np.sin(x / 23) + 4 * np.sin(x / 7), x + 9 * np.sin(y / 19) + 4 * np.sin(y / 5)
    nearest, best = np.zeros(size, np.intp), np.full(size, np.inf, np.float32)
    for number, (row, column) in enumerate(rng.random((count, 2)) * size):
        distance = (y - row) ** 2 + (x - column) ** 2
        closer = distance < best
        nearest[closer], best[closer] = number, distance[closer]
    return nearest
