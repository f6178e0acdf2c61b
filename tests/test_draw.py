"""Overlays, curves and the report. Expected colors are worked out by hand from the blend's formula."""

import base64
import colorsys
import io
import json
import logging
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import PIL.Image
import pytest
import torch

from maskwright.results import draw
from maskwright.results.draw import overlay_target
from maskwright.results.segmentation import Segmentation
from maskwright.structures.annotations import Category, Target
from maskwright.training import report as report_module
from maskwright.training.curves import run_figure
from maskwright.training.read_logs import read_merged_rows

CATEGORIES = (
    Category(3, "nucleus", True, (200, 40, 0)),
    Category(7, "background", False, (0, 0, 100)),
)


def gray(height: int = 8, width: int = 8, value: int = 100) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def panoptic(segment_map: np.ndarray, labels: list[int], **more) -> Segmentation:
    return Segmentation("panoptic", segment_map.shape, CATEGORIES, np.array(labels), segment_map=segment_map, **more)


def instances(masks: np.ndarray, scores: list[float], **more) -> Segmentation:
    labels = np.zeros(len(masks), np.int64)
    scores = np.array(scores, np.float32)
    return Segmentation("instance", masks.shape[1:], CATEGORIES, labels, scores=scores, instance_masks=masks, **more)


def target(id_map: list[list[int]], labels: list[int], crowd: tuple[int, ...] = ()) -> Target:
    maps = torch.tensor(id_map, dtype=torch.int32)[None]
    is_crowd = torch.tensor([n in crowd for n in range(len(labels))], dtype=torch.bool)
    return Target(maps, torch.tensor(labels, dtype=torch.int64), is_crowd, 1, tuple(maps.shape[-2:]))


def bright_pixels(picture: PIL.Image.Image) -> int:
    return int((np.asarray(picture) > 150).all(-1).sum())


# Overlays


def test_semantic_classes_are_blended_in_their_colors():
    label_map = np.array([[0, 1], [1, 0]])
    result = Segmentation("semantic", (2, 2), CATEGORIES, np.array([0, 1]), label_map=label_map)
    painted = np.asarray(draw.overlay(result, gray(2, 2), alpha=0.25))
    assert painted[0, 0].tolist() == [125, 85, 75]
    assert painted[0, 1].tolist() == [75, 75, 100]


def test_pixels_without_a_segment_keep_the_image():
    segment_map = np.zeros((8, 8), np.int32)
    segment_map[2:6, 2:6] = 1
    image = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    painted = np.asarray(draw.overlay(panoptic(segment_map, [0]), image))
    assert (painted[segment_map == 0] == image[segment_map == 0]).all()
    assert (painted[segment_map == 1] != image[segment_map == 1]).any(-1).all()


@pytest.mark.parametrize("result", [panoptic(np.zeros((8, 8), np.int32), []), instances(np.zeros((0, 8, 8), bool), [])])
def test_a_result_without_segments_is_the_image(result):
    assert (np.asarray(draw.overlay(result, gray())) == gray()).all()


def test_an_empty_mask_is_no_trouble():
    assert (np.asarray(draw.overlay(instances(np.zeros((1, 8, 8), bool), [0.9]), gray())) == gray()).all()


def test_the_outline_is_opaque_and_the_inside_is_not():
    segment_map = np.zeros((8, 8), np.int32)
    segment_map[1:7, 1:7] = 1
    painted = np.asarray(draw.overlay(panoptic(segment_map, [0]), gray()))
    assert painted[1, 3].tolist() == [200, 40, 0]
    assert painted[3, 3].tolist() == [150, 70, 50]


def test_panoptic_things_differ_in_shade_and_stuff_keeps_its_color():
    segment_map = np.repeat(np.arange(1, 9, dtype=np.int32)[None], 8, axis=0)
    painted = np.asarray(draw.overlay(panoptic(segment_map, [0, 0, 0, 0, 0, 0, 1, 1]), gray(), alpha=1))[4]
    assert painted[0].tolist() == [200, 40, 0]
    assert len({tuple(color) for color in painted[:6].tolist()}) == 6
    assert painted[6].tolist() == painted[7].tolist() == [0, 0, 100]


