"""The Cityscapes scores against Cityscapes' own tool, on scenes made here and on real frames in its layout."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from maskwright.config.recipe import parse_recipe
from maskwright.config.schema import DataConfig
from maskwright.data.formats.dispatch import open_annotations
from maskwright.errors import DatasetError, MaskwrightError
from maskwright.evaluation.metrics import cityscapes_ap
from maskwright.evaluation.metrics.cityscapes_ap import CityscapesAP
from maskwright.evaluation.metrics.cityscapes_iou import CityscapesIoU
from maskwright.structures.annotations import Category
from tests import cityscapes_tool as tool
from tests import tiny
from tests.full_size import DATA, needs_full_size
from tests.test_metrics import instances, scored, semantic, target

CLASSES, LABELS = tool.CLASSES, tool.LABELS
LAYOUT = DATA / "camvid_cityscapes_layout" / "gtFine"


def approx(values):
    return pytest.approx(values, abs=1e-9)


def guessed_labels(rng, instance_ids):
    """A semantic result that resembles the truth, with the void filled, whole objects and blocks wrong."""
    found = np.vectorize(lambda value: LABELS.get(value, 0))(tool.label_ids(instance_ids))
    found = np.roll(found, rng.integers(-3, 4, 2), (0, 1))
    for value in np.unique(instance_ids[instance_ids > 1000]):
        if rng.random() < 0.3:
            found[instance_ids == value] = rng.integers(11, 19)
    for _ in range(4):
        top, left = rng.integers(0, found.shape[0] - 8), rng.integers(0, found.shape[1] - 8)
        found[top : top + 20, left : left + 20] = rng.integers(0, 19)
    return semantic(found, CLASSES)


def guessed_instances(rng, instance_ids):
    """Instances that resemble the truth: moved, lost, doubled, of a wrong class, on groups, on void, tiny, empty."""
    masks, labels = [], []
    for value in np.unique(instance_ids):
        label = LABELS.get(int(value if value < 1000 else value // 1000), rng.integers(11, 19))
        for _ in range(rng.integers(0, 4)):
            mask = np.roll(instance_ids == value, rng.integers(-2, 3, 2), (0, 1))
            if rng.random() < 0.2:
                mask[: rng.integers(mask.shape[0])] = False
            masks.append(mask)
            labels.append(label if rng.random() < 0.9 else rng.integers(0, 19))
    masks.append(np.zeros(instance_ids.shape, bool))
    labels.append(13)
    for label in range(11, 19):  # the tool fails where it ignores every prediction of a class
        masks.append(instance_ids == np.unique(instance_ids[instance_ids > 6])[0])
        labels.append(label)
    return instances(np.stack(masks), labels, rng.integers(0, 15, len(masks)) / 15, CLASSES)


def write_labels(folder, name, result):
    folder.mkdir(parents=True, exist_ok=True)
    ids = np.array([category.id for category in CLASSES], np.uint8)
    Image.fromarray(ids[result.label_map]).save(folder / f"{name}_found.png")


def write_instances(folder, name, result):
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (mask, label, score) in enumerate(
        zip(result.instance_masks, result.labels, result.scores, strict=True)
    ):
        Image.fromarray(mask).save(folder / f"{name}_{number}_mask.png")
        lines.append(f"{name}_{number}_mask.png {CLASSES[label].id} {float(score)!r}\n")
    (folder / f"{name}_found.txt").write_text("".join(lines))


def frames(seed, count=5):
    rng = np.random.default_rng(seed)
    return [(f"nowhere_{seed:06d}_{number:06d}", tool.scene(rng)) for number in range(count)]


def real_frames(split):
    for path in sorted(LAYOUT.glob(f"{split}/*/*_gtFine_instanceIds.png")):
        yield path.name.removesuffix("_gtFine_instanceIds.png"), np.asarray(Image.open(path)).astype(np.int32)


def check(metric, write, guess, official, compare, named_frames, folder, seed=0):
    """Score guesses with the metric, write them as files, and compare with what the official tool says of those."""
    rng, pairs, truths = np.random.default_rng(seed), [], []
    for name, instance_ids in named_frames:
        tool.write_truth(folder / "truth", name, instance_ids)
        result = guess(rng, instance_ids)
        write(folder / "found", name, result)
        pairs.append((result, tool.target(instance_ids, name)))
        truths.append(folder / "truth" / f"{name}_gtFine_{official[1]}.png")
    scores = scored(metric, pairs).compute()
    compare(scores, official[0](folder / "found", truths), approx)
    return scores


PIXELS = (CityscapesIoU, write_labels, guessed_labels, (tool.pixel_scores, "labelIds"), tool.check_pixel_scores)
OBJECTS = (
    CityscapesAP,
    write_instances,
    guessed_instances,
    (tool.instance_scores, "instanceIds"),
    tool.check_instance_scores,
)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", [PIXELS, OBJECTS], ids=["pixels", "objects"])
def test_scores_equal_the_official_tool_on_scenes_with_all_that_is_special(tmp_path, kind, seed):
    scores = check(kind[0](CLASSES), *kind[1:], frames(seed), tmp_path, seed)
    assert 0.05 < scores["iIoU" if kind is PIXELS else "AP"] < 0.95


@needs_full_size
@pytest.mark.parametrize("split", ["val", "train"])
@pytest.mark.parametrize("kind", [PIXELS, OBJECTS], ids=["pixels", "objects"])
def test_scores_equal_the_official_tool_on_real_frames(tmp_path, kind, split):
    scores = check(kind[0](CLASSES), *kind[1:], real_frames(split), tmp_path)
    assert 0.05 < scores["iIoU" if kind is PIXELS else "AP"] < 0.95
    assert scores["per_class"]["bus"]["IoU" if kind is PIXELS else "AP"] in (None, 0)


@pytest.mark.parametrize("task", ["instance", "panoptic"])
@pytest.mark.parametrize("seed", range(2))
def test_what_the_reader_gives_is_scored_as_the_official_tool_does(tmp_path, task, seed):
    rng, pairs, truths = np.random.default_rng(seed), [], []
    for name, ids in frames(seed):
        tool.write_truth(tmp_path / "gtFine/val/nowhere", name, ids)
        truths.append(tmp_path / "gtFine/val/nowhere" / f"{name}_gtFine_instanceIds.png")
        (tmp_path / "leftImg8bit/val/nowhere").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((*ids.shape, 3), np.uint8)).save(
            tmp_path / f"leftImg8bit/val/nowhere/{name}_leftImg8bit.png"
        )
    data = open_annotations(DataConfig(format="cityscapes", root=str(tmp_path), task=task), "val")
    own = {category.name: label for label, category in enumerate(data.categories)}
    for index, (name, ids) in enumerate(frames(seed)):
        found = guessed_instances(rng, ids)
        write_instances(tmp_path / "found", name, found)
        kept = [i for i, label in enumerate(found.labels) if CLASSES[label].name in own]
        labels = [own[CLASSES[label].name] for label in found.labels[kept]]
        result = instances(found.instance_masks[kept], labels, found.scores[kept], data.categories)
        pairs.append((result, replace(data, task="panoptic").target(index)))
    scores = scored(CityscapesAP(data.categories), pairs).compute()
    tool.check_instance_scores(scores, tool.instance_scores(tmp_path / "found", truths), approx)
    assert any(target.void is not None for _, target in pairs)


def test_instances_of_classes_that_do_not_count_are_no_void(tmp_path):
    ids = np.full((40, 60), 7, np.int32)
    ids[:, 30:] = 29001  # one caravan; 29 would be void
    ids[:10, :10] = 26001
    masks = np.stack([ids == 29001, ids == 26001])

    def guess(rng, instance_ids):
        return instances(masks, [13, 13], [0.9, 0.5], CLASSES)

    scores = check(CityscapesAP(CLASSES), write_instances, guess, *OBJECTS[3:], [("a_000000_000000", ids)], tmp_path)
    assert scores["AP"] == 0.25
    ids[:, 30:] = 29
    scores = check(CityscapesAP(CLASSES), write_instances, guess, *OBJECTS[3:], [("a_000000_000001", ids)], tmp_path)
    assert scores["AP"] == 1


@pytest.mark.parametrize(("columns", "expected"), [(20, 0.0), (21, 1.0)])
def test_a_prediction_with_an_iou_of_exactly_one_half_is_no_match(columns, expected):
    """COCO's rule counts it."""
    ids = np.zeros((64, 64), np.int32)
    ids[:40, :40] = 1
    mask = np.zeros((1, 64, 64), bool)
    mask[0, :40, :columns] = True
    label = next(i for i, category in enumerate(CLASSES) if category.name == "car")
    pair = (instances(mask, [label], [1.0], CLASSES), target(ids, [label]))
    assert scored(CityscapesAP(CLASSES), [pair]).compute()["AP50"] == pytest.approx(expected)


