"""YOLO text files and Hugging Face tables of one's own give the objects that were written into them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from maskwright.config.schema import DataConfig
from maskwright.data.formats.dispatch import open_annotations
from maskwright.errors import DatasetError, RecipeError
from tests import datasets_on_disk, tiny

SIZE = datasets_on_disk.SIZE


def opened(root, form, task, split="train", **options):
    return open_annotations(DataConfig(format=form, root=str(root), task=task, **options), split)


@pytest.fixture
def pair_of_sets(tmp_path):
    """A COCO set of polygons, and the same written for YOLO: (COCO folder, YOLO folder)."""
    coco = datasets_on_disk.coco(tmp_path / "coco")
    yolo = tmp_path / "yolo"
    for part in ("train", "val"):
        document = json.loads((coco / f"annotations/instances_{part}2017.json").read_text())
        for image in document["images"]:
            source = coco / f"{part}2017/{image['file_name']}"
            target = yolo / f"images/{part}/{source.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
        for entry in document["annotations"]:
            numbers = np.array(entry["segmentation"][0]).reshape(-1, 2) / [SIZE[1], SIZE[0]]
            text = yolo / f"labels/{part}/{entry['image_id']:012d}.txt"
            text.parent.mkdir(parents=True, exist_ok=True)
            with open(text, "a") as file:
                file.write(" ".join(map(str, [{1: 0, 3: 1}[entry["category_id"]], *numbers.ravel()])) + "\n")
    (yolo / "data.yaml").write_text("path: .\ntrain: images/train\nval: images/val\nnames: {0: person, 1: car}\n")
    return coco, yolo


def assert_same_objects(found, expected):
    assert len(found) == len(expected) == 3
    names = [c.name for c in found.categories], [c.name for c in expected.categories]
    for index in range(3):
        (image, target), (picture, truth) = found.sample(index), expected.sample(index)
        np.testing.assert_array_equal(image, picture)
        assert torch.equal(target.masks, truth.masks)
        assert [names[0][label] for label in target.labels] == [names[1][label] for label in truth.labels]


@pytest.mark.parametrize("task", ["instance", "semantic"])
def test_yolo_polygons_give_the_masks_of_the_coco_polygons_they_were_made_of(pair_of_sets, task):
    coco, yolo = pair_of_sets
    files = {"images": "train2017", "annotations": "annotations/instances_train2017.json"}
    assert_same_objects(opened(yolo, "yolo", task), opened(coco, "coco_instance", task, train=files))


def roboflow(yolo):
    """train/images beside train/labels, and paths in data.yaml that lead out of its folder."""
    for part in ("train", "val"):
        (yolo / part).mkdir()
        (yolo / f"images/{part}").rename(yolo / f"{part}/images")
        (yolo / f"labels/{part}").rename(yolo / f"{part}/labels")
    (yolo / "data.yaml").write_text("train: ../train/images\nval: ../val/images\nnc: 2\nnames: ['person', 'car']\n")
    return yolo


def listed(yolo):
    """Text files of picture names in place of folders."""
    for part in ("train", "val"):
        names = sorted(path.name for path in (yolo / f"images/{part}").iterdir())
        (yolo / f"{part}.txt").write_text("".join(f"./images/{part}/{name}\n" for name in names))
    (yolo / "data.yaml").write_text("train: train.txt\nval: val.txt\nnames: [person, car]\n")
    return yolo


def apart(yolo):
    """The yaml has its own name, and the data lies in a folder beside it."""
    moved = yolo.parent / "sets/mine"
    moved.parent.mkdir()
    yolo.rename(moved)
    (moved / "data.yaml").unlink()
    text = f"path: {moved}\ntrain: [images/train]\nval: images/val\nnames: [person, car]\n"
    (yolo.parent / "mine.yaml").write_text(text)
    return yolo.parent / "mine.yaml"


def zipped(yolo):
    return datasets_on_disk.pack(yolo, yolo.parent / "yolo.zip", "zip", top="some set")


@pytest.mark.parametrize("arrange", [roboflow, listed, apart, zipped])
def test_yolo_layouts_of_other_tools_are_read(pair_of_sets, arrange):
    coco, yolo = pair_of_sets
    root = arrange(yolo)
    for part in ("train", "val"):
        files = {"images": f"{part}2017", "annotations": f"annotations/instances_{part}2017.json"}
        expected = opened(coco, "coco_instance", "instance", part, **{part: files})
        assert_same_objects(opened(root, "yolo", "instance", part), expected)


def test_yolo_picture_without_a_text_file_has_no_object(pair_of_sets):
    yolo = pair_of_sets[1]
    (yolo / "labels/train/000000000002.txt").unlink()
    (yolo / "labels/train/000000000003.txt").write_text("\n")
    annotated = opened(yolo, "yolo", "instance")
    assert [len(annotated.target(index)) for index in range(3)] == [2, 0, 0]
    kept = opened(yolo, "yolo", "instance", skip_empty=True)
    assert len(kept) == 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("0 0.5 0.5 0.2 0.2", "a box"),
        ("7 0 0 1 0 1 1", "class 7, but data.yaml has 2 names"),
        ("0 0 0 1 0 1", "5 values after the class 0"),
        ("0 0 0 1 0", "a box"),
        ("0 0 0 64 0 64 48", "64 is outside 0..1"),
        ("0 0 0 nan 0 1 1", "NaN"),
        ("person 0 0 1 0 1 1", "is not 'class x y x y ...' in numbers"),
    ],
)
def test_yolo_line_that_is_no_polygon_is_named(pair_of_sets, line, words):
    yolo = pair_of_sets[1]
    (yolo / "labels/train/000000000001.txt").write_text(f"0 0 0 1 0 1 1\n{line}\n")
    with pytest.raises(DatasetError, match=r"labels/train/000000000001\.txt, line 2: ") as error:
        opened(yolo, "yolo", "instance").target(0)
    assert words in str(error.value)


def test_yolo_polygon_without_a_pixel_is_dropped_with_a_warning(pair_of_sets, caplog):
    yolo = pair_of_sets[1]
    (yolo / "labels/train/000000000001.txt").write_text("0 0.1 0.1 0.1 0.1 0.1 0.1\n1 0 0 1 0 1 1\n")
    assert opened(yolo, "yolo", "instance").target(0).labels.tolist() == [1]
    assert "the polygon of line 1 covers no pixel" in caplog.text


def test_yolo_description_without_names_or_split_says_so(pair_of_sets):
    yolo = pair_of_sets[1]
    (yolo / "data.yaml").write_text("train: images/train\nnames: [a, b]\n")
    with pytest.raises(DatasetError, match=r"data\.yaml: has no 'val'"):
        opened(yolo, "yolo", "instance", "val")
    (yolo / "data.yaml").write_text("train: images/other\nnames: [a, b]\n")
    with pytest.raises(DatasetError, match=r"data\.train\.images: no folder or list 'images/other'"):
        opened(yolo, "yolo", "instance")
    (yolo / "data.yaml").write_text("train: images/train\n")
    with pytest.raises(DatasetError, match="no 'names'"):
        opened(yolo, "yolo", "instance")


# Hugging Face


CATEGORIES = [{"id": c["id"], "name": c["name"], "is_thing": bool(c["isthing"])} for c in tiny.CATEGORIES]
CATEGORIES.append({"id": 255, "name": "void", "ignore": True})


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """The label maps of `tiny` as tables: (folder of label maps, {split: table})."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tiny.write_labels(tmp_path / "maps", ignored=(2,))
    rows = {"id": [], "image": [], "label": []}
    for number in range(4):
        rows["id"].append(number)
        rows["image"].append(str(folder / f"images/{number:02d}.png"))
        rows["label"].append(str(folder / f"labels/{number:02d}.png"))
    features = datasets.Features({"id": datasets.Value("int32"), "image": datasets.Image(), "label": datasets.Image()})
    table = datasets.Dataset.from_dict(rows, features=features)
    return folder, datasets.DatasetDict({"train": table, "validation": table.select([3, 0])})