def test_a_hundred_instances_have_a_hundred_colors():
    masks = np.eye(100, dtype=bool).reshape(100, 10, 10)
    painted = np.asarray(draw.overlay(instances(masks, [0.9] * 100), gray(10, 10)))
    assert len(np.unique(painted.reshape(-1, 3), axis=0)) == 100


def test_the_instance_with_the_higher_score_lies_on_top():
    masks = np.ones((2, 8, 8), bool)
    alone = np.asarray(draw.overlay(instances(masks[:1], [0.9]), gray()))
    both = np.asarray(draw.overlay(instances(masks, [0.9, 0.6]), gray()))
    assert (both == alone).all()


def test_weak_instances_are_left_out_unless_asked_for():
    weak = instances(np.ones((1, 8, 8), bool), [0.2])
    assert (np.asarray(draw.overlay(weak, gray())) == gray()).all()
    assert (np.asarray(draw.overlay(weak, gray(), min_score=0.1)) != gray()).any()


def test_large_segments_carry_their_name_and_small_ones_do_not():
    large = np.ones((120, 200), np.int32)
    many = np.zeros((120, 200), np.int32)
    many[4::10, 4::10] = many[5::10, 4::10] = many[4::10, 5::10] = np.arange(1, 241).reshape(12, 20)
    black = gray(120, 200, 0)
    assert bright_pixels(draw.overlay(panoptic(large, [1], scores=np.ones(1, np.float32)), black)) > 20
    assert bright_pixels(draw.overlay(panoptic(many, [0] * 240, scores=np.ones(240, np.float32)), black)) == 0


def test_a_score_that_does_not_fit_is_dropped_before_the_name():
    narrow = np.zeros((120, 200), np.int32)
    narrow[:, :52] = 1
    with_score = draw.overlay(panoptic(narrow, [0], scores=np.ones(1, np.float32)), gray(120, 200, 0))
    without = draw.overlay(panoptic(narrow, [0]), gray(120, 200, 0))
    assert bright_pixels(with_score) > 0
    assert (np.asarray(with_score) == np.asarray(without)).all()


def test_the_result_s_own_image_is_used_when_none_is_given():
    segment_map = np.ones((8, 8), np.int32)
    own = draw.overlay(panoptic(segment_map, [0], image=gray()))
    assert (np.asarray(own) == np.asarray(draw.overlay(panoptic(segment_map, [0]), gray()))).all()


def test_gray_arrays_and_pil_images_are_taken():
    result = panoptic(np.ones((8, 8), np.int32), [0])
    expected = np.asarray(draw.overlay(result, gray()))
    assert (np.asarray(draw.overlay(result, gray()[..., 0])) == expected).all()
    assert (np.asarray(draw.overlay(result, PIL.Image.fromarray(gray()[..., 0]))) == expected).all()


@pytest.mark.parametrize(
    ("image", "alpha", "message"),
    [
        (None, 0.5, "no image"),
        (gray(8, 9), 0.5, r"\(8, 9, 3\) uint8, but the segments need \(8, 8, 3\)"),
        (gray().astype(np.float32), 0.5, "float32"),
        (gray(), 1.5, r"alpha is 1.5, expected 0\.\.1"),
    ],
)
def test_a_wrong_call_says_what_was_expected(image, alpha, message):
    with pytest.raises(ValueError, match=message):
        draw.overlay(panoptic(np.ones((8, 8), np.int32), [0]), image, alpha)


# Ground truth


