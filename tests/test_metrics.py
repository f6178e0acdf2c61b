"""Metrics against pycocotools, the panoptic API, hotcoco, a plain reading of the PQ protocol, and values by hand."""

import json
import pickle
from contextlib import redirect_stdout
from io import StringIO

import numpy as np
import pytest
import torch
from hotcoco.panoptic import PanopticEval
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich.console import Console

from maskwright.config.schema import DataConfig, EvaluateConfig, SplitConfig
from maskwright.data.formats.dispatch import open_annotations
from maskwright.errors import DatasetError
from maskwright.evaluation.metrics.average_precision import AveragePrecision, areas, boxes
from maskwright.evaluation.metrics.base import count_overlaps
from maskwright.evaluation.metrics.build import build_metrics
from maskwright.evaluation.metrics.mean_iou import MeanIoU
from maskwright.evaluation.metrics.panoptic_quality import PanopticQuality
from maskwright.evaluation.metrics.tables import format_table, format_tables
from maskwright.results.rle import encode_masks
from maskwright.results.segmentation import Segmentation
from maskwright.structures.annotations import Category, Target
from tests import cityscapes_tool
from tests.full_size import find, full_size

COCO_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def default_metric(task, classes):
    (metric,) = build_metrics(EvaluateConfig(task=task), classes)
    return metric


def categories(count, things=None):
    things = count if things is None else things
    return tuple(Category(i + 1, f"class {i}", i < things, (0, 0, 0)) for i in range(count))


def target(ids, labels, crowd=None, image_id=1, **annotated):
    ids = torch.as_tensor(np.asarray(ids), dtype=torch.int32)
    ids = ids[None] if ids.ndim == 2 else ids
    crowd = np.zeros(len(labels), bool) if crowd is None else crowd
    labels = torch.as_tensor(np.asarray(labels, dtype=np.int64))
    return Target(ids, labels, torch.as_tensor(np.asarray(crowd, bool)), image_id, tuple(ids.shape[-2:]), **annotated)


def semantic(label_map, classes):
    label_map = np.asarray(label_map, dtype=np.int64)
    return Segmentation("semantic", label_map.shape, classes, np.unique(label_map), label_map=label_map)


def panoptic(ids, labels, classes):
    ids = np.asarray(ids, dtype=np.int32)
    labels = np.asarray(labels, dtype=np.int64)
    return Segmentation("panoptic", ids.shape, classes, labels, np.ones(len(labels), np.float32), segment_map=ids)


def instances(masks, labels, scores, classes):
    masks = np.asarray(masks, dtype=bool)
    labels, scores = np.asarray(labels, dtype=np.int64), np.asarray(scores, dtype=np.float32)
    return Segmentation("instance", masks.shape[1:], classes, labels, scores, instance_masks=masks)


def column(scores, name):
    return [row[name] for row in scores["per_class"].values()]


def summary(scores):
    return {name: value for name, value in scores.items() if name not in ("images", "per_class")}


def scored(metric, pairs):
    for result, truth in pairs:
        metric.update(result, truth)
    return metric


def stack_layers(masks):
    """Masks that may overlap as id map layers, each object on the first layer that is free."""
    layers = [np.zeros(masks.shape[1:], np.int32)]
    for number, mask in enumerate(masks, 1):
        free = next((layer for layer in layers if not layer[mask].any()), None)
        if free is None:
            free = np.zeros_like(layers[0])
            layers.append(free)
        free[mask] = number
    return np.stack(layers)


# --- mean IoU ---------------------------------------------------------------------------------------------------------


def test_mean_iou_of_a_small_map_equals_the_values_by_hand():
    classes = categories(4)
    truth = target([[1, 1, 2], [1, 1, 2], [3, 0, 0]], [0, 1, 2], crowd=[False, False, True])
    scores = scored(MeanIoU(classes), [(semantic([[0, 0, 1], [0, 1, 2], [0, 1, 3]], classes), truth)]).compute()
    assert column(scores, "IoU") == pytest.approx([3 / 5, 1 / 3, 0, None])
    assert column(scores, "Acc") == pytest.approx([3 / 4, 1 / 2, 0, None])
    assert column(scores, "pixels") == [4, 2, 1, 0]  # the crowd is a pixel of its class
    assert scores["mIoU"] == pytest.approx((3 / 5 + 1 / 3 + 0) / 3)
    assert scores["mAcc"] == pytest.approx(5 / 12)
    assert scores["aAcc"] == pytest.approx(4 / 7)
    assert scores["fwIoU"] == pytest.approx((4 * 3 / 5 + 2 / 3) / 7)


