"""Label images whose values number objects, as Cellpose, StarDist and HoVer-Net write them."""

import numpy as np
import pytest
import tifffile
from PIL import Image

from maskwright.config.recipe import load_recipe
from maskwright.config.schema import CategoryConfig, DataConfig
from maskwright.data.formats.detect import detect_layout
from maskwright.data.formats.dispatch import open_annotations
from maskwright.data.formats.split_lists import read_listed
from maskwright.data.storage.folders import open_folder
from maskwright.errors import DatasetError, MaskwrightError
from tests.in_process import run_command

SIZE = 48
CELLS = (10, 25, 14, 9)  # in each image


def instance_map(count, dtype=np.uint16, first=1):
    """Return a map of `count` square cells of 5 by 5 pixels."""
    values = np.zeros((SIZE, SIZE), dtype)
    for number in range(count):
        top, left = divmod(number, 6)
        values[top * 7 : top * 7 + 5, left * 7 : left * 7 + 5] = first + number
    return values


def save(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, values)
    elif path.suffix == ".tif":
        tifffile.imwrite(path, values)
    else:
        Image.fromarray(values).save(path)


def write_cells(folder, image="images/{}.png", labels="masks/{}.png", maps=None):
    """Write a dataset of one split; `maps` are those of CELLS."""
    for number, values in enumerate(maps or map(instance_map, CELLS)):
        save(folder / image.format(number), np.full((SIZE, SIZE, 3), 40 * number, np.uint8))
        save(folder / labels.format(number), values)


def painted(values):
    """Return the map with a random color for each object, other ones in each image."""
    colors = np.random.default_rng(values.max()).integers(30, 256, (values.max() + 1, 3)).astype(np.uint8)
    colors[0] = 0
    return colors[values]


@pytest.mark.parametrize(
    ("image", "labels", "convert"),
    [
        ("{}_img.tif", "{}_masks.tif", None),
        ("{}.tif", "{}_masks.tif", None),
        ("{}_img.png", "{}_img_cp_masks.png", None),
        ("images/{}.tif", "masks/{}.tif", lambda values: values.astype(np.int32)),
        ("train/images/{}.png", "train/labels/{}.npy", lambda values: values.astype(np.int64)),
        ("images/{}.png", "masks/{}.tif", lambda values: values.astype(np.float32)),
        ("images/{}.png", "masks/{}.png", lambda values: values.astype(np.uint8)),
        ("images/{}.png", "masks/{}.png", painted),
    ],
    ids=["cellpose with _img", "cellpose", "cellpose, as it saves", "stardist", "numpy", "floats", "bytes", "painted"],
)
def test_instance_maps_are_found_and_each_value_is_an_object(tmp_path, image, labels, convert):
    maps = [instance_map(count) for count in CELLS]
    write_cells(tmp_path, image, labels, [convert(values) if convert else values for values in maps])
    detection = detect_layout(tmp_path)
    (config,) = detection.configs
    assert (config.format, config.task) == ("instance_maps", "instance")
    assert "number objects" in detection.notes[-1]
    annotated = open_annotations(config, "train")
    assert [category.name for category in annotated.categories] == ["object"]
    targets = [annotated.target(index) for index in range(len(CELLS))]
    assert [len(target) for target in targets] == list(CELLS)
    areas = [sorted(target.masks.sum((1, 2)).tolist()) for target in targets]
    assert areas == [[np.count_nonzero(values == 1 + i) for i in range(values.max())] for values in maps]


def config(folder, **keys):
    section = {"images": "images", "annotations": "masks"}
    return DataConfig(**{"format": "instance_maps", "root": str(folder), "task": "instance", "train": section} | keys)


def test_numbers_may_be_large_and_ignored_values_are_no_objects(tmp_path):
    far = instance_map(9, np.int32, first=100_000)
    far[-3:] = -1
    save(tmp_path / "images/0.png", np.zeros((SIZE, SIZE, 3), np.uint8))
    save(tmp_path / "masks/0.tif", far)
    with pytest.raises(DatasetError, match=r"0\.tif: has the value -1, expected 0 .* add it to data\.ignore_values"):
        open_annotations(config(tmp_path), "train").target(0)
    target = open_annotations(config(tmp_path, ignore_values=(-1, 100_000)), "train").target(0)
    assert target.masks.sum((1, 2)).tolist() == [25] * 8


def test_the_background_is_a_class_where_the_task_or_the_list_has_it(tmp_path):
    write_cells(tmp_path)
    semantic = open_annotations(config(tmp_path, task="semantic"), "train")
    assert [category.name for category in semantic.categories] == ["background", "object"]
    assert semantic.target(0).labels.tolist() == [0, 1]
    assert (semantic.target(0).label_map().numpy() == (instance_map(CELLS[0]) > 0)).all()
    categories = (CategoryConfig(id=0, name="background", is_thing=False), CategoryConfig(id=1, name="cell"))
    panoptic = open_annotations(config(tmp_path, task="panoptic", categories=categories), "train").target(0)
    assert panoptic.labels.tolist() == [0] + [1] * CELLS[0]
    assert panoptic.labeled_pixels == SIZE * SIZE


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"label_map": {1: 2}}, "data.label_map: has no meaning with data.format instance_maps"),
        (
            {"categories": (CategoryConfig(id=1, name="a"), CategoryConfig(id=2, name="b"))},
            "data.categories: lists 2 classes of objects, but instance maps do not tell classes apart",
        ),
        (
            {
                "categories": (
                    CategoryConfig(id=1, name="cell", is_thing=False),
                    CategoryConfig(id=0, name="background"),
                )
            },
            "data.categories: the class of the objects has is_thing: false",
        ),
        ({"train": {"images": "images"}}, "data.train.annotations: is missing"),
    ],
)
def test_keys_that_make_no_sense_are_refused(tmp_path, keys, message):
    write_cells(tmp_path)
    with pytest.raises(MaskwrightError) as error:
        open_annotations(config(tmp_path, **keys), "train")
    assert message in str(error.value)