def saved(tables, target):
    tables.save_to_disk(str(target))
    return target


def parquet(tables, target):
    (target / "data").mkdir(parents=True)
    for name, table in tables.items():
        table.to_parquet(str(target / f"data/{name}-00000-of-00001.parquet"))
    return target


def plain_parquet(tables, target):
    """Parquet files as other tools write them, without a word that the columns are pictures."""
    import pyarrow.parquet

    for path in (parquet(tables, target) / "data").iterdir():
        table = pyarrow.parquet.read_table(path)
        pyarrow.parquet.write_table(table.replace_schema_metadata(None), path)
    return target


@pytest.mark.parametrize("form", [saved, parquet, plain_parquet])
def test_table_gives_what_its_files_give(tables, tmp_path, form):
    folder, table = tables
    root = form(table, tmp_path / "table")
    options = {"categories": CATEGORIES}
    expected = open_annotations(tiny.recipe(folder, "semantic").data, "train")
    found = opened(root, "huggingface", "semantic", **options)
    assert len(found) == 4
    for index in range(4):
        (image, target), (picture, truth) = found.sample(index), expected.sample(index)
        np.testing.assert_array_equal(image, picture)
        assert torch.equal(target.label_map(), truth.label_map())
        assert found.image_id(index) == f"{index:02d}"
    val = opened(root, "huggingface", "semantic", "val", **options)
    assert torch.equal(val.target(0).label_map(), expected.target(3).label_map())
    assert len(opened(root, "huggingface", "semantic", skip_empty=True, **options)) == 3


