"""`maskwright convert-data`: what it writes is read back by our own readers and by pycocotools to the same masks."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from maskwright.data.convert import convert as convert_module
from maskwright.data.convert.convert import convert
from maskwright.data.convert.source import open_source
from maskwright.data.formats.detect import detect_format
from maskwright.data.formats.dispatch import open_annotations
from maskwright.errors import MaskwrightError
from tests import tiny
from tests.in_process import run_command


@pytest.fixture
def say(monkeypatch, capsys):
    """`say("convert-data", ...)` runs a command and returns exit status, output and errors."""
    return lambda *arguments: run_command(monkeypatch, capsys, *arguments)


@pytest.fixture
def panoptic(tmp_path):
    return split_folder(tiny.write_panoptic(tmp_path / "source", count=3))


@pytest.fixture
def instances(tmp_path):
    return split_folder(tiny.write_instances(tmp_path / "things", count=3))


@pytest.fixture
def labels(tmp_path):
    """The same images as label maps, with names of the classes."""
    folder = tiny.write_labels(tmp_path / "classes", count=3)
    rows = [f"{entry['id']}, {entry['name']}\n" for entry in tiny.CATEGORIES]
    (folder / "labels" / "_classes.csv").write_text("".join(rows))
    return folder


def split_folder(folder):
    """Rename the JSON so that its split is known."""
    (json_file,) = folder.glob("*.json")
    json_file.rename(folder / f"{json_file.stem}_train.json")
    return folder


def opened(folder, task=None):
    config = detect_format(folder)[0]
    return open_annotations(config if task is None else config.model_copy(update={"task": task}), "train")


def masks_of(annotated, index):
    """Return {(class name, is crowd): [masks]} of an image."""
    target = annotated.target(index)
    found = {}
    for mask, label, crowd in zip(target.masks.numpy(), target.labels.tolist(), target.is_crowd.tolist(), strict=True):
        found.setdefault((annotated.categories[label].name, crowd), []).append(mask)
    return found


def assert_same(first, second):
    assert len(first) == len(second)
    for index in range(len(first)):
        ours, theirs = masks_of(first, index), masks_of(second, index)
        assert ours.keys() == theirs.keys()
        for key, masks in ours.items():
            assert sorted(mask.tobytes() for mask in masks) == sorted(mask.tobytes() for mask in theirs[key])


@pytest.mark.parametrize(("to", "task"), [("panoptic", "panoptic"), ("coco", "panoptic"), ("semantic", "semantic")])
def test_panoptic_data_is_read_back_with_the_same_masks(to, task, panoptic, tmp_path):
    done = convert(str(panoptic), tmp_path / "new", to)
    assert done.images == {"train": 3}
    assert_same(opened(panoptic, task), opened(tmp_path / "new", task))
    assert [category.name for category in opened(tmp_path / "new").categories] == ["sky", "grass", "box", "card"]


def test_instances_and_yolo_keep_the_things_and_say_that_stuff_is_dropped(panoptic, tmp_path):
    expected = opened(panoptic, "instance")
    for to in ("instance", "yolo"):
        done = convert(str(panoptic), tmp_path / to, to)
        assert_same(expected, opened(tmp_path / to, "instance"))
        assert "6 stuff segments are dropped (3 images, first train/00.png)" in done.losses


def test_pycocotools_reads_the_instances(instances, tmp_path):
    convert(str(instances), tmp_path / "new", "instance")
    coco = COCO(tmp_path / "new" / "annotations" / "instances_train.json")
    annotated = opened(instances)
    for index in range(len(annotated)):
        target = annotated.target(index)
        found = coco.loadAnns(coco.getAnnIds(imgIds=[target.image_id]))
        assert [entry["area"] for entry in found] == target.masks.sum((1, 2)).tolist()
        for entry, mask in zip(found, target.masks.numpy(), strict=True):
            assert (coco.annToMask(entry).astype(bool) == mask).all()
            assert entry["bbox"] == coco_mask.toBbox(entry["segmentation"]).tolist()


def test_panoptic_files_have_what_the_panoptic_api_requires(panoptic, tmp_path):
    convert(str(panoptic), tmp_path / "new", "panoptic")
    document = json.loads((tmp_path / "new/annotations/panoptic_train.json").read_text())
    for annotation in document["annotations"]:
        png = np.array(Image.open(tmp_path / "new/annotations/panoptic_train" / annotation["file_name"])).astype(int)
        ids = png @ [1, 256, 65536]
        assert set(np.unique(ids)) - {0} == {segment["id"] for segment in annotation["segments_info"]}
        assert all(np.sum(ids == segment["id"]) == segment["area"] for segment in annotation["segments_info"])
    assert {category["isthing"] for category in document["categories"]} == {0, 1}


def test_objects_and_classes_combine_to_panoptic_data_and_back(panoptic, instances, labels, tmp_path):
    done = convert(str(instances), tmp_path / "new", "panoptic", add=str(labels))
    assert done.losses == []
    assert_same(opened(panoptic), opened(tmp_path / "new"))
    convert(str(tmp_path / "new"), tmp_path / "things again", "instance")
    assert_same(opened(instances), opened(tmp_path / "things again"))
    convert(str(tmp_path / "new"), tmp_path / "classes again", "semantic")
    assert_same(opened(labels, "semantic"), opened(tmp_path / "classes again"))


def test_pixels_of_a_thing_class_without_an_object_are_unlabeled(labels, tmp_path):
    folder = split_folder(tiny.write_instances(tmp_path / "few", count=3, empty=(1,)))
    done = convert(str(folder), tmp_path / "new", "panoptic", add=str(labels))
    ids, categories = tiny.scene(1)
    lost = int(np.isin(np.array([0, *categories])[ids], (8, 20)).sum())
    sentence = f"{lost:,} pixels of an object's class outside of all objects become unlabeled (1 image, first train/01"
    assert done.losses[0].startswith(sentence)
    target = opened(tmp_path / "new").target(1)
    assert int((target.id_maps == 0).sum()) == lost


def write_shapes(folder, objects):
    """Write one image of 20x20 pixels with objects: (mask, is crowd) each, of one class."""
    (folder / "images").mkdir(parents=True)
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(folder / "images" / "a.png")
    annotations = [
        {
            "id": number,
            "image_id": 1,
            "category_id": 1,
            "iscrowd": int(crowd),
            "area": int(mask.sum()),
            "segmentation": {"size": [20, 20], "counts": tiny.rle_counts(mask)},
        }
        for number, (mask, crowd) in enumerate(objects, 1)
    ]
    document = {
        "images": [{"id": 1, "file_name": "a.png", "height": 20, "width": 20}],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "ring"}],
    }
    (folder / "instances_train.json").write_text(json.dumps(document))
    return folder


def box(top, left, bottom, right):
    mask = np.zeros((20, 20), bool)
    mask[top:bottom, left:right] = True
    return mask


def test_overlaps_holes_parts_and_crowds_are_counted(tmp_path):
    ring = box(0, 0, 8, 8) & ~box(2, 2, 5, 5)
    pair = box(10, 0, 12, 4) | box(16, 0, 18, 4)
    objects = [(box(10, 10, 11, 11), False), (ring, False), (pair, False), (box(6, 6, 12, 12), False)]
    objects.append((box(15, 15, 20, 20), True))
    folder = write_shapes(tmp_path / "source", objects)
    done = convert(str(folder), tmp_path / "panoptic", "panoptic")
    losses = {line.partition(" (")[0] for line in done.losses}
    covered = sum(mask.sum() for mask, _ in objects) - np.any([mask for mask, _ in objects], 0).sum()
    assert f"{covered} pixels of objects are hidden by objects listed after them" in losses
    assert "1 objects without a visible pixel are dropped" in losses
    assert any("background pixels become pixels without a class" in line for line in losses)
    target = opened(tmp_path / "panoptic").target(0)
    assert target.is_crowd.tolist() == [False, False, False, True]
    assert torch.equal(target.masks[2], torch.from_numpy(objects[3][0]))  # later objects are on top
    yolo = {line.partition(" (")[0] for line in convert(str(folder), tmp_path / "yolo", "yolo").losses}
    assert yolo == {
        "1 crowd regions are dropped",
        "1 objects have holes, which are filled",
        "1 objects of several parts become one object for each part",
    }
    assert len(opened(tmp_path / "yolo").target(0)) == 5
    semantic = convert(str(folder), tmp_path / "semantic", "semantic").losses
    assert any(line.startswith("1 crowd regions become pixels of their class") for line in semantic)
    assert convert(str(folder), tmp_path / "instance", "instance").losses == []
    assert_same(opened(folder), opened(tmp_path / "instance"))


def test_images_are_linked_or_copied(panoptic, tmp_path):
    convert(str(panoptic), tmp_path / "links", "panoptic")
    convert(str(panoptic), tmp_path / "copies", "panoptic", copy_images=True)
    original = panoptic / "images" / "00.png"
    assert (tmp_path / "links/train/00.png").samefile(original)
    assert not (tmp_path / "copies/train/00.png").samefile(original)
    assert (tmp_path / "copies/train/00.png").read_bytes() == original.read_bytes()


def test_a_failed_conversion_leaves_nothing(panoptic, tmp_path):
    (panoptic / "masks" / "02.png").write_bytes(b"damaged")
    with pytest.raises(MaskwrightError, match=r"02\.png"):
        convert(str(panoptic), tmp_path / "new", "panoptic")
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_only_a_folder_of_ours_is_replaced(panoptic, tmp_path):
    convert(str(panoptic), tmp_path / "new", "panoptic")
    assert "everything" not in (tmp_path / "new" / convert_module.RECORD).read_text()
    with pytest.raises(MaskwrightError, match="exists already; choose another folder, or add --overwrite"):
        convert(str(panoptic), tmp_path / "new", "yolo")
    convert(str(panoptic), tmp_path / "new", "yolo", overwrite=True)
    assert (tmp_path / "new/data.yaml").exists()
    assert not (tmp_path / "new/annotations").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(MaskwrightError, match="exists, and was not written by convert-data"):
        convert(str(panoptic), tmp_path / "mine", "yolo", overwrite=True)
    for place in (panoptic, tmp_path):
        with pytest.raises(MaskwrightError, match="holds the source; choose another folder"):
            convert(str(panoptic), place, "yolo", overwrite=True)
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]


def test_label_maps_cannot_become_objects(labels, tmp_path):
    message = r"has annotations for semantic, expected .*; annotations of classes do not tell objects apart"
    for to in ("instance", "panoptic"):
        with pytest.raises(MaskwrightError, match=message):
            convert(str(labels), tmp_path / "new", to)


def test_an_image_without_a_partner_is_named(instances, tmp_path):
    other = tiny.write_labels(tmp_path / "two", count=2)
    with pytest.raises(MaskwrightError, match=r"02\.png: 0 images of .*two \(split train\) have its name"):
        convert(str(instances), tmp_path / "new", "panoptic", add=str(other))


def test_a_recipe_is_converted_with_all_its_splits(tmp_path, say):
    folder = tiny.write_panoptic(tmp_path / "source")
    tiny.write_recipe(tmp_path / "mine.yaml", folder)
    status, out, _ = say(
        "convert-data", tmp_path / "mine.yaml", tmp_path / "new", "data.task=panoptic", "--to", "semantic"
    )
    assert status == 0
    assert "4 train, 4 val images" in out
    assert "objects are merged with others of their class" in out
    names = {path.name for path in (tmp_path / "new/images/val").iterdir()}
    assert names == {f"{number:02d}.png" for number in range(4)}


def test_images_of_one_name_in_several_folders_get_longer_names():
    from maskwright.data.storage.folders import File

    files = [File("/data/a/1.png"), File("/data/b/1.png")]
    assert convert_module._file_names(files) == ["a-1.png", "b-1.png"]
    with pytest.raises(MaskwrightError, match=r"its annotations would have the name of those of /data/a/1\.png"):
        convert_module._file_names([files[0], File("/data/a/1.jpg")])


def test_a_test_split_that_cannot_be_opened_is_named(tmp_path, caplog):
    for folder in ("train", "val"):
        for name, value in ((folder, 90), (f"{folder}annot", 3)):
            (tmp_path / name).mkdir()
            Image.fromarray(np.full((20, 30), value, np.uint8)).save(tmp_path / name / "0001TP_006690.png")
    opened = open_source("camvid-quick", [f"data.root={tmp_path}"], ("semantic",))
    assert list(opened.splits) == ["train", "val"]
    assert "the test split is not converted: " in caplog.text
