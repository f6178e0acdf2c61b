"""Each score is measured against the annotations of its own task, where a dataset keeps those apart."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from maskwright.config.categories import load_categories
from maskwright.config.recipe import parse_recipe
from maskwright.data.build import open_dataset
from maskwright.errors import DatasetError
from maskwright.evaluation.evaluate import check_evaluation
from maskwright.evaluation.evaluation_targets import EvaluationTargets
from tests import tiny

TASKS = ("semantic", "instance", "panoptic")


@pytest.fixture
def coco(tmp_path):
    """The scenes in the layout of COCO 2017; panoptic and instance annotations differ by one object in one image."""
    tiny.write_panoptic(tmp_path / "a")
    tiny.write_instances(tmp_path / "b", empty=(1,))
    (tmp_path / "annotations").mkdir()
    shutil.move(tmp_path / "a/images", tmp_path / "val2017")
    shutil.move(tmp_path / "a/masks", tmp_path / "annotations/panoptic_val2017")
    shutil.move(tmp_path / "a/panoptic.json", tmp_path / "annotations/panoptic_val2017.json")
    shutil.move(tmp_path / "b/instances.json", tmp_path / "annotations/instances_val2017.json")
    return tmp_path


def recipe(root, task="panoptic", **data):
    values = tiny.values(root)
    kinds = [{"id": c["id"], "name": c["name"], "is_thing": bool(c["isthing"])} for c in tiny.CATEGORIES]
    values["data"] = {"format": "coco", "root": str(root), "task": task, "categories": kinds} | data
    return parse_recipe(values, "tiny")


def names(data, target):
    return sorted(data.categories[label].name for label in target.labels.tolist())


def test_coco_scores_instances_on_the_instances_and_the_rest_on_the_segments(coco):
    data = open_dataset(recipe(coco), "val")
    targets = EvaluationTargets(recipe(coco), "val", data, TASKS)
    for index in range(len(data)):
        base = data.target(index)
        found = targets.for_image(base)
        assert found["panoptic"] is found["semantic"] is base
        assert found["instance"].image_id == base.image_id
        things = [name for name in names(data, base) if name in ("box", "card")]
        assert names(data, found["instance"]) == ([] if index == 1 else things)


def test_what_is_annotated_for_all_tasks_at_once_is_read_once(tmp_path):
    wanted = tiny.recipe(tiny.write_panoptic(tmp_path))
    data = open_dataset(wanted, "val")
    base = data.target(0)
    assert all(target is base for target in EvaluationTargets(wanted, "val", data, TASKS).for_image(base).values())


def test_annotations_that_the_recipe_names_serve_all_scores(coco):
    named = {"images": "val2017", "annotations": "annotations/panoptic_val2017.json"}
    wanted = recipe(coco, val=named)
    data = open_dataset(wanted, "val")
    base = data.target(0)
    assert EvaluationTargets(wanted, "val", data, TASKS).for_image(base)["instance"] is base


def test_missing_files_and_images_are_named(coco):
    data = open_dataset(recipe(coco), "val")
    path = coco / "annotations/instances_val2017.json"
    document = json.loads(path.read_text())
    document["images"], document["annotations"] = document["images"][1:], []
    path.write_text(json.dumps(document))
    targets = EvaluationTargets(recipe(coco), "val", data, TASKS)
    with pytest.raises(DatasetError, match=r"data\.val, instance: image 10 has no annotation"):
        targets.for_image(data.target(0))
    path.unlink()
    with pytest.raises(DatasetError, match=r"instances_val2017\.json"):
        EvaluationTargets(recipe(coco), "val", data, TASKS)
    assert EvaluationTargets(recipe(coco), "val", data, ["panoptic"]).tasks == ("panoptic",)


def test_classes_that_the_model_does_not_know_are_refused(coco):
    things = open_dataset(recipe(coco, "instance"), "val")
    with pytest.raises(DatasetError, match="have the class 'sky', which the training data does not have"):
        EvaluationTargets(recipe(coco, "instance"), "val", things, ["panoptic"])


def test_ade20k_scores_classes_on_the_classes_and_objects_on_the_objects(tmp_path):
    """Pixels that have a class and no object are void to a panoptic model, but count for the IoU."""
    for folder in ("images", "annotations", "annotations_instance"):
        (tmp_path / folder / "validation").mkdir(parents=True)
    classes = np.ones((20, 30), np.uint8)
    classes[5:10, 5:10], classes[12:18, 5:15] = 13, 13  # two persons, of which one is no object
    objects = np.zeros((20, 30, 3), np.uint8)
    things = [category.name for category in load_categories("ade20k") if category.is_thing]
    objects[5:10, 5:10] = 1 + things.index("person"), 1, 0
    for folder, picture in (("annotations", classes), ("annotations_instance", objects), ("images", objects)):
        Image.fromarray(picture).save(tmp_path / folder / "validation/ADE_val_00000001.png")
    wanted = recipe(tmp_path, format="ade20k", categories=None)
    data = open_dataset(wanted, "val")
    targets = EvaluationTargets(wanted, "val", data, TASKS).for_image(data.target(0))
    person = next(label for label, category in enumerate(data.categories) if category.name == "person")
    pixels = {task: int((target.label_map(-1) == person).sum()) for task, target in targets.items()}
    assert pixels == {"semantic": 85, "instance": 25, "panoptic": 25}
    assert targets["instance"].labels.tolist() == [person]
    assert torch.equal(targets["instance"].id_maps > 0, torch.from_numpy(objects[None, ..., 0] > 0))


def test_training_asks_for_what_its_scores_will_need(coco):
    wanted = recipe(coco)
    wanted = wanted.model_copy(update={"evaluate": wanted.evaluate.model_copy(update={"metrics": ("pq", "ap")})})
    data = open_dataset(wanted, "val")
    check_evaluation(wanted, "val", data)
    (coco / "annotations/instances_val2017.json").unlink()
    with pytest.raises(DatasetError, match=r"instances_val2017\.json"):
        check_evaluation(wanted, "val", data)