def test_table_is_read_in_worker_processes(tables, tmp_path):
    root = saved(tables[1], tmp_path / "table")
    values = tiny.values(root, "semantic", train__num_workers=2, val=False)
    values["data"] = {"format": "huggingface", "root": str(root), "task": "semantic", "categories": CATEGORIES}
    from maskwright.config.recipe import parse_recipe
    from maskwright.data.build import train_loader

    parts = next(iter(train_loader(parse_recipe(values, "tiny"))))
    assert parts[0].images.shape == (2, 3, 64, 64)


def test_mask_in_colours_holds_classes_and_objects(tmp_path):
    datasets = pytest.importorskip("datasets")
    tiny.write_pictures(tmp_path, 2, (64, 64))
    truths = []
    for number in range(2):
        ids, categories = tiny.scene(number)
        classes = np.array([0, *categories])[ids]
        objects = np.where(ids > 2, ids, 0)
        colours = np.stack([classes, objects, objects * 0], -1).astype(np.uint8)
        datasets_on_disk.save(tmp_path / f"masks/{number}.png", colours)
        truths.append((ids, categories))
    rows = {
        "picture": [str(tmp_path / f"images/{n:02d}.png") for n in range(2)],
        "annotation": [str(tmp_path / f"masks/{n}.png") for n in range(2)],
    }
    features = datasets.Features({"annotation": datasets.Image(), "picture": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "table"))
    (tmp_path / "table/id2label.json").write_text(json.dumps({str(c["id"]): c["name"] for c in tiny.CATEGORIES}))
    panoptic = opened(tmp_path / "table", "huggingface", "panoptic", categories=CATEGORIES)
    for index, (ids, categories) in enumerate(truths):
        target = panoptic.target(index)
        assert torch.equal(target.id_maps[0].unique(), torch.arange(1, len(categories) + 1))
        assert {mask.numpy().tobytes() for mask in target.masks} == {(ids == i).tobytes() for i in np.unique(ids)}
        assert sorted(panoptic.categories[label].id for label in target.labels) == sorted(categories)
    semantic = opened(tmp_path / "table", "huggingface", "semantic")
    assert [c.name for c in semantic.categories] == ["sky", "grass", "box", "card"]
    assert torch.equal(semantic.target(0).label_map(), panoptic.target(0).merge_classes().label_map())


def test_table_without_a_mask_column_or_split_says_what_there_is(tables, tmp_path):
    root = saved(tables[1], tmp_path / "table")
    with pytest.raises(RecipeError, match=r"data\.label_column: no column 'mask', only id, image, label"):
        opened(root, "huggingface", "semantic", label_column="mask", categories=CATEGORIES)
    with pytest.raises(DatasetError, match=r"has train, validation, not test"):
        opened(root, "huggingface", "semantic", "test", categories=CATEGORIES)
    lonely = saved(tables[1]["train"].select_columns(["id", "image"]), tmp_path / "lonely")
    with pytest.raises(DatasetError, match=r"columns id, image, 1 of them with images"):
        opened(lonely, "huggingface", "semantic", categories=CATEGORIES)
    with pytest.raises(DatasetError, match="no class list"):
        opened(root, "huggingface", "semantic")
    with pytest.raises(DatasetError, match="is neither a folder of save_to_disk"):
        opened(tmp_path / "maps", "huggingface", "semantic", categories=CATEGORIES)


def test_empty_cell_is_named(tables, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"image": [None], "label": [str(tables[0] / "labels/00.png")]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "table"))
    with pytest.raises(DatasetError, match=r"train/image 0: the cell is empty"):
        opened(tmp_path / "table", "huggingface", "semantic", categories=CATEGORIES).sample(0)


def test_sizes_of_pictures_and_masks_are_compared(tables, tmp_path):
    folder = tables[0]
    Image.fromarray(np.zeros((10, 12, 3), np.uint8)).save(folder / "images/01.png")
    datasets = pytest.importorskip("datasets")
    rows = {"image": [str(folder / "images/01.png")], "label": [str(folder / "labels/01.png")]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "table"))
    with pytest.raises(DatasetError, match="10 x 12 pixels"):
        opened(tmp_path / "table", "huggingface", "semantic", categories=CATEGORIES).sample(0)
