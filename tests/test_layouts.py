"""Datasets in the layouts of published sets and of annotation projects: their splits, pairs, classes and objects.

Every image shows its own number, and so do its annotations: as the number of pixels that are not background.
"""

import itertools
import json
import re
import shutil
import zipfile
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pytest
import tifffile
from PIL import Image

from maskwright.config.schema import CategoryConfig
from maskwright.data.check.check import check
from maskwright.data.check.starting_recipe import write_starting_recipe
from maskwright.data.formats.detect import detect_layout
from maskwright.data.formats.dispatch import open_annotations
from maskwright.data.problems import ProblemCollector
from maskwright.errors import DatasetError
from tests import datasets_on_disk
from tests.test_foreign_annotations import texts

SIZE = (12, 20)


def write_image(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*SIZE, 3), 10 * number, np.uint8)).save(path)


def write_mask(path, number, value=1, row=0):
    """Write a label image in which `number` pixels of a row have a value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros(SIZE, np.uint8)
    mask[row, :number] = value
    if path.suffix == ".npy":
        np.save(path, mask)
    else:
        Image.fromarray(mask).save(path)


class Layout(NamedTuple):
    """Where the files of each split are; `{}` is the name of an image, `{k}` the number of its mask.

    Attributes:
        splits: (path of the images, path of their label images) of each split.
        expected: the splits that are found, if others.
        names: of the images.
        others: more files, by path: text, or None for a label image of another meaning.
        value: of the label images.
    """

    splits: dict[str, tuple[str, str]]
    expected: dict[str, int] | None = None
    names: tuple[str, ...] = ("1", "2")
    others: Mapping[str, str | None] = MappingProxyType({})
    value: int = 1


def both(image, label, names=("train", "val")):
    return {
        split: (image.replace("SPLIT", name), label.replace("SPLIT", name))
        for split, name in zip(("train", "val"), names, strict=True)
    }


LABEL_MAPS = {
    "words": Layout(both("SPLIT_images/{}.jpg", "SPLIT_masks/{}.png")),
    "short words": Layout(both("img_SPLIT/{}.jpg", "lab_SPLIT/{}.png")),
    "letters": Layout(both("x_SPLIT/{}.png", "y_SPLIT/{}.png")),
    "input": Layout(both("SPLIT/input/{}.jpg", "SPLIT/target/{}.png")),
    "upper case": Layout(both("SPLIT/Images/{}.JPG", "SPLIT/Masks/{}.PNG", ("TRAIN", "VAL"))),
    "one folder down": Layout(both("dataset/data/SPLIT/image/{}.jpg", "dataset/data/SPLIT/label/{}.png")),
    "file types": Layout({"train": ("images_png/{}.png", "masks_png/{}.png")}),
    "Potsdam": Layout(
        {"train": ("2_Ortho_RGB/top_{}_RGB.tif", "5_Labels_all/top_{}_label.tif")}, names=("2_10", "2_11")
    ),
    "Kvasir": Layout({"train": ("Kvasir-SEG/images/{}.jpg", "Kvasir-SEG/masks/{}.png")}, value=255),
    "ISIC 2018": Layout(
        {
            "train": (
                "ISIC2018_Task1-2_Training_Input/ISIC_{}.jpg",
                "ISIC2018_Task1_Training_GroundTruth/ISIC_{}_segmentation.png",
            ),
            "val": (
                "ISIC2018_Task1-2_Validation_Input/ISIC_{}.jpg",
                "ISIC2018_Task1_Validation_GroundTruth/ISIC_{}_segmentation.png",
            ),
        },
        value=255,
    ),
    "Carvana": Layout({"train": ("train/{}_01.jpg", "train_masks/{}_01_mask.gif")}, others={"test/3_01.jpg": None}),
    "Oxford pets": Layout(
        {"train": ("images/cat_{}.jpg", "annotations/trimaps/cat_{}.png")},
        {"train": 1, "test": 1},
        others={
            "annotations/trainval.txt": "cat_1 1 1 1\n",
            "annotations/test.txt": "cat_2 1 1 1\n",
            "annotations/list.txt": "x",
        },
    ),
    "LIP": Layout(
        both(
            "TrainVal_images/TrainVal_images/SPLIT_images/{}.jpg",
            "TrainVal_parsing_annotations/TrainVal_parsing_annotations/SPLIT_segmentations/{}.png",
        ),
        others={"TrainVal_images/train_id.txt": "1\n2\n"},
    ),
    "Massachusetts": Layout(both("tiff/SPLIT/{}.tiff", "tiff/SPLIT_labels/{}.tif"), value=255),
    "Inria": Layout(
        {"train": ("AerialImageDataset/train/images/austin{}.tif", "AerialImageDataset/train/gt/austin{}.tif")},
        others={"AerialImageDataset/test/images/bellingham3.tif": None},
        value=255,
    ),
    "DRIVE": Layout(
        {
            "train": ("training/images/{}_training.tif", "training/1st_manual/{}_manual1.gif"),
            "test": ("test/images/{}_test.tif", "test/1st_manual/{}_manual1.gif"),
        },
        others={f"{s}/mask/{n}_{s}_mask.gif": None for s, n in itertools.product(("training", "test"), ("21", "22"))},
        names=("21", "22"),
    ),
    "CHASE": Layout({"train": ("Image_0{}L.jpg", "Image_0{}L_1stHO.png")}, value=255),
    "WHU": Layout(both("SPLIT/image/{}.tif", "SPLIT/label/{}.tif"), value=255),
    "SUIM": Layout(
        {
            "train": ("train_val/images/{}.jpg", "train_val/masks/{}.bmp"),
            "test": ("TEST/images/{}.jpg", "TEST/masks/{}.bmp"),
        }
    ),
    "BDD100K": Layout(
        both("images/10k/SPLIT/{}-a.jpg", "labels/sem_seg/masks/SPLIT/{}-a.png"),
        others={f"labels/sem_seg/colormaps/{split}/{n}-a.png": None for split in ("train", "val") for n in (1, 2)},
    ),
    "FoodSeg103": Layout(
        both("Images/img_dir/SPLIT/{}.jpg", "Images/ann_dir/SPLIT/{}.png", ("train", "test")),
        {"train": 2, "test": 2},
        others={"ImageSets/train.txt": "1.jpg\n", "category_id.txt": "0\tbackground\n"},
    ),
    "UAVid": Layout(both("uavid_SPLIT/seq{}/Images/0.png", "uavid_SPLIT/seq{}/Labels/0.png")),
    "sequences": Layout({"train": ("seq{}/images/0.jpg", "seq{}/labels/0.png")}),
    "areas": Layout(
        both("SPLIT/{}/images_png/a.png", "SPLIT/{}/masks_png/a.png", ("Train", "Val")), names=("North", "South")
    ),
    "nnU-Net": Layout(
        {
            "train": ("imagesTr/case_{}_0000.png", "labelsTr/case_{}.png"),
            "test": ("imagesTs/case_{}_0000.png", "labelsTs/case_{}.png"),
        }
    ),
    "DUTS": Layout(
        {
            "train": ("DUTS-TR/DUTS-TR-Image/{}.jpg", "DUTS-TR/DUTS-TR-Mask/{}.png"),
            "test": ("DUTS-TE/DUTS-TE-Image/{}.jpg", "DUTS-TE/DUTS-TE-Mask/{}.png"),
        },
        value=255,
    ),
    "CVC-ClinicDB": Layout({"train": ("Original/{}.tif", "Ground Truth/{}.tif")}),
    "names with words": Layout({"train": ("images/img_{}.png", "masks/mask_{}.png")}),
    "KITTI": Layout(
        {"train": ("training/image_2/00_{}.png", "training/semantic/00_{}.png")},
        others={f"training/{name}/00_{n}.png": None for name in ("semantic_rgb", "instance") for n in (1, 2)},
    ),
    "drones": Layout(
        {"train": ("dataset/drones/original_images/{}.jpg", "dataset/drones/label_images_semantic/{}.png")},
        others={f"RGB_color_image_masks/RGB_color_image_masks/{n}.png": None for n in (1, 2)},
    ),
    "folders of numbers": Layout({"train": ("images/{}/1.jpg", "masks/{}/1.png")}, names=("100", "101")),
    "numbered parts": Layout({"train": ("images_{}/a.png", "masks_{}/a.png")}),
    "images at the top": Layout({"train": ("{}.jpg", "masks/{}.png")}),
    "one folder, same name": Layout(both("SPLIT/{}.jpg", "SPLIT/{}.png")),
    "one folder, suffix": Layout(both("SPLIT/a/{}.jpg", "SPLIT/a/{}_mask.png")),
    "list of names": Layout(
        {"train": ("images/a{}.jpg", "labels/a{}.png")},
        {"train": 1, "val": 1},
        others={"splits/train.txt": "a1\n", "splits/val.txt": "a2\n"},
    ),
    "list of paths": Layout(
        {"train": ("data/images/a{}.jpg", "data/labels/a{}.png")},
        {"train": 1, "val": 1},
        others={"data/train.txt": "images/a1.jpg\n", "data/val.txt": "/content/data/images/a2.jpg\n"},
    ),
    "CSV": Layout(
        {"train": ("images/a{}.jpg", "masks/a{}.png")},
        {"train": 1, "val": 1},
        others={
            "train.csv": "id,image,mask\n7,images/a1.jpg,masks/a1.png\n",
            "val.csv": "Image;Label\na2.jpg;a2.png\n",
        },
    ),
    "CSV of ids": Layout(
        {"train": ("images/{}.jpg", "masks/{}.png")},
        {"train": 1, "test": 1},
        others={"train.csv": "id\n1\n", "test.csv": "id\n2\n"},
    ),
    "list of pairs": Layout(
        {"train": ("shots/a{}.jpg", "done/b{}.png")},
        {"train": 1, "val": 1},
        others={"train_list.txt": "shots/a1.jpg done/b1.png\n", "val_list.txt": "shots/a2.jpg\tdone/b2.png\n"},
    ),
    "NPY": Layout(both("SPLIT/images/{}.jpg", "SPLIT/masks/{}.npy")),
    "VOC with lists at the top": Layout(
        {"train": ("JPEGImages/{}.jpg", "SegmentationClass/{}.png")},
        {"train": 1, "val": 1},
        others={"train.txt": "1\n", "val.txt": "2\n"},
    ),
    "lists of Windows": Layout(
        {"train": ("shots/a{}.jpg", "done/b{}.png")},
        {"train": 1, "val": 1},
        others={
            "train.csv": "image;mask\r\nshots\\a1.jpg;done\\b1.png\r\n",
            "val.txt": "shots\\a2.jpg done\\b2.png\r\n",
        },
    ),
    "one split in lists": Layout({"train": ("a/images/{}.png", "a/masks/{}.png")}, others={"a/all.txt": "1\n"}),
}


def write(root, layout):
    for split, (image, label) in layout.splits.items():
        for number, name in enumerate(layout.names, 1 if split == "train" else 5):
            write_image(root / image.format(name), number)
            write_mask(root / label.format(name), number, layout.value)
    for name, text in layout.others.items():
        if text is None:
            write_mask(root / name, 11)
        else:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
    return root


def shown_and_labeled(annotated, category):
    """Return the number that each image shows, and that of the pixels of a class in its annotations."""
    label = [entry.id for entry in annotated.categories].index(category)
    numbers = []
    for index in range(len(annotated)):
        image, target = annotated.sample(index)
        objects = target.merge_classes()
        is_class = objects.labels == label
        numbers.append((round(image[0, 0, 0] / 10), int(objects.masks[is_class].sum())))
    return numbers


@pytest.mark.parametrize("name", LABEL_MAPS)
def test_label_images_are_found_and_paired(tmp_path, name):
    layout = LABEL_MAPS[name]
    (config,) = detect_layout(write(tmp_path, layout)).configs
    assert config.format == "label_maps"
    expected = layout.expected or dict.fromkeys(layout.splits, len(layout.names))
    assert {split for split in ("train", "val", "test") if getattr(config, split)} == set(expected)
    for split, count in expected.items():
        annotated = open_annotations(config, split)
        pairs = shown_and_labeled(annotated, layout.value)
        assert len(pairs) == count
        assert all(shown == labeled for shown, labeled in pairs)
        assert len({annotated.image_id(index) for index in range(count)}) == count


MASK_FILES = {
    "Data Science Bowl": ("stage1_SPLIT/{}/images/{}.png", "stage1_SPLIT/{}/masks/m{k}.png", "instance", ("object",)),
    "folder of an image": ("images/SPLIT{}.jpg", "masks/SPLIT{}/{k}.png", "instance", ("object",)),
    "splits inside": ("images/SPLIT/{}.jpg", "masks/SPLIT/{}/{k}.png", "instance", ("object",)),
    "numbered": ("images/SPLIT_{}.jpg", "masks/SPLIT_{}_mask_{k}.png", "instance", ("object",)),
    "class in image": ("SPLIT/images/{}.jpg", "SPLIT/masks/{}/cat/{k}.png", "instance", ("cat",)),
    "image in class": ("SPLIT/images/{}.jpg", "SPLIT/masks/cat/{}/{k}.png", "instance", ("cat",)),
    "class of an image": (
        "SPLIT/images/{}.jpg",
        "SPLIT/masks/class{k}/{}.png",
        "semantic",
        ("background", "class0", "class1"),
    ),
    "name of a class": ("SPLIT/images/{}.jpg", "SPLIT/masks/{}/{word}.png", "semantic", ("background", "leaf", "stem")),
}


def write_masks(root, image, mask, names=("1", "2")):
    """Write two masks for each image, as many pixels together as the image shows, and one of them in another row."""
    for split in ("train", "val"):
        for number, name in enumerate(names, 3 if split == "train" else 7):
            write_image(root / image.replace("SPLIT", split).format(name, name), number)
            for k, word, size in ((0, "leaf", 2), (1, "stem", number - 2)):
                path = mask.replace("SPLIT", split).replace("{k}", str(k)).replace("{word}", word)
                write_mask(root / path.format(name), size, 255, row=k)
    return root


@pytest.mark.parametrize("name", MASK_FILES)
def test_masks_are_found_with_their_images_and_classes(tmp_path, name):
    image, mask, task, classes = MASK_FILES[name]
    (config,) = detect_layout(write_masks(tmp_path, image, mask)).configs
    assert (config.format, config.task) == ("mask_files", task)
    splits = ["train", "val"] if "SPLIT/" in image else ["train"]
    assert [split for split in ("train", "val", "test") if getattr(config, split)] == splits
    for split in splits:
        annotated = open_annotations(config, split)
        assert tuple(entry.name for entry in annotated.categories) == classes
        assert len(annotated) == 4 // len(splits)
        for index in range(len(annotated)):
            image, target = annotated.sample(index)
            objects = [label for label in target.labels.tolist() if classes[label] != "background"]
            assert len(objects) == 2
            areas = target.masks.flatten(1).sum(1)
            covered = sum(
                area for area, label in zip(areas, target.labels, strict=True) if classes[label] != "background"
            )
            assert int(covered) == round(image[0, 0, 0] / 10)
            assert task == "instance" or int(areas.sum()) == SIZE[0] * SIZE[1]


def test_masks_of_numbered_images_are_in_the_folder_of_the_image(tmp_path):
    for image, k in itertools.product((1, 2, 3), repeat=2):
        write_image(tmp_path / f"images/{image}.png", image)
        write_mask(tmp_path / f"masks/{image}/{k}.png", image)
    (config,) = detect_layout(tmp_path).configs
    annotated = open_annotations(config, "train")
    assert [annotated.target(index).masks.flatten(1).sum(1).tolist() for index in range(3)] == [
        [n] * 3 for n in (1, 2, 3)
    ]


def open_masks(root, problems=None, task="instance", **options):
    (config,) = detect_layout(root).configs
    return open_annotations(config.model_copy(update={"task": task, **options}), "train", problems)


def test_masks_may_overlap_and_images_have_none(tmp_path):
    for name in "abc":
        write_image(tmp_path / f"images/{name}.png", 1)
    for path, row in (("a/0", 0), ("a/1", 0), ("b/0", 2)):
        write_mask(tmp_path / f"masks/{path}.png", 5, 255, row)
    write_mask(tmp_path / "masks/b/1.png", 0)
    write_mask(tmp_path / "masks/nobody/1.png", 5)
    problems = ProblemCollector()
    annotated = open_masks(tmp_path, problems)
    targets = [annotated.sample(index)[1] for index in range(3)]
    assert [target.masks.flatten(1).sum(1).tolist() for target in targets] == [[5, 5], [5], []]
    assert "1 masks belong to no image" in texts(problems)
    assert "1 of 3 images have no masks" in texts(problems)
    assert "an empty mask" in texts(problems)
    semantic = open_masks(tmp_path, task="semantic")
    assert semantic.target(0).masks.flatten(1).sum(1).tolist() == [SIZE[0] * SIZE[1] - 5, 5]
    assert len(open_masks(tmp_path, filter_empty=True)) == 2


def test_masks_are_binary_and_as_large_as_their_image(tmp_path):
    write_masks(tmp_path, "images/SPLIT{}.png", "masks/SPLIT{}/{k}.png")
    blurred = np.zeros(SIZE, np.uint8)
    blurred[:, :5] = [255, 200, 90, 30, 5]
    annotated = open_masks(tmp_path)
    Image.fromarray(blurred).save(tmp_path / "masks/train1/0.png")
    with pytest.raises(DatasetError, match=r"train1/0\.png: has 6 values, expected two"):
        annotated.target(0)
    Image.fromarray(blurred[:5] // 255).save(tmp_path / "masks/train1/0.png")
    with pytest.raises(DatasetError, match=r"but .* has 5 x 20"):
        annotated.target(0)
    with pytest.raises(DatasetError, match="expected two"):
        detect_layout(
            write_masks(tmp_path / "gray", "images/SPLIT{}.png", "masks/SPLIT{}/{k}.png")
            and _blur(tmp_path / "gray", blurred)
        )


def _blur(root, pixels):
    for file in root.glob("masks/*/*.png"):
        Image.fromarray(pixels).save(file)
    return root


def test_classes_of_masks_are_matched_by_name(tmp_path):
    write_masks(tmp_path / "a", "images/SPLIT{}.png", "masks/SPLIT{}/Cat/{k}.png")
    classes = tuple(CategoryConfig(id=number, name=name) for number, name in ((4, "dog"), (9, "cat")))
    assert open_masks(tmp_path / "a", categories=classes).target(0).labels.tolist() == [1, 1]
    with pytest.raises(DatasetError, match=r"masks of the class 'Cat', which is not in data.categories"):
        open_masks(tmp_path / "a", categories=classes[:1])
    write_masks(tmp_path / "b", "images/SPLIT{}.png", "masks/SPLIT{}/{k}.png")
    assert open_masks(tmp_path / "b", categories=classes[1:]).target(0).labels.tolist() == [0, 0]


def test_lists_divide_folders_of_masks_too(tmp_path):
    write_masks(tmp_path, "images/SPLIT{}.png", "masks/SPLIT{}/{k}.png")
    (tmp_path / "train.txt").write_text("train1\ntrain2\n")
    (tmp_path / "val.txt").write_text("val1.png\n")
    (config,) = detect_layout(tmp_path).configs
    assert [len(open_annotations(config, split)) for split in ("train", "val")] == [2, 1]


# What is guessed, or not used, is said


def test_lists_that_match_nothing_are_named(tmp_path):
    layout = LABEL_MAPS["list of names"]._replace(others={"train.txt": "x\ny\n", "val.txt": ""})
    detection = detect_layout(write(tmp_path, layout))
    assert (
        "train.txt is not used: none of its 2 entries is the name of an image or a folder of images" in detection.notes
    )
    assert "val.txt is not used: is empty, expected one image name per line" in detection.notes
    assert len(open_annotations(detection.configs[0], "train")) == 2


def test_list_of_all_images_or_of_none_for_training_divides_nothing(tmp_path):
    for name, others in (
        ("all", {"train_labels.csv": "ImageId,EncodedPixels\na1,1 2\na1,7 8\na2,3 4\n"}),
        ("no", {"val.txt": "a1"}),
    ):
        detection = detect_layout(write(tmp_path / name, LABEL_MAPS["list of names"]._replace(others=others)))
        (config,) = detection.configs
        assert config.val is None
        assert len(open_annotations(config, "train")) == 2
    assert detection.notes == ("val.txt is not used, as no list names the training images",)


def test_images_of_a_split_without_labels_are_counted(tmp_path):
    layout = Layout({"train": ("train/images/{}.jpg", "train/masks/{}.png")}, others={"test/images/7.png": None})
    assert detect_layout(write(tmp_path, layout)).notes == ("test: 1 images have no label images and are not used",)


def test_layouts_are_found_in_archives(tmp_path):
    write(tmp_path / "areas", LABEL_MAPS["areas"])
    write_masks(tmp_path / "masks", *MASK_FILES["Data Science Bowl"][:2])
    for name in ("areas", "masks"):
        file = datasets_on_disk.pack(tmp_path / name, tmp_path / f"{name}.zip", "zip")
        (config,) = detect_layout(file).configs
        assert [len(open_annotations(config, split)) for split in ("train", "val")] == [2, 2]
        assert len(open_annotations(config, "val").sample(0)[1]) == 2


def test_outlines_of_slides_and_boxes_as_text_are_named(tmp_path):
    write_image(tmp_path / "slides/images/a.png", 1)
    (tmp_path / "slides/annotations").mkdir()
    (tmp_path / "slides/annotations/a.xml").write_text(
        "<Annotations><Region><Vertices></Vertices></Region></Annotations>"
    )
    with pytest.raises(DatasetError, match="XML files of ImageScope"):
        detect_layout(tmp_path / "slides")
    write_image(tmp_path / "yolo/images/a.png", 1)
    (tmp_path / "yolo/labels").mkdir()
    (tmp_path / "yolo/labels/a.txt").write_text("0 0 0 1 0 1 1")
    with pytest.raises(DatasetError, match=r"labels has no label images, but 1 \.txt; YOLO needs a data\.yaml"):
        detect_layout(tmp_path / "yolo")


def test_archives_without_folders_are_read_together(tmp_path):
    for name, write_one, suffix in (("images", write_image, ".jpg"), ("masks", write_mask, ".png")):
        write_one(tmp_path / f"files/{name}{suffix}", 3)
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            archive.write(tmp_path / f"files/{name}{suffix}", f"a{suffix}")
    shutil.rmtree(tmp_path / "files")
    (tmp_path / "._masks.zip").write_bytes(b"\0\5\x16\7")  # of macOS
    (config,) = detect_layout(tmp_path).configs
    assert shown_and_labeled(open_annotations(config, "train", ProblemCollector()), 1) == [(3, 3)]


def test_damaged_archive_beside_its_folder_does_not_hide_why_a_json_is_not_read(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "broken.zip").write_bytes(b"")
    image = {"id": 1, "file_name": "a.jpg", "height": 4, "width": 4}
    (tmp_path / "set/train.json").write_text(json.dumps({"images": [image], "annotations": [], "categories": []}))
    with pytest.raises(DatasetError, match=r"its images are not found, the first is a\.jpg"):
        detect_layout(tmp_path / "set/train.json")


def test_images_with_urls_instead_of_names_are_found(tmp_path):
    write_image(tmp_path / "train2017/0001.jpg", 3)
    image = {"id": 1, "coco_url": "http://example.org/train2017/0001.jpg", "height": SIZE[0], "width": SIZE[1]}
    square = {"id": 1, "image_id": 1, "category_id": 7, "segmentation": [[2, 2, 6, 2, 6, 6, 2, 6]], "iscrowd": 0}
    document = {"images": [image], "annotations": [square], "categories": [{"id": 7, "name": "cat"}]}
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/lvis_v1_train.json").write_text(json.dumps(document))
    (config,) = detect_layout(tmp_path).configs
    assert shown_and_labeled(open_annotations(config, "train"), 7) == [(3, 16)]


def test_classes_of_a_table_of_colors_beside_gtfine_are_not_those_of_cityscapes(tmp_path):
    for subset, number in (("train", 1), ("Validation", 5)):
        write_image(tmp_path / f"imgsFine/leftImg8bit/{subset}/a_leftImg8bit.png", number)
        write_mask(tmp_path / f"gtFine/{subset}/a_gtFine_labelIds.png", number)
        write_mask(tmp_path / f"gtFine/{subset}/a_gtFine_instanceIds.png", number)
        labels = np.zeros((*SIZE, 3), np.uint8)
        labels[0, :number] = 10, 20, 30
        Image.fromarray(labels).save(tmp_path / f"gtFine/{subset}/a_gtFine_color.png")
    (tmp_path / "label_colors.txt").write_text("0 0 0 background\n10 20 30 cat\n")
    (config,) = detect_layout(tmp_path).configs
    for split, number in (("train", 1), ("val", 5)):
        annotated = open_annotations(config, split)
        assert [category.name for category in annotated.categories] == ["background", "cat"]
        assert shown_and_labeled(annotated, 1) == [(number, number)]


def test_tables_of_values_that_differ_between_splits_are_refused(tmp_path):
    for folder, table in (("train", "0, sky\n1, cat\n"), ("valid", "0, cat\n1, sky\n")):
        write_image(tmp_path / f"{folder}/{folder}.jpg", 1)
        write_mask(tmp_path / f"{folder}/{folder}_mask.png", 1)
        (tmp_path / folder / "_classes.csv").write_text(f"Pixel Value, Class\n{table}")
    with pytest.raises(DatasetError, match="tables of classes for train and valid differ"):
        detect_layout(tmp_path)
    (tmp_path / "valid/_classes.csv").write_text((tmp_path / "train/_classes.csv").read_text())
    (config,) = detect_layout(tmp_path).configs
    assert [entry.name for entry in config.categories] == ["sky", "cat"]


@pytest.mark.parametrize(
    ("first", "counts"),
    [((1, 1), (9, 7)), ((1, 31), (30, 25))],
    ids=["counted in each image", "counted in all images"],
)
def test_label_images_that_number_objects_are_instance_maps(tmp_path, first, counts):
    for number, (start, count) in enumerate(zip(first, counts, strict=True)):
        write_image(tmp_path / f"images/{number}.png", number)
        objects = np.arange(start, start + 30) * (np.arange(30) < count)
        values = np.zeros(SIZE, np.uint16)
        values[:, :15] = np.kron(objects.reshape(6, 5), [[1, 1, 0], [1, 1, 0]])
        (tmp_path / "masks").mkdir(exist_ok=True)
        Image.fromarray(values).save(tmp_path / f"masks/{number}.png")
    detection = detect_layout(tmp_path)
    assert [(config.format, config.task) for config in detection.configs] == [("instance_maps", "instance")]
    assert "the values of the label images number objects" in detection.notes[-1]


def test_tables_of_colors_that_differ_between_splits_are_refused(tmp_path):
    for folder, table in (("train", "a,255,0,0\nb,0,0,255\n"), ("val", "b,255,0,0\na,0,0,255\n")):
        write_image(tmp_path / f"{folder}/images/1.png", 1)
        save_painted(tmp_path / f"{folder}/masks/1.png", (255, 0, 0), (0, 0, 255))
        (tmp_path / folder / "class_dict.csv").write_text(f"name,r,g,b\n{table}")
    with pytest.raises(DatasetError, match="tables of classes for train/masks and val/masks differ"):
        detect_layout(tmp_path)


def save_painted(path, *colors):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.resize(np.array(colors, np.uint8), (*SIZE, 3))).save(path)


def test_usual_colors_do_not_make_a_published_list(tmp_path):
    write_image(tmp_path / "images/1.png", 1)
    save_painted(tmp_path / "masks/1.png", (0, 0, 0), (255, 0, 0), (0, 0, 255))  # all are colors of ADE20K
    (config,) = detect_layout(tmp_path).configs
    assert [entry.name for entry in config.categories] == ["color (0, 0, 0)", "color (0, 0, 255)", "color (255, 0, 0)"]
    write_image(tmp_path / "images/2.png", 2)
    write_mask(tmp_path / "masks/2.png", 2)
    with pytest.raises(DatasetError, match="some label images in masks are painted in colors, and others have values"):
        detect_layout(tmp_path)


def test_levels_of_gray_are_no_classes(tmp_path):
    write_image(tmp_path / "images/1.png", 1)
    (tmp_path / "masks").mkdir()
    Image.fromarray(np.arange(240, dtype=np.uint8).reshape(SIZE)).save(tmp_path / "masks/1.png")
    with pytest.raises(DatasetError, match="seem to number objects or to be levels of gray"):
        detect_layout(tmp_path)


def test_no_data_of_16_bits_is_ignored(tmp_path):
    write_image(tmp_path / "images/1.png", 1)
    (tmp_path / "masks").mkdir()
    Image.fromarray(np.tile(np.array([0, 1, 65535], np.uint16), (12, 6))).save(tmp_path / "masks/1.png")
    (config,) = detect_layout(tmp_path).configs
    assert config.ignore_values == (65535, 255)
    assert [entry.id for entry in config.categories] == [0, 1]


def test_label_images_of_one_value_are_reported(tmp_path):
    write_image(tmp_path / "images/1.png", 1)
    write_mask(tmp_path / "masks/1.png", 0)
    assert "label images have only the value 0, so that there is one class" in detect_layout(tmp_path).notes


def test_empty_folders_are_called_empty(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    with pytest.raises(DatasetError, match="found: images, masks, all empty"):
        detect_layout(tmp_path)


def test_list_of_a_recipe_must_match(tmp_path):
    (config,) = detect_layout(write(tmp_path, LABEL_MAPS["list of names"])).configs
    (tmp_path / "splits/train.txt").write_text("a1\na7\n")
    with pytest.raises(DatasetError, match=r"1 of 2 names in .*train.txt are no images in .*images, the first is 'a7'"):
        open_annotations(config, "train")


def test_loveda_has_its_classes_and_others_have_numbers(tmp_path):
    layout = LABEL_MAPS["areas"]
    detection = detect_layout(write(tmp_path / "published", layout._replace(names=("Urban", "Rural"))))
    assert detection.configs[0].categories == "loveda"
    assert any("classes are those of LoveDA" in note for note in detection.notes)
    detection = detect_layout(write(tmp_path / "other", layout))
    assert [entry.name for entry in detection.configs[0].categories] == ["class 0", "class 1"]


def test_recipes_of_several_folders_read_the_same(tmp_path):
    detection = detect_layout(write(tmp_path, LABEL_MAPS["areas"]))
    (config,) = detection.configs
    assert (config.train.images, config.train.annotations) == ("Train", "Train")
    assert open_annotations(config, "train").image_id(0) == "North/a"
    assert any(note.startswith("4 folders are one split") for note in detection.notes)


def test_same_name_beside_a_photo_is_reported(tmp_path):
    (config,) = detect_layout(write(tmp_path, LABEL_MAPS["one folder, same name"])).configs
    problems = ProblemCollector()
    open_annotations(config, "train", problems)
    assert "2 files have the name of a JPEG file and are taken for its label image" in texts(problems)


def test_photos_in_two_formats_are_not_label_images(tmp_path):
    for name in "ab":
        noise = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{name}.jpg")
        Image.fromarray(noise).save(tmp_path / f"{name}.png")
    with pytest.raises(DatasetError, match="not recognized"):
        detect_layout(tmp_path)


def test_folders_without_pairs_are_refused_with_two_names(tmp_path):
    write_image(tmp_path / "images/a.png", 1)
    write_mask(tmp_path / "masks/bcd.png", 1)
    with pytest.raises(DatasetError, match=re.escape("(such as images/a.png and masks/bcd.png)")):
        detect_layout(tmp_path)


def test_lossless_webp_is_read_and_lossy_refused(tmp_path):
    for folder, lossless in (("lossless", True), ("lossy", False)):
        for number in (1, 2):
            write_image(tmp_path / folder / f"images/{number}.png", number)
            (tmp_path / folder / "labels").mkdir(exist_ok=True)
            mask = np.zeros((*SIZE, 3), np.uint8)
            mask[0, :number] = 3
            Image.fromarray(mask).save(tmp_path / folder / f"labels/{number}.webp", lossless=lossless)
    (config,) = detect_layout(tmp_path / "lossless").configs
    assert shown_and_labeled(open_annotations(config, "train"), 3) == [(1, 1), (2, 2)]
    with pytest.raises(DatasetError, match="stored as WEBP, whose lossy compression"):
        detect_layout(tmp_path / "lossy")


def test_negative_bytes_of_a_tiff_are_void(tmp_path):
    write_image(tmp_path / "images/1.png", 1)
    (tmp_path / "labels").mkdir()
    mask = np.zeros(SIZE, np.int8)
    mask[0, 0], mask[1] = 1, -1
    tifffile.imwrite(tmp_path / "labels/1.tif", mask)
    (config,) = detect_layout(tmp_path).configs
    assert [entry.id for entry in config.categories] == [0, 1]
    assert shown_and_labeled(open_annotations(config, "train"), 1) == [(1, 1)]


@pytest.mark.parametrize("palette", [False, True])
def test_voc_folders_without_lists_have_numbered_classes(tmp_path, palette):
    for number in (1, 2):
        write_image(tmp_path / f"JPEGImages/{number}.png", number)
        write_mask(tmp_path / f"SegmentationClass/{number}.png", number)
        if palette:
            write_mask(tmp_path / f"SegmentationObject/{number}.png", number)
    detection = detect_layout(tmp_path)
    assert any("set data.categories=voc" in note for note in detection.notes)
    for config in detection.configs:
        annotated = open_annotations(config, "train")
        assert [entry.name for entry in annotated.categories] == ["class 0", "class 1"]
        assert shown_and_labeled(annotated, 1) == [(1, 1), (2, 2)]


def test_names_of_published_classes_are_not_given_to_other_data(tmp_path):
    camvid = Layout({"train": ("train/{}.png", "trainannot/{}.png")})
    (config,) = detect_layout(write(tmp_path / "own", camvid)).configs
    assert [entry.name for entry in config.categories] == ["class 0", "class 1"]
    (config,) = detect_layout(write(tmp_path / "camvid", camvid._replace(names=("0001TP_1", "Seq05VD_2")))).configs
    assert (config.format, config.categories) == ("camvid", None)
    voc = Layout(
        {"train": ("JPEGImages/{}.jpg", "SegmentationClass/{}.png")},
        others={"ImageSets/Segmentation/train.txt": "1\n2\n"},
    )
    detection = detect_layout(write(tmp_path / "voc", voc))
    assert "classes are taken to be the 21 of Pascal VOC" in " ".join(detection.notes)
    detection = detect_layout(write(tmp_path / "2012", voc._replace(names=("2007_000032", "2007_000033"))))
    assert not detection.notes


def test_check_and_its_recipe_say_what_was_guessed(tmp_path, monkeypatch, capsys):
    write(tmp_path / "set", LABEL_MAPS["areas"])
    report = check(tmp_path / "set", workers=1)
    lines = report.layout_lines().splitlines()
    assert lines[:3] == [
        "format: label_maps",
        "train: images Train, annotations Train",
        "val: images Val, annotations Val",
    ]
    assert lines[3].startswith("4 folders are one split")
    assert report.to_json()["notes"]
    write_starting_recipe(report, tmp_path / "recipe.yaml")
    assert "  # 4 folders are one split" in (tmp_path / "recipe.yaml").read_text()
    assert not check(tmp_path / "recipe.yaml", workers=1).layout_lines()