def test_a_class_of_which_every_prediction_is_ignored_scores_zero():
    ids = np.zeros((40, 60), np.int32)
    ids[:20, :20], ids[30:, 30:] = 26001, 24
    result = instances([np.zeros((40, 60), bool) | (ids == 24), ids == 0], [11, 13], [1, 1], CLASSES)
    scores = scored(CityscapesAP(CLASSES), [(result, tool.target(ids, "one"))]).compute()
    assert scores["per_class"]["car"] == {"AP": 0.0, "AP50": 0.0}
    assert scores["per_class"]["person"] == {"AP": None, "AP50": None}
    assert scores["AP"] == 0


def test_without_void_in_the_target_pixels_without_an_object_are_void():
    ids = np.zeros((40, 60), np.int32)
    ids[:20, :20] = 26001
    truth = tool.target(ids, "one")
    result = instances([ids == 0, ids == 26001], [13, 13], [1, 0.5], CLASSES)
    known = scored(CityscapesAP(CLASSES), [(result, truth)]).compute()
    truth.void = None
    assert scored(CityscapesAP(CLASSES), [(result, truth)]).compute() == known
    assert known["AP"] == 1
    truth.void = np.zeros((40, 60), bool)  # all of it is background
    assert scored(CityscapesAP(CLASSES), [(result, truth)]).compute()["AP"] == 0.25


