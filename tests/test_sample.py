"""The images, masks and JSON of the packaged sample are consistent. pycocotools decodes the masks."""

import json
from importlib import resources
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from pycocotools import mask as rle

SAMPLE = Path(str(resources.files("maskwright.data").joinpath("sample")))
SPLITS = ("train", "val")


def read(kind: str, split: str) -> dict:
    return json.loads((SAMPLE / "annotations" / f"{kind}_{split}.json").read_text(encoding="utf-8"))


def segment_ids(split: str, name: str) -> np.ndarray:
    image = np.asarray(PIL.Image.open(SAMPLE / "annotations" / f"panoptic_{split}" / name).convert("RGB")).astype(int)
    return image[..., 0] + 256 * image[..., 1] + 65536 * image[..., 2]


@pytest.mark.parametrize(("split", "count"), [("train", 24), ("val", 8)])
def test_every_image_is_listed_with_its_size(split, count):
    images = read("panoptic", split)["images"]
    assert images == read("instances", split)["images"]
    assert sorted(image["file_name"] for image in images) == sorted(path.name for path in (SAMPLE / split).iterdir())
    assert len(images) == count
    for image in images:
        assert PIL.Image.open(SAMPLE / split / image["file_name"]).size == (image["width"], image["height"])


@pytest.mark.parametrize("split", SPLITS)
def test_both_kinds_of_tissue_are_in_each_split(split):
    modes = {PIL.Image.open(path).mode for path in (SAMPLE / split).iterdir()}
    assert modes == {"L", "RGB"}


@pytest.mark.parametrize("split", SPLITS)
def test_panoptic_pngs_have_the_listed_segments_and_no_void(split):
    for annotation in read("panoptic", split)["annotations"]:
        ids, areas = np.unique(segment_ids(split, annotation["file_name"]), return_counts=True)
        stated = {segment["id"]: segment["area"] for segment in annotation["segments_info"]}
        assert dict(zip(ids.tolist(), areas.tolist(), strict=True)) == stated


@pytest.mark.parametrize("split", SPLITS)
def test_instance_masks_are_the_panoptic_things(split):
    masks: dict[int, list[np.ndarray]] = {}
    for annotation in read("instances", split)["annotations"]:
        masks.setdefault(annotation["image_id"], []).append(rle.decode(annotation["segmentation"]).astype(bool))
    for annotation in read("panoptic", split)["annotations"]:
        nuclei = segment_ids(split, annotation["file_name"]) > 1
        assert (np.any(masks[annotation["image_id"]], axis=0) == nuclei).all()
        assert 0 < len(masks[annotation["image_id"]]) == len(annotation["segments_info"]) - 1 <= 100


def test_no_image_is_in_both_splits():
    train, val = ({image["source_id"] for image in read("panoptic", split)["images"]} for split in SPLITS)
    assert not train & val


def test_the_sample_is_small_and_states_its_license():
    assert sum(path.stat().st_size for path in SAMPLE.rglob("*") if path.is_file()) < 2_000_000
    assert "CC0 1.0" in (SAMPLE / "README.md").read_text(encoding="utf-8")