def test_numbers_of_deleted_objects_may_be_missing(tmp_path):
    maps = [np.where(np.isin(instance_map(count), (2, 9)), 0, instance_map(count)) for count in (14, 25, 20, 22)]
    write_cells(tmp_path, maps=maps)
    (config,) = detect_layout(tmp_path).configs
    assert config.format == "instance_maps"


@pytest.mark.parametrize("present", [(9, 6, 8), (12, 24, 21)])
def test_values_in_several_places_are_classes(tmp_path, present):
    """A semantic dataset of which each image happens to hold the classes 1 to k."""
    maps = [np.kron(np.arange(36).reshape(6, 6) % count + 1, np.ones((8, 8))).astype(np.uint8) for count in present]
    write_cells(tmp_path, maps=maps)
    (config,) = detect_layout(tmp_path).configs
    assert config.format == "label_maps"
    assert len(config.categories) == max(present)


@pytest.mark.parametrize("resolution", ["", "480p/"])
def test_frames_of_videos_have_numbered_objects(tmp_path, resolution):
    """DAVIS and YouTube-VOS; the folder of one clip says the split once more."""
    clips = {"train": ("bear", "collage-train"), "valid": ("dog", "collage-valid")}
    for split, names in clips.items():
        for name in names:
            images, labels = f"JPEGImages/{resolution}{name}/{{:05}}.jpg", f"Annotations/{resolution}{name}/{{:05}}.png"
            write_cells(tmp_path / split, images, labels, [instance_map(count) for count in (2, 3)])
    detection = detect_layout(tmp_path)
    (config,) = detection.configs
    assert config.format == "instance_maps"
    assert "DAVIS" in detection.notes[-1]
    assert not any("not used" in note for note in detection.notes)
    for split in ("train", "val"):
        annotated = open_annotations(config, split)
        assert [len(annotated.target(index)) for index in range(len(annotated))] == [2, 3, 2, 3]


def test_lists_of_clips_divide_their_frames(tmp_path):
    """DAVIS 2017: ImageSets/2017/train.txt names clips, which are folders of images."""
    for clip, objects in {"bear": 2, "dog": 3, "dog-run": 4, "cat": 1}.items():
        images, labels = f"JPEGImages/480p/{clip}/{{:05}}.jpg", f"Annotations/480p/{clip}/{{:05}}.png"
        write_cells(tmp_path, images, labels, [instance_map(objects) for _ in range(2)])
    for split, clips in {"train": "bear\ndog\n", "val": "480p/dog-run\n", "test-dev": "swan\n"}.items():
        path = tmp_path / f"ImageSets/2017/{split}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(clips)
    detection = detect_layout(tmp_path)
    (config,) = detection.configs
    for split, counts in {"train": [2, 2, 3, 3], "val": [4, 4]}.items():
        annotated = open_annotations(config, split)
        assert [len(annotated.target(index)) for index in range(len(annotated))] == counts
    assert "2 images are in no list and are not used" in detection.notes


@pytest.mark.parametrize(
    ("entry", "images"),
    {
        "dog": ["dog/3"],
        "a/dog/": ["a/dog/1"],
        "cat": ["b/cat/1", "b/cat/2"],
        "cow": [None],  # the name of two folders
        "a/dog/1": ["a/dog/1"],
        "b": [None],  # its images are in folders of their own
    }.items(),
)
def test_an_entry_of_a_list_may_be_a_folder(tmp_path, entry, images):
    paths = ("a/dog/1", "b/dog/1", "b/cat/1", "b/cat/2", "dog/3", "a/cow/1", "b/cow/1")
    (tmp_path / "train.txt").write_text(entry)
    listed = read_listed(open_folder(tmp_path).file("train.txt", "list"), {path: f"{path}.png" for path in paths})
    assert [name for _, name in listed] == images


def test_levels_of_gray_are_no_objects(tmp_path):
    noise = [np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE)).astype(np.uint8) for seed in range(3)]
    write_cells(tmp_path, maps=noise)
    with pytest.raises(DatasetError, match="or to be levels of gray"):
        detect_layout(tmp_path)


def test_check_writes_a_recipe_that_trains(tmp_path, monkeypatch, capsys):
    for split in ("train", "val"):
        write_cells(tmp_path / "cells" / split)
    recipe = tmp_path / "mine.yaml"
    status, output, _ = run_command(monkeypatch, capsys, "check", tmp_path / "cells", "--recipe", recipe)
    assert status == 0
    assert "number objects" in output
    assert load_recipe(str(recipe)).data.format == "instance_maps"
    tiny = ["model.backbone=resnet18", "model.backbone_weights=null", "model.num_queries=20", "train.num_workers=0"]
    steps = ["train.steps=1", "train.batch_size=2", "train.precision=fp32"]
    status, _, errors = run_command(monkeypatch, capsys, "train", recipe, *tiny, *steps, "--output", tmp_path / "run")
    assert (status, (tmp_path / "run/best.safetensors").is_file()) == (0, True), errors