@pytest.mark.parametrize("kind", [PIXELS, OBJECTS], ids=["pixels", "objects"])
def test_shares_of_processes_merge_exactly(kind):
    rng = np.random.default_rng(3)
    pairs = [(kind[2](rng, ids), tool.target(ids, name)) for name, ids in frames(7, 7)]
    merged = kind[0](CLASSES)
    for i in (2, 0, 1):
        merged.merge(pickle.loads(pickle.dumps(scored(kind[0](CLASSES), pairs[i::3]))))
    assert merged.compute() == scored(kind[0](CLASSES), pairs).compute()
    assert merged.compute()["images"] == 7


@pytest.mark.parametrize("kind", [CityscapesIoU, CityscapesAP])
def test_nothing_to_score_has_no_data(kind):
    scores = kind(CLASSES).compute()
    tables = [scores.pop(name) for name in ("per_class", "per_category") if name in scores]
    assert scores.pop("images") == 0
    assert set(scores.values()) == {None}
    assert {value for table in tables for row in table.values() for value in row.values()} <= {None, 0}


@pytest.mark.parametrize("kind", [CityscapesIoU, CityscapesAP])
def test_other_classes_than_those_of_cityscapes_are_refused(kind):
    with pytest.raises(DatasetError, match="19 classes, but 'cat' is not one of them"):
        kind([*CLASSES, Category(99, "cat", True, (0, 0, 0))])


def test_classes_without_a_group_are_refused_by_the_iou():
    with pytest.raises(DatasetError, match="'car' has no group"):
        CityscapesIoU([replace(category, group=None) if category.name == "car" else category for category in CLASSES])


def test_cityscapes_without_things_has_no_ap():
    with pytest.raises(DatasetError, match="every category is stuff"):
        CityscapesAP([category for category in CLASSES if not category.is_thing])


def test_a_recipe_without_instance_ids_cannot_ask_for_cityscapes_scores(tmp_path):
    with pytest.raises(
        MaskwrightError, match=r"cityscapes_iou, which needs Cityscapes' instance ids .* label_maps has neither"
    ):
        parse_recipe(tiny.values(tmp_path, "semantic", evaluate__metrics=["cityscapes_iou"]), "tiny")
    with pytest.raises(
        MaskwrightError, match="ap and cityscapes_ap, whose scores have the same names; keep one of them"
    ):
        parse_recipe(tiny.values(tmp_path, evaluate__metrics=["ap", "cityscapes_ap"]), "tiny")
    with pytest.raises(MaskwrightError, match=r"has duplicates"):
        parse_recipe(tiny.values(tmp_path, evaluate__metrics=["ap", "ap"]), "tiny")


def test_a_second_match_of_an_object_is_false_even_if_half_of_it_is_void():
    """As in the official tool, which ignores predictions without a match only."""
    iou, scores = np.array([[0.7], [0.7], [0.0]]), np.array([0.9, 0.8, 0.7])
    outcomes = cityscapes_ap._outcomes(iou, scores, np.zeros(3), np.array([0.6, 0.6, 0.6]))
    assert outcomes[:, 0].tolist() == [cityscapes_ap._TRUE, cityscapes_ap._FALSE, cityscapes_ap._IGNORED]