def test_semantic_truth_leaves_void_bare_and_paints_crowds_as_their_class():
    truth = target([[0, 1], [2, 3]], [0, 1, 0], crowd=(2,))
    painted = np.asarray(overlay_target(truth, gray(2, 2), CATEGORIES, "semantic"))
    assert painted[0, 0].tolist() == [100, 100, 100]
    assert painted[0, 1].tolist() == painted[1, 1].tolist() == [150, 70, 50]
    assert painted[1, 0].tolist() == [50, 50, 100]


def test_instance_truth_leaves_stuff_bare():
    painted = np.asarray(overlay_target(target([[1, 2]], [0, 1]), gray(1, 2), CATEGORIES, "instance"))
    assert painted[0, 0].tolist() != [100, 100, 100]
    assert painted[0, 1].tolist() == [100, 100, 100]


def test_panoptic_truth_looks_like_a_panoptic_result():
    id_map = [[1, 1, 2, 0], [1, 1, 2, 0]]
    painted = overlay_target(target(id_map, [0, 1]), gray(2, 4), CATEGORIES, "panoptic")
    result = panoptic(np.array(id_map, np.int32), [0, 1])
    assert (np.asarray(painted) == np.asarray(draw.overlay(result, gray(2, 4)))).all()


@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
def test_truth_without_objects_is_the_image(task):
    painted = overlay_target(target([[0, 0], [0, 0]], []), gray(2, 2), CATEGORIES, task)
    assert (np.asarray(painted) == gray(2, 2)).all()


# Curves


def write_log(path, steps=range(10, 400, 10), tail=""):
    rows = [
        {"step": s, "loss": 9 / s, "loss_class": 4 / s, "loss_mask": 5 / s, "learning_rate": 1e-4, "gradient_norm": s}
        for s in steps
    ]
    rows += [{"step": s, "evaluation": {"PQ": s / 1000, "SQ": None, "images": 8, "per_class": {}}} for s in (200, 400)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail, encoding="utf-8")
    return path


def test_curves_are_drawn_from_a_log_that_is_being_written(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        report_module.curves(write_log(tmp_path / "log.jsonl", tail='{"step": 400, "lo'), tmp_path / "curves.png")
    picture = PIL.Image.open(tmp_path / "curves.png")
    assert picture.width > 1000
    assert not caplog.records


@pytest.mark.parametrize("content", ["", '{"step": 10, "loss": 3.0}\n', '{"step": 5, "evaluation": {"PQ": null}}\n'])
def test_curves_of_a_run_that_has_hardly_begun(tmp_path, content):
    (tmp_path / "log.jsonl").write_text(content)
    report_module.curves(tmp_path / "log.jsonl", tmp_path / "curves.png")
    assert PIL.Image.open(tmp_path / "curves.png").size


def test_a_broken_line_in_the_middle_is_told(tmp_path, caplog):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo\n{"step": 3, "loss": 1.0}\n')
    report_module.curves(tmp_path / "log.jsonl", tmp_path / "curves.png")
    assert "log.jsonl, line 2" in caplog.text


def test_values_that_are_not_finite_leave_a_gap(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "gradient_norm": Infinity}\n{"step": 2, "gradient_norm": 1.5}\n')
    figure = run_figure(read_merged_rows(tmp_path / "log.jsonl"))
    norms = next(axes for axes in figure.axes if axes.get_title("left") == "Gradient norm")
    assert [line.get_xydata().tolist() for line in norms.lines] == [[[2, 1.5]], [[2, 1.5]]]


# The report

EVALUATION = {
    "PQ": 0.5712,
    "PQ_stuff": None,
    "images": 8,
    "per_class": {"nucleus": {"PQ": 0.25, "TP": 3}, "<i>odd</i>": {"PQ": None, "TP": 0}},
}


def write_report(folder, **changes):
    parts = {
        "recipe_yaml": "name: demo # <script>alert(1)</script>\n",
        "evaluation": EVALUATION,
        "images": [("a<b.png", PIL.Image.new("RGB", (30, 20), "red"), PIL.Image.new("RGB", (2000, 10), "blue"))],
        "categories": CATEGORIES,
        "facts": {"device": "cpu & more", "steps": 400},
    }
    report_module.report(folder, folder / "report.html", **(parts | changes))
    return (folder / "report.html").read_text(encoding="utf-8")


class Outline(HTMLParser):
    """The elements and the text of a page; an element that is never closed raises."""

    def __init__(self):
        super().__init__()
        self.open, self.sources, self.tags, self.words = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def outline(page: str) -> Outline:
    parser = Outline()
    parser.feed(page)
    assert not parser.open
    return parser


def test_the_report_is_whole_and_needs_nothing_from_elsewhere(tmp_path):
    write_log(tmp_path / "log.jsonl")
    page = write_report(tmp_path)
    parser = outline(page)
    assert len(parser.sources) == 3
    assert all(source.startswith("data:image/") for source in parser.sources)
    assert "://" not in page
    assert not re.search(r"@import|url\(", page)


def test_images_of_the_report_can_be_opened(tmp_path):
    sources = outline(write_report(tmp_path)).sources
    sizes = [PIL.Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).size for source in sources]
    assert sizes == [(30, 20), (1024, 5)]