def test_mean_iou_equals_a_set_computation_on_random_maps():
    rng, classes = np.random.default_rng(0), categories(300)
    truth = rng.integers(0, 280, (3, 40, 50))
    predicted = np.where(rng.random(truth.shape) < 0.4, truth, rng.integers(0, 290, truth.shape))
    ignored = rng.random(truth.shape) < 0.1
    metric = MeanIoU(classes)
    for i in range(3):
        labels, ids = np.unique(truth[i], return_inverse=True)
        ids = np.where(ignored[i], 0, ids.reshape(truth[i].shape) + 1)
        metric.update(semantic(predicted[i], classes), target(ids, labels, image_id=i))
    ious = []
    for label in range(300):
        a, b = (truth == label) & ~ignored, (predicted == label) & ~ignored
        ious.append((a & b).sum() / (a | b).sum() if (a | b).any() else None)
    scores = metric.compute()
    assert column(scores, "IoU") == pytest.approx(ious, abs=1e-12)
    assert scores["mIoU"] == pytest.approx(np.mean([v for v in ious if v is not None]), abs=1e-12)


def test_pixels_without_a_predicted_class_are_misses():
    classes = categories(2)
    truth = target([[1, 1, 1, 1]], [0])
    as_panoptic = panoptic([[1, 1, 0, 2]], [0, 1], classes)
    scores = scored(MeanIoU(classes), [(as_panoptic, truth)]).compute()
    assert column(scores, "IoU") == pytest.approx([0.5, 0.0])
    odd = Segmentation("semantic", (1, 4), classes, np.array([0, 1]), label_map=np.array([[0, 0, 255, 1]]))
    assert scored(MeanIoU(classes), [(odd, truth)]).compute() == scores


def test_nothing_to_score_gives_no_data_instead_of_zero():
    for task in ("semantic", "instance", "panoptic"):
        scores = default_metric(task, categories(3)).compute()
        assert set(summary(scores).values()) == {None}
        assert next(iter(scores)) == {"semantic": "mIoU", "instance": "AP", "panoptic": "PQ"}[task]
        assert scores["images"] == 0
    all_ignored = [(semantic(np.zeros((4, 4)), categories(2)), target(np.zeros((4, 4)), []))]
    assert scored(MeanIoU(categories(2)), all_ignored).compute()["mIoU"] is None


