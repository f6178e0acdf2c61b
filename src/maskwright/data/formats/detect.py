"""What kind of data set a folder, an archive or an annotation file is, told by its layout."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import yaml

from maskwright.config.recipe import data_root
from maskwright.config.schema import CategoryConfig, DataConfig
from maskwright.data.formats.coco import read_images, read_json
from maskwright.data.formats.label_maps import read_values
from maskwright.data.images.load import is_image_name, read_id_png
from maskwright.data.problems import RaiseFirst
from maskwright.data.storage.archives import is_archive
from maskwright.data.storage.folders import File, Folder, open_folder
from maskwright.errors import DatasetError
from maskwright.structures.id_maps import present_values

_SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
_LABEL_FOLDERS = ("labels", "annotations", "masks", "annot", "label", "mask", "gt")
_IMAGE_FOLDERS = ("images", "image", "imgs", "img")
_NO_OBJECTS = ("captions_", "person_keypoints_", "image_info_", "stuff_")  # jsons of COCO without masks of objects
_SAMPLED_LABELS, _SAMPLED_NAMES, _DEPTH = 200, 20, 2
_VOID = 255

Sections = dict[str, dict[str, Any] | None]


def recognise(path: str | Path) -> DataConfig:
    """The first of `recognise_all`: the task that uses most of what is annotated."""
    return recognise_all(path)[0]


def recognise_all(path: str | Path) -> list[DataConfig]:
    """How the data set at `path` would be written in a recipe for each task that it has annotations of its own for.

    Args:
        path: a folder or an archive; a folder that holds archives; a COCO json; data.yaml of a YOLO set; or a parquet
            file. A json alone becomes one split, named by what its file name says ("train" where it says nothing); its
            pictures are looked for beside it and one folder up.

    Returns:
        `data` sections for `open_annotations`, at least one, the one that uses most of what is annotated first. A task
        that needs no other files than one before it is left out, e.g. instances where there are panoptic annotations of
        the same objects. For label pictures of unknown meaning the classes are the values that occur in the first 200
        of each split, with 255 as ignore.

    Raises:
        DatasetError: there is nothing at `path`, or the layout is none that is known.
    """
    place = data_root(str(path))
    if place.is_file() and place.suffix == ".json":
        return [_from_json(place)]
    if place.is_file() and place.suffix in (".yaml", ".yml"):
        return _yolo(open_folder(place.parent), place.name) or _unknown(place, "no 'names' of classes in it")
    if place.is_file() and place.suffix == ".parquet":
        return [_config(place, {"train": {}, "val": None}, format="huggingface", task="semantic")]
    if not place.is_dir() and not is_archive(place):
        raise DatasetError(f"{place}: no such file or folder; check the path")
    root = open_folder(place, str(place))
    for known in (_hugging_face, _cityscapes, _ade20k, _coco, _mapillary, _voc, _coco_stuff, _camvid, _yolo, _jsons):
        if configs := known(root):
            return configs
    return _label_maps(root) or _unknown(place, ", ".join(root.folders()[:8]) or "no folder")


def _unknown(place: Path, found: str) -> NoReturn:
    raise DatasetError(
        f"{place}: a layout that is not known (found: {found}); expected a COCO json, a published data set, or folders "
        "like images and labels; describe it in a recipe's data section"
    )


def _config(root: Path, splits: Sections, **keys: Any) -> DataConfig:
    return DataConfig.model_validate({"root": str(root), **keys, **splits})


def _folder(root: Folder, name: str) -> Folder | None:
    """A folder as the readers look for it, somewhat deeper too."""
    try:
        return root.folder(name, "")
    except DatasetError:
        return None


def _file(root: Folder, name: str) -> File | None:
    try:
        return root.file(name, "")
    except DatasetError:
        return None


def _published(root: Folder, form: str, task: str, present: dict[str, bool]) -> list[DataConfig]:
    """A format that knows where everything lies, with the splits that are there; nothing where there is none."""
    if not any(present.values()):
        return []
    splits: Sections = {name: {} if there else None for name, there in present.items()}
    return [_config(root.root, splits, format=form, task=task)]


def _cityscapes(root: Folder) -> list[DataConfig]:
    truths = {name: _folder(root, f"gtFine/{name}") for name in ("train", "val")}
    found = []
    for kind, task in (("instanceIds", "panoptic"), ("labelIds", "semantic")):
        present = {
            name: bool(truth and _folder(root, f"leftImg8bit/{name}") and _has(truth, f"_{kind}.png"))
            for name, truth in truths.items()
        }
        found += _published(root, "cityscapes", task, present)
    return found


def _has(folder: Folder, ending: str) -> bool:
    return any(name.endswith(ending) for name in folder.names())


def _ade20k(root: Folder) -> list[DataConfig]:
    if not any(_file(root, f"objectInfo150.{suffix}") for suffix in ("txt", "csv")):
        return []
    parts, found = {"train": "training", "val": "validation"}, []
    for folder, task in (("annotations_instance", "panoptic"), ("annotations", "semantic")):
        present = {
            name: bool(_folder(root, f"{folder}/{part}") and _folder(root, f"images/{part}"))
            for name, part in parts.items()
        }
        found += _published(root, "ade20k", task, present)
    return found


def _coco(root: Folder) -> list[DataConfig]:
    found = []
    for kind, task in (("panoptic", "panoptic"), ("instances", "instance")):
        present = {
            name: bool(_file(root, f"annotations/{kind}_{name}2017.json") and _folder(root, f"{name}2017"))
            for name in ("train", "val")
        }
        if task == "panoptic":
            masks = {name: _folder(root, f"panoptic_{name}2017") for name in present}
            present = {name: there and masks[name] is not None for name, there in present.items()}
        found += _published(root, "coco", task, present)
    return found


def _mapillary(root: Folder) -> list[DataConfig]:
    parts, found = {"train": "training", "val": "validation"}, []
    for inside, task in (("panoptic", "panoptic"), ("labels", "semantic")):
        present = {
            name: bool(_folder(root, f"{part}/images") and _folder(root, f"{part}/{inside}"))
            for name, part in parts.items()
        }
        wanted = "panoptic_2018.json" if task == "panoptic" else "config.json"
        is_known = bool(found) or any(_file(root, path) for path in (wanted, f"training/panoptic/{wanted}"))
        if any(present.values()) and is_known:
            found += _published(root, "mapillary", task, present)
    return found


def _voc(root: Folder) -> list[DataConfig]:
    lists = _folder(root, "ImageSets/Segmentation")
    if lists is None or _folder(root, "SegmentationClass") is None:
        return []
    present = {name: lists.find_file(f"{name}.txt") is not None for name in ("train", "val")}
    names = [name.removesuffix(".txt") for name in lists.names() if name.endswith(".txt")]
    found = []
    for task in ("panoptic", "semantic") if _folder(root, "SegmentationObject") else ("semantic",):
        if any(present.values()):
            found += _published(root, "voc", task, present)
        elif names:
            found.append(_config(root.root, {"train": {"subsets": names[:1]}, "val": None}, format="voc", task=task))
    return found


def _coco_stuff(root: Folder) -> list[DataConfig]:
    present = {
        name: bool(_file(root, f"imageLists/{part}.txt")) for name, part in (("train", "train"), ("val", "test"))
    }
    truth = _folder(root, "annotations") if any(present.values()) else None
    is_matlab = truth is not None and _has(truth, ".mat")
    return _published(root, "coco_stuff_10k", "semantic", present) if is_matlab else []


def _camvid(root: Folder) -> list[DataConfig]:
    pairs = {name: (_folder(root, name), _folder(root, f"{name}annot")) for name in _SPLITS}
    return _published(root, "camvid", "semantic", {name: all(pair) for name, pair in pairs.items()})


def _yolo(root: Folder, name: str = "data.yaml") -> list[DataConfig]:
    file = _file(root, name)
    try:
        document = yaml.safe_load(file.read().decode("utf-8-sig")) if file else None
    except (yaml.YAMLError, UnicodeDecodeError):
        return []
    if not isinstance(document, dict) or not document.get("names"):
        return []
    keys = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
    splits: Sections = {split: {} if any(document.get(key) for key in named) else None for split, named in keys.items()}
    place = root.root if name == "data.yaml" else root.root / name
    return [_config(place, splits, format="yolo", task="instance")]


def _hugging_face(root: Folder) -> list[DataConfig]:
    if root.disk is None:
        return []
    tables = root.disk / "dataset_dict.json"
    if tables.is_file():
        names = json.loads(tables.read_text("utf-8")).get("splits", [])
    elif (root.disk / "state.json").is_file():
        names = ["train"]
    else:
        folders = (root.disk, root.disk / "data")
        names = [path.name.split("-")[0].split(".")[0] for folder in folders for path in folder.glob("*.parquet")]
    if not names:
        return []
    splits: Sections = {
        split: {} if set(names) & set(known) or (split == "train" and not _is_split(names)) else None
        for split, known in _SPLITS.items()
    }
    return [_config(root.root, splits, format="huggingface", task="semantic")]


def _is_split(names: list[str]) -> bool:
    return any(name in known for name in names for known in _SPLITS.values())


def _from_json(path: Path) -> DataConfig:
    for folder in (path.parent, path.parent.parent):
        root = open_folder(folder)
        section = _json_split(File(str(path)), path.relative_to(folder).as_posix(), root)
        if section is not None:
            return _json_config(root, section[0], {_split_of(path.stem): section[1]})
    raise DatasetError(
        f"{path}: {_what_is_absent(path)}, neither beside it nor up to {_DEPTH} folders below the one above; put "
        "them there, or describe the data set in a recipe's data section"
    )


def _what_is_absent(path: Path) -> str:
    """Of a COCO json whose files are not found: its pictures, or its PNGs, with the first name."""
    file = File(str(path))
    document = read_json(file, "the annotations")
    names = [image.name for image in read_images(document, file, RaiseFirst())]
    if not names:
        return "it lists no pictures, so none were found"
    if not any(_holder(open_folder(folder), names[:_SAMPLED_NAMES]) for folder in (path.parent, path.parent.parent)):
        return f"its pictures are not found, the first is {names[0]}"
    pngs = [entry.get("file_name") for entry in document["annotations"] if isinstance(entry, dict)]
    return f"its panoptic PNGs are not found, the first is {pngs[0]}"


def _jsons(root: Folder) -> list[DataConfig]:
    """COCO jsons of any name, at the top or in `annotations`."""
    splits: dict[str, Sections] = {}
    for folder in _folders(root, 1):
        if folder.path not in (root.path, "annotations"):
            continue
        for name in folder.names():
            if "/" in name or not name.endswith(".json") or name.startswith(_NO_OBJECTS):
                continue
            path = f"{folder.path}/{name}" if folder.path else name
            try:
                section = _json_split(folder.file(name, ""), path, root)
            except DatasetError:
                continue
            if section is not None:
                splits.setdefault(section[0], {}).setdefault(_split_of(name), section[1])
    return [_json_config(root, kind, splits[kind]) for kind in sorted(splits, reverse=True)]  # panoptic comes first


def _json_config(root: Folder, kind: str, splits: Sections) -> DataConfig:
    task = "panoptic" if kind == "coco_panoptic" else "instance"
    return _config(root.root, splits, format=kind, task=task)


def _json_split(file: File, path: str, root: Folder) -> tuple[str, dict[str, str]] | None:
    """(format, split) of a COCO json whose pictures lie below `root`; None where they do not."""
    document = read_json(file, "the annotations")
    annotations = document.get("annotations")
    first = annotations[0] if isinstance(annotations, list) and annotations else {}
    is_panoptic = isinstance(first, dict) and "segments_info" in first
    masks = None
    if is_panoptic:
        masks = root.find_folder(path.removesuffix(".json")) or _mask_folder(root, first)
        if masks is None:
            return None
    names = [entry.get("file_name") for entry in document["images"][:_SAMPLED_NAMES] if isinstance(entry, dict)]
    images = _holder(root, names, masks)
    if images is None:
        return None
    split = {"images": images.path or ".", "annotations": path}
    return ("coco_panoptic", split | {"masks": masks.path or "."}) if masks else ("coco_instance", split)


def _mask_folder(root: Folder, annotation: dict) -> Folder | None:
    """The folder whose picture has the segments of an annotation; pictures may have the names of their masks."""
    name, segments = annotation.get("file_name"), annotation["segments_info"]
    if not isinstance(name, str):
        return None
    holders = [folder for folder in _folders(root, _DEPTH) if folder.find_file(name)]
    wanted = {segment.get("id") for segment in segments if isinstance(segment, dict)} if segments else set()
    for folder in holders:
        try:
            if wanted & set(np.unique(read_id_png(folder.file(name, ""))).tolist()):
                return folder
        except DatasetError:
            continue
    return next(iter(holders), None)


def _holder(root: Folder, names: list, other: Folder | None = None) -> Folder | None:
    """The folder at or below `root`, but not `other`, that has most of the files of these relative names, if any."""
    names = [name for name in names if isinstance(name, str)]
    counted = [
        (sum(folder.find_file(name) is not None for name in names), folder)
        for folder in _folders(root, _DEPTH)
        if other is None or folder.path != other.path
    ]
    count, best = max(counted, key=lambda pair: pair[0], default=(0, root))
    return best if count else None


def _folders(root: Folder, depth: int) -> Iterator[Folder]:
    """`root` and the folders below it, the nearest first."""
    level = [root]
    for _ in range(depth + 1):
        yield from level
        level = [child for folder in level for name in folder.folders() if (child := folder.find_folder(name))]


def _split_of(name: str) -> str:
    name = name.lower()
    return next((split for split in ("val", "test", "train") if split in name), "train")


def _label_maps(root: Folder) -> list[DataConfig]:
    """Pictures and label pictures in folders of any usual name, with or without splits."""
    for images in _IMAGE_FOLDERS:
        for labels in _LABEL_FOLDERS:
            for pattern in (f"{images}/{{}}", f"{{}}/{images}"):
                splits = _present(root, pattern, pattern.replace(images, labels))
                if splits:
                    return _own_labels(root, splits)
            if _folder(root, images) and _folder(root, labels):
                return _own_labels(root, {"train": {"images": images, "annotations": labels}})
    return []


def _own_labels(root: Folder, splits: dict[str, dict[str, str]]) -> list[DataConfig]:
    values: set[int] = set()
    for split in splits.values():
        folder = root.folder(split["annotations"], "annotations")
        names = [name for name in folder.names() if is_image_name(name)][:_SAMPLED_LABELS]
        for file in folder.files(names):
            if file is not None:
                with contextlib.suppress(DatasetError):  # told when all files are read
                    values.update(present_values(read_values(file)).tolist())
    if not values:
        return []
    classes = [CategoryConfig(id=value, name=f"class {value}", is_thing=False) for value in sorted(values - {_VOID})]
    classes = classes or [CategoryConfig(id=0, name="class 0", is_thing=False)]
    keys = {"format": "label_maps", "task": "semantic", "categories": tuple(classes), "ignore_values": (_VOID,)}
    return [_config(root.root, dict(splits), **keys)]


def _present(root: Folder, images: str, annotations: str) -> dict[str, dict[str, str]]:
    """The splits whose two folders exist; {} in the patterns is the split's name."""
    found: dict[str, dict[str, str]] = {}
    for split, names in _SPLITS.items():
        for name in names:
            pair = {"images": images.format(name), "annotations": annotations.format(name)}
            if all(_folder(root, folder) for folder in pair.values()):
                found.setdefault(split, pair)
    return found