def test_the_image_is_shown_beside_prediction_and_ground_truth(tmp_path):
    image = PIL.Image.new("RGB", (8, 8))
    words = outline(write_report(tmp_path, images=[("x", image, image, image)])).words
    assert [word for word in words if word in ("prediction", "ground truth", "image")] == [
        "prediction",
        "ground truth",
        "image",
    ]


def test_the_report_shows_shares_in_percent_counts_as_they_are_and_no_data_as_a_dash(tmp_path):
    words = [word.strip() for word in outline(write_report(tmp_path)).words]
    assert words[words.index("PQ") - 2 : words.index("PQ")] == ["57.1", "%"]
    assert words[words.index("PQ_stuff") - 1] == "–"
    assert words[words.index("images") - 1] == "8"
    assert words[words.index("nucleus") : words.index("nucleus") + 3] == ["nucleus", "25.0", "3"]


def test_text_from_outside_is_escaped(tmp_path):
    page = write_report(tmp_path)
    assert outline(page).tags.count("script") == 1
    for text in ("&lt;script&gt;alert(1)", "&lt;i&gt;odd&lt;/i&gt;", "a&lt;b.png", "cpu &amp; more"):
        assert text in page


def test_sections_without_content_are_left_out(tmp_path):
    page = write_report(tmp_path, evaluation={}, images=[], facts={}, recipe_yaml="")
    assert "<section>" not in page
    outline(page)


def test_label_goes_where_the_largest_box_of_its_shape_fits():
    inside = np.zeros((40, 60), bool)
    inside[:, :8] = True  # a column that is too narrow for the text
    inside[24:, 10:50] = True
    row, column = draw._text_center(inside, 3, 10)
    assert (row, column) == (32.0, 30.0)  # of the boxes of four times the size, the middle one
    assert draw._text_center(inside, 3, 58) is None  # five sixths of it are not enough
    assert draw._text_center(np.ones((2, 60), bool), 3, 10) is None


def test_the_segments_of_the_only_thing_class_have_hues_of_their_own():
    segment_map = np.repeat(np.arange(1, 9, dtype=np.int32)[None], 8, axis=0)
    result = panoptic(segment_map, [0] * 8)
    hues = []
    cyan, other = Category(3, "nucleus", True, (0, 200, 200)), Category(9, "cell", True, (0, 200, 0))
    for categories in ((cyan,), (cyan, other)):
        shown = np.asarray(draw.overlay(replace(result, categories=categories), gray(), alpha=1))[4]
        hues.append([colorsys.rgb_to_hsv(*color)[0] for color in shown.tolist()])
    assert np.ptp(hues[0]) > 0.5
    assert np.ptp(hues[1]) < 0.2