@pytest.mark.parametrize(("objects", "segments", "cell"), [(9, 7, 1), (9, 7, 40), (300, 299, 16), (0, 0, 8)])
def test_shared_pixels_are_counted_exactly_in_noise_and_in_regions_however_many(objects, segments, cell):
    rng = np.random.default_rng(0)
    block = np.ones((cell, cell), np.int32)
    truth, found = (np.kron(rng.integers(0, n + 1, (240 // cell, 320 // cell)), block) for n in (objects, segments))
    counts = count_overlaps(truth.astype(np.uint16), found, objects, segments)
    expected = np.zeros((objects + 1, segments + 1), np.int64)
    np.add.at(expected, (truth, found), 1)
    np.testing.assert_array_equal(counts, expected)
    assert counts.dtype == np.int64


# --- panoptic quality -------------------------------------------------------------------------------------------------


def plain_panoptic_quality(pairs, count):
    """The protocol with sets of pixels, one segment at a time: (tp, fp, fn, IoU sum) per class."""
    counts = [[0, 0, 0, 0.0] for _ in range(count)]
    for result, truth in pairs:
        ids = truth.id_maps[0].numpy()
        void = ids == 0
        labels, crowd = truth.labels.tolist(), truth.is_crowd.tolist()
        matched = set()
        for n, label in enumerate(result.labels.tolist()):
            segment = result.segment_map == n + 1
            if not segment.any():
                continue
            partner = None
            for t in (np.unique(ids[segment & ~void]) - 1).tolist():
                if crowd[t] or labels[t] != label:
                    continue
                iou = (segment & (ids == t + 1)).sum() / ((segment & ~void) | (ids == t + 1)).sum()
                if iou > 0.5:
                    partner = t
                    counts[label][0] += 1
                    counts[label][3] += iou
            if partner is not None:
                matched.add(partner)
                continue
            crowds = [t for t in range(len(labels)) if crowd[t] and labels[t] == label]
            ignored = void | (ids == crowds[-1] + 1) if crowds else void
            if (segment & ignored).sum() / segment.sum() <= 0.5:
                counts[label][1] += 1
        for t, label in enumerate(labels):
            if not crowd[t] and t not in matched:
                counts[label][2] += 1
    return counts


def plain_means(counts, members):
    rows = [counts[k] for k in members if sum(counts[k][:3])]
    if not rows:
        return None, None, None
    pq = np.mean([iou / (tp + fp / 2 + fn / 2) for tp, fp, fn, iou in rows])
    sq = np.mean([iou / tp if tp else 0 for tp, fp, fn, iou in rows])
    rq = np.mean([tp / (tp + fp / 2 + fn / 2) for tp, fp, fn, iou in rows])
    return pq, sq, rq


def check_against_plain(scores, pairs, classes):
    counts = plain_panoptic_quality(pairs, len(classes))
    groups = {
        "": range(len(classes)),
        "_th": [i for i, c in enumerate(classes) if c.is_thing],
        "_st": [i for i, c in enumerate(classes) if not c.is_thing],
    }
    for end, members in groups.items():
        found = [scores[name + end] for name in ("PQ", "SQ", "RQ")]
        assert found == pytest.approx(list(plain_means(counts, members)), abs=1e-9)
    for i, name in enumerate(("TP", "FP", "FN")):
        assert column(scores, name) == [row[i] for row in counts]


def write_panoptic(folder, name, segments, classes):
    """A COCO panoptic json and its PNG folder. `segments`: (id map, labels, crowd) per image."""
    (folder / name).mkdir(parents=True)
    annotations = []
    for image_id, (ids, labels, crowd) in enumerate(segments):
        Image.fromarray(np.stack([ids % 256, ids // 256, ids * 0], -1).astype(np.uint8)).save(
            folder / name / f"{image_id}.png"
        )
        infos = [
            {
                "id": n + 1,
                "category_id": classes[label].id,
                "iscrowd": int(crowd[n]),
                "area": int((ids == n + 1).sum()),
                "bbox": [0, 0, 1, 1],
            }
            for n, label in enumerate(labels)
            if (ids == n + 1).any()
        ]
        annotations.append({"image_id": image_id, "file_name": f"{image_id}.png", "segments_info": infos})
    images = [
        {"id": i, "file_name": f"{i}.jpg", "height": ids.shape[0], "width": ids.shape[1]}
        for i, (ids, _, _) in enumerate(segments)
    ]
    kinds = [{"id": c.id, "name": c.name, "isthing": int(c.is_thing)} for c in classes]
    (folder / f"{name}.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": kinds})
    )
    return folder / f"{name}.json"


def check_against_hotcoco(scores, pairs, classes, folder):
    truth = [(t.id_maps[0].numpy(), t.labels.tolist(), t.is_crowd.tolist()) for _, t in pairs]
    found = [(r.segment_map, r.labels.tolist(), [False] * len(r)) for r, _ in pairs]
    evaluator = PanopticEval(
        str(write_panoptic(folder, "truth", truth, classes)), str(write_panoptic(folder, "found", found, classes))
    )
    evaluator.evaluate()
    wanted = [None if value < 0 else value for value in evaluator.stats]
    assert list(summary(scores).values()) == pytest.approx(wanted, abs=1e-9)
    for i, category in enumerate(classes):
        row = evaluator.results()["per_class"][category.id]
        assert [column(scores, name)[i] for name in ("TP", "FP", "FN")] == [row["tp"], row["fp"], row["fn"]]
        value = column(scores, "PQ")[i]
        assert (-1.0 if value is None else value) == pytest.approx(row["pq"], abs=1e-9)


def check_against_reference(scores, pairs, classes, folder):
    """The copy of the COCO panoptic API that cityscapesscripts has."""
    truth = [(t.id_maps[0].numpy(), t.labels.tolist(), t.is_crowd.tolist()) for _, t in pairs]
    found = [(r.segment_map, r.labels.tolist(), [False] * len(r)) for r, _ in pairs]
    files = [write_panoptic(folder, name, rows, classes) for name, rows in (("truth", truth), ("found", found))]
    averages, counts = cityscapes_tool.panoptic_counts(*files)
    for end, group in (("", "All"), ("_th", "Things"), ("_st", "Stuff")):
        found = [scores[name + end] for name in ("PQ", "SQ", "RQ")]
        assert found == pytest.approx([averages[group][name] for name in ("pq", "sq", "rq")], abs=1e-9)
    for i, category in enumerate(classes):
        row = counts[category.id]
        assert [column(scores, name)[i] for name in ("TP", "FP", "FN")] == [row.tp, row.fp, row.fn]


def blobs(rng, size, count):
    """(H, W) ids 0..count of rectangles painted over each other; 0 stays where nothing is painted."""
    ids = np.zeros(size, np.int32)
    for number in range(1, count + 1):
        y, x = rng.integers(0, size[0] - 8), rng.integers(0, size[1] - 8)
        ids[y : y + rng.integers(4, 24), x : x + rng.integers(4, 24)] = number
    return ids


def renumbered(ids, labels):
    """Only the segments that still have a pixel, as a post-processor gives them."""
    kept = [n for n in range(1, len(labels) + 1) if (ids == n).any()]
    table = np.zeros(len(labels) + 1, np.int32)
    table[kept] = np.arange(1, len(kept) + 1)
    return table[ids], [labels[n - 1] for n in kept]


def disturbed(rng, ids, labels, classes):
    """A prediction that resembles the truth: shifted, some segments lost, some of a wrong class, some invented."""
    found = np.roll(ids, rng.integers(-2, 3, 2), (0, 1)).copy()
    found[np.isin(found, np.flatnonzero(rng.random(len(labels) + 1) < 0.15))] = 0
    wrong = rng.random(len(labels)) < 0.15
    new_labels = np.where(wrong, rng.integers(0, len(classes), len(labels)), labels).tolist()
    extra = blobs(rng, ids.shape, 4)
    found = np.where((extra > 0) & (rng.random() < 0.7), extra + len(labels), found)
    new_labels += rng.integers(0, len(classes), 4).tolist()
    return panoptic(*renumbered(found, new_labels), classes)


@pytest.mark.parametrize("seed", range(4))
def test_panoptic_quality_equals_the_protocol_thrice_on_random_images(tmp_path, seed):
    rng, classes = np.random.default_rng(seed), categories(6, things=3)
    pairs = []
    for image_id in range(6):
        ids, labels = renumbered(blobs(rng, (60, 70), 12), rng.integers(0, 5, 12).tolist())
        crowd = rng.random(len(labels)) < 0.25
        pairs.append((disturbed(rng, ids, labels, classes), target(ids, labels, crowd, image_id)))
    scores = scored(PanopticQuality(classes), pairs).compute()
    check_against_plain(scores, pairs, classes)
    check_against_reference(scores, pairs, classes, tmp_path / "reference")
    check_against_hotcoco(scores, pairs, classes, tmp_path / "hotcoco")


def read_panoptic(document, folder, limit, classes):
    position = {category.id: i for i, category in enumerate(classes)}
    for annotation in document["annotations"][:limit]:
        rgb = np.asarray(Image.open(folder / annotation["file_name"]).convert("RGB"), np.int64)
        raw = rgb @ [1, 256, 65536]
        ids = np.zeros(raw.shape, np.int32)
        for number, info in enumerate(annotation["segments_info"], 1):
            ids[raw == info["id"]] = number
        labels = [position[info["category_id"]] for info in annotation["segments_info"]]
        yield ids, labels, [info["iscrowd"] for info in annotation["segments_info"]], annotation["image_id"]


@pytest.mark.parametrize(
    "name",
    [
        "sample/annotations/panoptic_val",
        full_size("coco_panoptic/annotations/panoptic_val2017"),
        full_size("nuclei/annotations/panoptic_val"),
        full_size("ade20k_sample/ade20k_panoptic_train"),
        full_size("camvid_cityscapes_layout/gtFine/cityscapes_panoptic_val"),
    ],
)
def test_panoptic_quality_equals_the_protocol_thrice_on_real_annotations(tmp_path, name):
    rng = np.random.default_rng(1)
    document = json.loads(find(f"{name}.json").read_text())
    kinds = document["categories"]
    classes = tuple(Category(c["id"], c["name"], bool(c["isthing"]), (0, 0, 0)) for c in kinds)
    pairs, perfect = [], []
    for ids, labels, crowd, image_id in read_panoptic(document, find(name), 6, classes):
        truth = target(ids, labels, crowd, image_id)
        pairs.append((disturbed(rng, ids, labels, classes), truth))
        perfect.append((panoptic(ids, labels, classes), truth))
    scores = scored(PanopticQuality(classes), pairs).compute()
    assert 0 < scores["PQ"] < 1
    check_against_plain(scores, pairs, classes)
    check_against_reference(scores, pairs, classes, tmp_path / "reference")
    check_against_hotcoco(scores, pairs, classes, tmp_path / "hotcoco")
    assert scored(PanopticQuality(classes), perfect).compute()["PQ"] == 1


def test_predictions_on_void_or_on_a_crowd_of_their_class_are_no_false_positives():
    classes = categories(2)
    ids = np.zeros((4, 10), np.int32)
    ids[:, 5:] = 1
    truth = target(ids, [0], crowd=[True])
    found = np.zeros((4, 10), np.int32)
    found[:2, :4], found[2:, :4] = 1, 2  # on void
    found[:2, 5:], found[2:, 5:] = 3, 4  # on the crowd: its class, and another
    scores = scored(PanopticQuality(classes), [(panoptic(found, [0, 1, 0, 1], classes), truth)]).compute()
    assert column(scores, "FP") == [0, 1]
    assert column(scores, "FN") == [0, 0]
    assert column(scores, "PQ") == [None, 0.0]


def test_an_iou_of_exactly_one_half_is_no_match():
    classes = categories(1)
    truth = target([[1, 1, 1, 1]], [0])
    scores = scored(PanopticQuality(classes), [(panoptic([[1, 1, 0, 0]], [0], classes), truth)]).compute()
    assert [column(scores, name) for name in ("TP", "FP", "FN")] == [[0], [1], [1]]


def test_a_segment_with_exactly_half_of_its_pixels_in_void_is_a_false_positive():
    classes = categories(1)
    ids = np.array([[0, 0, 1, 1, 1, 1, 1, 1]])
    found = panoptic([[1, 1, 1, 1, 0, 0, 0, 0]], [0], classes)  # 2 of 4 pixels on void; IoU 2/6
    scores = scored(PanopticQuality(classes), [(found, target(ids, [0]))]).compute()
    assert [column(scores, name)[0] for name in ("TP", "FP", "FN")] == [0, 1, 1]


def test_a_predicted_segment_without_a_pixel_is_no_false_positive():
    classes, ids = categories(2), [[1, 1, 0, 0]]
    found = scored(PanopticQuality(classes), [(panoptic(ids, [0, 1], classes), target(ids, [0]))]).compute()
    assert column(found, "FP") == [0, 0]
    assert found["PQ"] == 1.0


def test_mean_iou_counts_objects_of_every_layer():
    classes = categories(2)
    layers = target([[[1, 1, 0, 0]], [[0, 2, 2, 0]]], [0, 1])
    found = scored(MeanIoU(classes), [(semantic([[0, 1, 1, 1]], classes), layers)])
    assert found.confusion.tolist() == [[1, 0, 0], [0, 2, 0], [0, 1, 0]]


def test_overlapping_truth_is_refused_by_panoptic_quality():
    classes = categories(1)
    truth = target(np.ones((2, 3, 3), np.int32) * [[[1]], [[2]]], [0, 0], image_id="cells/7.png")
    with pytest.raises(DatasetError, match=r"image cells/7.png: annotated objects overlap"):
        PanopticQuality(classes).update(panoptic(np.ones((3, 3)), [0], classes), truth)


# --- average precision ------------------------------------------------------------------------------------------------


def pycocotools_scores(dataset, results, kind, max_detections=(1, 10, 100)):
    with redirect_stdout(StringIO()):
        truth = COCO()
        truth.dataset = dataset
        truth.createIndex()
        evaluator = COCOeval(truth, truth.loadRes(results), kind)
        evaluator.params.maxDets = list(max_detections)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    precision = evaluator.eval["precision"][:, :, :, 0, -1]
    per_class = [p[p > -1].mean() if (p > -1).any() else None for p in np.moveaxis(precision, 2, 0)]
    return [None if value < 0 else value for value in evaluator.stats], per_class


def check_against_pycocotools(scores, dataset, pairs, classes):
    masks, frames = [], []
    for result, truth in pairs:
        rles = encode_masks(result.instance_masks)
        for rle, box, label, score in zip(rles, boxes(rles).tolist(), result.labels, result.scores, strict=True):
            row = {"image_id": truth.image_id, "category_id": classes[label].id, "score": float(score)}
            masks.append(row | {"segmentation": rle})
            frames.append(row | {"bbox": box})
    for prefix, results, kind in (("", masks, "segm"), ("box_", frames, "bbox")):
        wanted, per_class = pycocotools_scores(dataset, results, kind)
        assert [scores[prefix + name] for name in COCO_NAMES] == pytest.approx(wanted, abs=1e-9)
        assert column(scores, prefix + "AP") == pytest.approx(per_class, abs=1e-9)
    assert 0 < scores["AP"] < 1


def guessed(rng, masks, labels, classes):
    """Predictions that resemble the truth, with equal scores, wrong classes, lost and invented objects."""
    kept = rng.random(len(masks)) > 0.2
    found = [np.roll(mask, rng.integers(-3, 4, 2), (0, 1)) for mask in masks[kept]]
    found += [np.roll(mask, 40, 1) for mask in masks[:3]]
    guesses = [*labels[kept], *labels[:3]]
    wrong = rng.random(len(guesses)) < 0.1
    guesses = np.where(wrong, rng.integers(0, len(classes), len(guesses)), guesses)
    found = np.stack(found) if found else np.zeros((0, *masks.shape[1:]), bool)
    return instances(found, guesses, rng.integers(0, 12, len(guesses)) / 12, classes)


@pytest.mark.parametrize(
    ("folder", "name", "limit"),
    [
        ("sample", "instances_val", 8),
        full_size("coco_instance_100", "instances_val2017", 42),
        full_size("nuclei", "instances_val", 16),
    ],
)
@pytest.mark.parametrize("annotated", [True, False])
def test_average_precision_equals_pycocotools_on_real_annotations(folder, name, limit, annotated):
    rng = np.random.default_rng(2)
    with redirect_stdout(StringIO()):
        coco = COCO(find(folder) / "annotations" / f"{name}.json")
    kinds = sorted(coco.dataset["categories"], key=lambda c: c["id"])
    classes = tuple(Category(c["id"], c["name"], True, (0, 0, 0)) for c in kinds)
    position = {category.id: i for i, category in enumerate(classes)}
    images = coco.dataset["images"][:limit]
    pairs, annotations = [], []
    for image in images:
        rows = coco.loadAnns(coco.getAnnIds(image["id"]))
        shape = (image["height"], image["width"])
        masks = np.array([coco.annToMask(row) for row in rows], bool).reshape(-1, *shape)
        labels = np.array([position[row["category_id"]] for row in rows], np.int64)
        frames = np.array([row["bbox"] for row in rows], float).reshape(-1, 4)
        stated = {}
        if annotated:
            stated["areas"] = np.array([row["area"] for row in rows], float)
            stated["boxes"] = np.concatenate([frames[:, :2], frames[:, :2] + frames[:, 2:]], 1)
        else:
            rles = encode_masks(masks)
            rows = [
                row | {"segmentation": rle, "area": area, "bbox": box}
                for row, rle, area, box in zip(rows, rles, areas(rles), boxes(rles).tolist(), strict=True)
            ]
        crowd = [row["iscrowd"] for row in rows]
        truth = target(stack_layers(masks), labels, crowd, image["id"], **stated)
        pairs.append((guessed(rng, masks, labels, classes), truth))
        annotations += rows
    dataset = {"images": images, "annotations": annotations, "categories": kinds}
    rng.shuffle(pairs)  # pycocotools goes by image id; the order of updates must not matter
    check_against_pycocotools(scored(AveragePrecision(classes), pairs).compute(), dataset, pairs, classes)


@pytest.mark.parametrize(("root", "split"), [("sample", "val"), full_size("coco_instance_100", "val2017")])
def test_average_precision_of_a_read_data_set_equals_pycocotools_on_its_json(root, split):
    files = SplitConfig(images=split, annotations=f"annotations/instances_{split}.json")
    config = DataConfig(format="coco_instance", root=str(find(root)), task="instance", val=files)
    data, rng = open_annotations(config, "val"), np.random.default_rng(4)
    truths = [data.target(index) for index in range(len(data))]
    pairs = [(guessed(rng, t.masks.numpy(), t.labels.numpy(), data.categories), t) for t in truths]
    scores = scored(default_metric("instance", data.categories), pairs).compute()
    document = json.loads((find(root) / files.annotations).read_text())
    check_against_pycocotools(scores, document, pairs, data.categories)


def small_instances(seed, image_ids):
    """Pairs and the COCO dataset of the same truth: crowds, equal scores, images without objects or predictions."""
    rng, classes = np.random.default_rng(seed), categories(4)
    pairs, annotations = [], []
    for image_id in image_ids:
        count = 0 if image_id % 5 == 4 else 7
        masks = np.zeros((count, 120, 130), bool)
        for mask in masks:
            y, x, side = rng.integers(0, 60), rng.integers(0, 60), rng.integers(5, 110)
            mask[y : y + side, x : x + side] = True
        labels, crowd = rng.integers(0, 3, count), rng.random(count) < 0.2
        result = guessed(rng, masks, labels, classes)
        if image_id % 5 == 3:
            result = instances(np.zeros((0, 120, 130)), [], [], classes)
        pairs.append((result, target(stack_layers(masks), labels, crowd, image_id)))
        rles = encode_masks(masks)
        for rle, box, area, label, is_crowd in zip(rles, boxes(rles), areas(rles), labels, crowd, strict=True):
            row = {"id": len(annotations) + 1, "image_id": image_id, "category_id": int(label) + 1}
            row |= {"segmentation": rle, "bbox": box.tolist(), "area": float(area), "iscrowd": int(is_crowd)}
            annotations.append(row)
    images = [{"id": i, "height": 120, "width": 130} for i in image_ids]
    kinds = [{"id": c.id, "name": c.name} for c in classes]
    return pairs, {"images": images, "annotations": annotations, "categories": kinds}, classes


@pytest.mark.parametrize("seed", range(3))
def test_average_precision_equals_pycocotools_on_small_images(seed):
    pairs, dataset, classes = small_instances(seed, range(12))
    check_against_pycocotools(scored(AveragePrecision(classes), pairs).compute(), dataset, pairs, classes)


def test_average_precision_with_other_limits_is_taken_at_the_last():
    pairs, _, classes = small_instances(0, range(12))
    few = scored(AveragePrecision(classes, max_detections=(1, 2)), pairs).compute()
    many = scored(AveragePrecision(classes, max_detections=(1, 2, 500)), pairs).compute()
    assert [name for name in few if name.startswith("AR")] == ["AR1", "AR2", "ARs", "ARm", "ARl"]
    assert few["AR2"] == many["AR2"]
    assert few["AP"] < many["AP"]


def test_perfect_instances_score_one_and_stuff_is_left_out():
    classes = categories(3, things=2)
    ids = np.zeros((40, 40), np.int32)
    ids[:10, :10], ids[20:30, :10], ids[:, 30:] = 1, 2, 3
    masks = ids == np.arange(1, 4)[:, None, None]
    metric = scored(
        AveragePrecision(classes), [(instances(masks, [0, 1, 2], [1, 0.5, 1], classes), target(ids, [0, 1, 2]))]
    )
    scores = metric.compute()
    assert [scores[name] for name in ("AP", "box_AP", "AR1")] == pytest.approx([1, 1, 1], abs=1e-12)
    assert scores["APl"] is None
    assert column(scores, "AP") == [pytest.approx(1), pytest.approx(1), None]


def one_square(**annotated):
    """A perfect prediction of one object of 50 x 50 pixels, which are medium."""
    classes = categories(1)
    ids = np.zeros((200, 200), np.int32)
    ids[:50, :50] = 1
    pair = (instances(ids[None] > 0, [0], [1], classes), target(ids, [0], **annotated))
    return scored(AveragePrecision(classes), [pair]).compute()


def test_annotated_areas_decide_whether_an_object_is_small():
    measured, annotated = one_square(), one_square(areas=np.array([1000.0]))
    assert (measured["APs"], measured["APm"]) == (None, pytest.approx(1))
    assert (annotated["APs"], annotated["APm"]) == (pytest.approx(1), None)


def test_annotated_boxes_are_those_that_boxes_are_scored_by():
    twice_as_wide = np.array([[0.0, 0.0, 100.0, 50.0]])  # IoU 0.5 with the box of the mask
    assert one_square()["box_AP75"] == pytest.approx(1)
    scores = one_square(boxes=twice_as_wide)
    assert (scores["box_AP50"], scores["box_AP75"], scores["AP"]) == (pytest.approx(1), 0, pytest.approx(1))


def test_categories_without_a_thing_are_refused_by_average_precision():
    with pytest.raises(DatasetError, match="every category is stuff"):
        default_metric("instance", categories(2, things=0))


def test_text_image_ids_score_as_numbers_do_and_order_does_not_matter():
    pairs, _, classes = small_instances(3, range(8))
    for _, truth in pairs:
        truth.image_id = f"folder/{truth.image_id}.png"
    forwards = scored(AveragePrecision(classes), pairs).compute()
    assert forwards == scored(AveragePrecision(classes), pairs[::-1]).compute()
    assert forwards["AP"] > 0


# --- what all metrics share -------------------------------------------------------------------------------------------


def example_pairs(task):
    if task == "instance":
        return small_instances(5, range(9))[::2]
    rng, classes, pairs = np.random.default_rng(5), categories(5, things=3), []
    for image_id in range(9):
        ids, labels = renumbered(blobs(rng, (50, 50), 9), rng.integers(0, 5, 9).tolist())
        truth = target(ids, labels, image_id=image_id)
        if task == "semantic":
            pairs.append((semantic(rng.integers(0, 5, (50, 50)), classes), truth))
        else:
            pairs.append((disturbed(rng, ids, labels, classes), truth))
    return pairs, classes


@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
def test_merged_metrics_of_processes_equal_one_metric_exactly(task):
    pairs, classes = example_pairs(task)
    whole = scored(default_metric(task, classes), pairs)
    parts = [pickle.loads(pickle.dumps(scored(default_metric(task, classes), pairs[i::3]))) for i in range(3)]
    merged = default_metric(task, classes)
    for part in reversed(parts):
        merged.merge(part)
    assert merged.compute() == whole.compute()
    assert merged.compute()["images"] == 9


@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
def test_scores_can_be_computed_between_updates(task):
    pairs, classes = example_pairs(task)
    metric = scored(default_metric(task, classes), pairs[:4])
    early = metric.compute()
    assert scored(metric, pairs[4:]).compute() == scored(default_metric(task, classes), pairs).compute()
    assert early == scored(default_metric(task, classes), pairs[:4]).compute()


@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
def test_an_image_is_scored_only_once(task):
    pairs, classes = example_pairs(task)
    metric = scored(default_metric(task, classes), pairs[:2])
    with pytest.raises(ValueError, match="image 1 is scored twice"):
        metric.update(*pairs[1])
    with pytest.raises(ValueError, match="image 0 is scored twice"):
        metric.merge(scored(default_metric(task, classes), pairs[:1]))


@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
def test_results_that_do_not_fit_are_refused(task):
    pairs, classes = example_pairs(task)
    metric = default_metric(task, classes)
    with pytest.raises(ValueError, match="the result has size"):
        metric.update(pairs[0][0], target(np.ones((7, 7)), [0]))
    with pytest.raises(ValueError, match="categories"):
        default_metric(task, classes[:-1]).update(*pairs[0])
    with pytest.raises(ValueError, match="cannot merge"):
        metric.merge(default_metric(task, classes[:-1]))
    other = "semantic" if task == "instance" else "instance"
    with pytest.raises(ValueError, match=r"needs an? "):
        default_metric(other, classes).update(*pairs[0])
    assert not metric.image_ids


def test_scores_become_json_and_tables_with_gaps_for_no_data():
    pairs, classes = example_pairs("panoptic")
    scores = scored(PanopticQuality(classes), pairs).compute()
    assert json.loads(json.dumps(scores)) == scores
    console = Console(file=StringIO(), width=120)
    console.print(format_table(scores), *format_tables(scores), format_table(MeanIoU(classes).compute()))
    rows = [line.split() for line in console.file.getvalue().splitlines()]
    assert ["│", "PQ", "│", f"{100 * scores['PQ']:.2f}", "│"] in rows
    assert ["│", "mIoU", "│", "-", "│"] in rows
    assert str(scores["per_class"]["class 4"]["FP"]) in next(row for row in rows if row[1:3] == ["class", "4"])


def test_classes_of_one_name_are_told_apart_by_their_id():
    classes = (Category(3, "door", True, (0, 0, 0)), Category(8, "door", True, (0, 0, 0)))
    assert list(MeanIoU(classes).compute()["per_class"]) == ["door (3)", "door (8)"]
