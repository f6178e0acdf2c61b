"""Hugging Face tables give the objects of the files that they were made from."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from maskwright.config.schema import DataConfig
from maskwright.data.formats.dispatch import open_annotations
from maskwright.errors import DatasetError, RecipeError
from tests import datasets_on_disk, tiny


def opened(root, task, split="train", **options):
    return open_annotations(DataConfig(format="huggingface", root=str(root), task=task, **options), split)


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
    """Parquet files of other tools, which do not declare columns as images."""
    import pyarrow.parquet

    for path in (parquet(tables, target) / "data").iterdir():
        table = pyarrow.parquet.read_table(path)
        pyarrow.parquet.write_table(table.replace_schema_metadata(None), path)
    return target


@pytest.mark.parametrize("form", [saved, parquet, plain_parquet])
def test_table_gives_the_same_as_its_files(tables, tmp_path, form):
    folder, table = tables
    root = form(table, tmp_path / "table")
    options = {"categories": CATEGORIES}
    expected = open_annotations(tiny.recipe(folder, "semantic").data, "train")
    found = opened(root, "semantic", **options)
    assert len(found) == 4
    for index in range(4):
        (image, target), (expected_image, expected_target) = found.sample(index), expected.sample(index)
        np.testing.assert_array_equal(image, expected_image)
        assert torch.equal(target.label_map(), expected_target.label_map())
        assert found.image_id(index) == f"{index:02d}"
    val = opened(root, "semantic", "val", **options)
    assert torch.equal(val.target(0).label_map(), expected.target(3).label_map())
    assert len(opened(root, "semantic", filter_empty=True, **options)) == 3


def test_table_is_read_in_worker_processes(tables, tmp_path):
    root = saved(tables[1], tmp_path / "table")
    values = tiny.values(root, "semantic", train__num_workers=2, val=False)
    values["data"] = {"format": "huggingface", "root": str(root), "task": "semantic", "categories": CATEGORIES}
    from maskwright.config.recipe import parse_recipe
    from maskwright.data.build import train_loader

    parts = next(iter(train_loader(parse_recipe(values, "tiny"))))
    assert parts[0].images.shape == (2, 3, 64, 64)


def test_color_mask_holds_classes_and_objects(tmp_path):
    datasets = pytest.importorskip("datasets")
    tiny.write_images(tmp_path, 2, (64, 64))
    truths = []
    for number in range(2):
        ids, categories = tiny.scene(number)
        classes = np.array([0, *categories])[ids]
        objects = np.where(ids > 2, ids, 0)
        colors = np.stack([classes, objects, objects * 0], -1).astype(np.uint8)
        datasets_on_disk.save(tmp_path / f"masks/{number}.png", colors)
        truths.append((ids, categories))
    rows = {
        "picture": [str(tmp_path / f"images/{n:02d}.png") for n in range(2)],
        "annotation": [str(tmp_path / f"masks/{n}.png") for n in range(2)],
    }
    features = datasets.Features({"annotation": datasets.Image(), "picture": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "table"))
    (tmp_path / "table/id2label.json").write_text(json.dumps({str(c["id"]): c["name"] for c in tiny.CATEGORIES}))
    panoptic = opened(tmp_path / "table", "panoptic", categories=CATEGORIES)
    for index, (ids, categories) in enumerate(truths):
        target = panoptic.target(index)
        assert torch.equal(target.id_maps[0].unique(), torch.arange(1, len(categories) + 1))
        assert {mask.numpy().tobytes() for mask in target.masks} == {(ids == i).tobytes() for i in np.unique(ids)}
        assert sorted(panoptic.categories[label].id for label in target.labels) == sorted(categories)
    semantic = opened(tmp_path / "table", "semantic")
    assert [c.name for c in semantic.categories] == ["sky", "grass", "box", "card"]
    assert torch.equal(semantic.target(0).label_map(), panoptic.target(0).merge_classes().label_map())
    (tmp_path / "table/id2label.json").write_text(json.dumps([str(number) for number in range(21)]))
    assert opened(tmp_path / "table", "semantic").categories[20].name == "20"


def test_missing_column_or_split_is_refused_with_the_existing_ones(tables, tmp_path):
    root = saved(tables[1], tmp_path / "table")
    with pytest.raises(RecipeError, match=r"data\.label_column: no column 'mask', only id, image, label"):
        opened(root, "semantic", label_column="mask", categories=CATEGORIES)
    with pytest.raises(DatasetError, match=r"has train, validation, not test"):
        opened(root, "semantic", "test", categories=CATEGORIES)
    lonely = saved(tables[1]["train"].select_columns(["id", "image"]), tmp_path / "lonely")
    with pytest.raises(DatasetError, match=r"columns id, image, 1 of them with images"):
        opened(lonely, "semantic", categories=CATEGORIES)
    with pytest.raises(DatasetError, match="no class list"):
        opened(root, "semantic")
    with pytest.raises(DatasetError, match="is neither a folder of save_to_disk"):
        opened(tmp_path / "maps", "semantic", categories=CATEGORIES)


def test_empty_cell_is_named(tables, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"image": [None], "label": [str(tables[0] / "labels/00.png")]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "table"))
    with pytest.raises(DatasetError, match=r"train/image 0: the cell is empty"):
        opened(tmp_path / "table", "semantic", categories=CATEGORIES).sample(0)


def test_sizes_of_images_and_masks_are_compared(tables, tmp_path):
    folder = tables[0]
    Image.fromarray(np.zeros((10, 12, 3), np.uint8)).save(folder / "images/01.png")
    datasets = pytest.importorskip("datasets")
    rows = {"image": [str(folder / "images/01.png")], "label": [str(folder / "labels/01.png")]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "table"))
    with pytest.raises(DatasetError, match="10 x 12 pixels"):
        opened(tmp_path / "table", "semantic", categories=CATEGORIES).sample(0)
