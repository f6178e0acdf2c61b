"""Small datasets with random content in the exact layouts of published ones, in folders and archives."""

import json
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image

SIZE = (48, 64)


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def random_image(rng):
    return rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def blocks(rng, values):
    """Return a map of 8 x 8 blocks, each with one of the values."""
    return np.kron(rng.choice(values, (SIZE[0] // 8, SIZE[1] // 8)), np.ones((8, 8), dtype=np.int64))


def cityscapes(root: Path, parts=("train", "val"), kind="gtFine", seed=0):
    """leftImg8bit and gtFine: classes of all kinds, objects, groups, and void."""
    rng = np.random.default_rng(seed)
    values = [0, 1, 4, 6, 7, 8, 9, 11, 17, 21, 23, 24, 26, 29, 33, 24000, 24001, 25003, 26000, 26001, 29000, 33012]
    for part in parts:
        for city in ("aachen", "bochum"):
            for frame in range(2):
                stem = f"{city}_{frame:06d}_000019"
                ids = blocks(rng, values)
                classes = np.where(ids < 1000, ids, ids // 1000)
                save(root / f"leftImg8bit/{part}/{city}/{stem}_leftImg8bit.png", random_image(rng))
                save(root / f"{kind}/{part}/{city}/{stem}_{kind}_labelIds.png", classes.astype(np.uint8))
                save(root / f"{kind}/{part}/{city}/{stem}_{kind}_instanceIds.png", ids.astype(np.uint16))
                save(root / f"{kind}/{part}/{city}/{stem}_{kind}_color.png", random_image(rng))
                outline = {"imgHeight": SIZE[0], "imgWidth": SIZE[1], "objects": []}
                (root / f"{kind}/{part}/{city}/{stem}_{kind}_polygons.json").write_text(json.dumps(outline))
    return root


def ade20k(root: Path, seed=0):
    """ADEChallengeData2016 with annotations_instance: objects over classes, which do not always agree."""
    rng = np.random.default_rng(seed)
    for part, count in (("training", 3), ("validation", 2)):
        for number in range(1, count + 1):
            name = f"ADE_{'train' if part == 'training' else 'val'}_{number:08d}"
            save(root / f"images/{part}/{name}.jpg", random_image(rng), quality=95)
            save(root / f"annotations/{part}/{name}.png", blocks(rng, [0, 1, 3, 8, 13, 21, 150]).astype(np.uint8))
            objects = blocks(rng, [0, 0, 0, 1, 2, 5, 255])
            classes = np.zeros(256, dtype=np.uint8)
            classes[[1, 2, 5, 255]] = rng.integers(1, 101, 4)
            colors = np.stack([classes[objects], objects, objects * 0], -1).astype(np.uint8)
            save(root / f"annotations_instance/{part}/{name}.png", colors)
    (root / "objectInfo150.txt").write_text("Idx\tRatio\n")
    return root


def coco(root: Path, seed=0):
    """COCO 2017: instance and panoptic JSON, three images each in train2017 and val2017."""
    rng = np.random.default_rng(seed)
    kinds = [(1, "person", 1), (3, "car", 1), (184, "tree-merged", 0), (187, "sky-other-merged", 0)]
    categories = [{"id": i, "name": n, "isthing": t, "supercategory": "x", "color": [i, i, i]} for i, n, t in kinds]
    for part in ("train2017", "val2017"):
        images, things, panoptic = [], [], []
        for number in range(1, 4):
            name = f"{number:012d}"
            save(root / f"{part}/{name}.jpg", random_image(rng))
            images.append({"id": number, "file_name": f"{name}.jpg", "height": SIZE[0], "width": SIZE[1]})
            ids = blocks(rng, [0, 300, 70000, 5, 9, 11])
            save(
                root / f"annotations/panoptic_{part}/{name}.png",
                np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8),
            )
            named = {300: 1, 70000: 3, 5: 184, 9: 187, 11: 1}
            segments = [
                {"id": int(i), "category_id": named[i], "iscrowd": int(i == 11), "area": int((ids == i).sum())}
                for i in np.unique(ids)
                if i
            ]
            panoptic.append({"image_id": number, "file_name": f"{name}.png", "segments_info": segments})
            for category in (1, 3):
                x, y = rng.integers(0, 30, 2).tolist()
                polygon = [[x, y, x + 20.5, y, x + 20.5, y + 10.25, x, y + 10.25]]
                thing = {"id": len(things) + 1, "image_id": number, "category_id": category, "iscrowd": 0}
                things.append(thing | {"segmentation": polygon, "bbox": [x, y, 20.5, 10.25], "area": 210.1})
        write(root / f"annotations/instances_{part}.json", images, things, [c for c in categories if c["isthing"]])
        write(root / f"annotations/panoptic_{part}.json", images, panoptic, categories)
    return root


def write(path, images, annotations, categories):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def mapillary(root: Path, seed=0):
    """Mapillary Vistas 1.2: label images count classes from 0, the panoptic JSON from 1."""
    rng = np.random.default_rng(seed)
    for part in ("training", "validation"):
        images, annotations = [], []
        for name in ("aaaa", "bbbb"):
            save(root / f"{part}/images/{name}.jpg", random_image(rng))
            ids = blocks(rng, [0, 1, 2, 3])
            named = {1: 13, 2: 55, 3: 19}  # road, car, person
            labels = np.array([65, *named.values()])[ids].astype(np.uint8)
            save(root / f"{part}/labels/{name}.png", labels)
            save(root / f"{part}/panoptic/{name}.png", np.stack([ids, ids * 0, ids * 0], -1).astype(np.uint8))
            segments = [{"id": i, "category_id": c + 1, "iscrowd": 0} for i, c in named.items() if (ids == i).any()]
            images.append({"id": name, "file_name": f"{name}.jpg", "height": SIZE[0], "width": SIZE[1]})
            annotations.append({"image_id": name, "file_name": f"{name}.png", "segments_info": segments})
        from maskwright.config.categories import load_categories

        listed = load_categories("mapillary_vistas")
        categories = [{"id": c.id + 1, "name": c.name, "isthing": int(c.is_thing)} for c in listed]
        write(root / f"{part}/panoptic/panoptic_2018.json", images, annotations, categories)
    return root


def voc(root: Path, seed=0):
    """VOCdevkit/VOC2012: objects, and borders between them, in palette images."""
    rng = np.random.default_rng(seed)
    palette = rng.integers(0, 256, 768).tolist()
    base = root / "VOCdevkit/VOC2012"
    names = [f"2007_{number:06d}" for number in range(5)]
    for name in names:
        save(base / f"JPEGImages/{name}.jpg", random_image(rng))
        objects = blocks(rng, [0, 0, 1, 2, 3])
        classes = np.array([0, 15, 7, 15])[objects]
        border = np.zeros(SIZE, dtype=bool)
        border[:, 1:] = objects[:, 1:] != objects[:, :-1]
        for folder, values in (("SegmentationObject", objects), ("SegmentationClass", classes)):
            image = Image.fromarray(np.where(border, 255, values).astype(np.uint8)).convert("P")
            image.putpalette(palette)
            (base / folder).mkdir(parents=True, exist_ok=True)
            image.save(base / f"{folder}/{name}.png")
    lists = base / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    for part, chosen in (("train", names[:3]), ("val", names[3:]), ("trainval", names)):
        (lists / f"{part}.txt").write_text("\n".join(chosen) + "\n")
    return root


def coco_stuff_10k(root: Path, seed=0):
    """COCO-Stuff 10k: label maps in MATLAB files, three images for training and one for testing."""
    rng = np.random.default_rng(seed)
    names = [f"COCO_train2014_{number:012d}" for number in range(4)]
    (root / "annotations").mkdir(parents=True)
    (root / "imageLists").mkdir()
    for name in names:
        save(root / f"images/{name}.jpg", random_image(rng))
        labels = blocks(rng, [0, 1, 13, 90, 92, 182]).astype(np.uint16)
        captions = np.array([["a street"]], dtype=object)
        matlab = {"S": labels, "captions": captions}
        scipy.io.savemat(root / f"annotations/{name}.mat", matlab, do_compression=True)
    (root / "imageLists/train.txt").write_text("\n".join(names[:3]))
    (root / "imageLists/test.txt").write_text("\n".join(names[3:]))
    return root


def yolo(root: Path, seed=0):
    """YOLO segmentation: folders train and val of images and of labels, and data.yaml."""
    rng = np.random.default_rng(seed)
    for part in ("train", "val"):
        for number in range(2):
            save(root / f"images/{part}/{number}.jpg", random_image(rng))
            (root / f"labels/{part}").mkdir(parents=True, exist_ok=True)
            (root / f"labels/{part}/{number}.txt").write_text("0 0.1 0.1 0.9 0.1 0.5 0.9\n")
    (root / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [thing]\n")
    return root


def pack(folder: Path, target: Path, kind: str, *, top: str | None = None, only: tuple[str, ...] = ()):
    """Pack a folder, or only some entries of it, into an archive; `top` is prepended to all names."""
    target.parent.mkdir(parents=True, exist_ok=True)
    chosen = [folder / name for name in only] if only else [folder]
    files = [path for part in chosen for path in ([part] if part.is_file() else sorted(part.rglob("*")))]
    names = {path: str(Path(top or "") / path.relative_to(folder)) for path in files if path.is_file()}
    if kind == "zip":
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            for path, name in names.items():
                archive.write(path, name)
    else:
        with tarfile.open(target, "w") as archive:
            for path, name in names.items():
                archive.add(path, name)
    return target


def packed_cityscapes(folder: Path, target: Path):
    """Pack the two zips of the Cityscapes site."""
    pack(folder, target / "leftImg8bit_trainvaltest.zip", "zip", only=("leftImg8bit",))
    pack(folder, target / "gtFine_trainvaltest.zip", "zip", only=("gtFine",))
    return target


def packed_ade20k(folder: Path, target: Path):
    """Pack ADEChallengeData2016.zip and annotations_instance.tar."""
    only = ("images", "annotations", "objectInfo150.txt")
    pack(folder, target / "ADEChallengeData2016.zip", "zip", top="ADEChallengeData2016", only=only)
    pack(folder, target / "annotations_instance.tar", "tar", only=("annotations_instance",))
    return target


def packed_coco(folder: Path, target: Path):
    """Pack the zips of COCO 2017; the panoptic PNGs are zips in a zip."""
    for part in ("train2017", "val2017"):
        pack(folder, target / f"{part}.zip", "zip", only=(part,))
        pack(
            folder / "annotations", target / f"inner/annotations/panoptic_{part}.zip", "zip", only=(f"panoptic_{part}",)
        )
        for kind in ("instances", "panoptic"):
            name = f"annotations/{kind}_{part}.json"
            (target / kind / "annotations").mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / name, target / kind / name)
        shutil.copy(folder / f"annotations/panoptic_{part}.json", target / "inner/annotations")
    pack(target / "instances", target / "annotations_trainval2017.zip", "zip")
    pack(target / "inner", target / "panoptic_annotations_trainval2017.zip", "zip")
    for name in ("inner", "instances", "panoptic"):
        shutil.rmtree(target / name)
    return target


def packed(folder: Path, target: Path):
    """Pack all as one zip with a top folder."""
    pack(folder, target / "set.zip", "zip", top="set")
    return target / "set.zip"


def tarred(folder: Path, target: Path):
    """Pack all as one tar."""
    return pack(folder, target / "VOCtrainval_11-May-2012.tar", "tar")
