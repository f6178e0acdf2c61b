"""The fixtures of the original implementation, through the same command that a person runs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.full_size import needs_full_size
from tests.parity import compare
from tests.parity.__main__ import main
from tests.parity.bundle import reduce
from tests.parity.fixtures import BUNDLED, SHARED, Fixture, find
from tests.parity.report import Report, table

QUICK = (
    "criterion",
    "detectron2/coco_panoptic_r50",
    "detectron2/coco_panoptic_swin_tiny",
    "detectron2/batch2_cityscapes_semantic_r50",
    "semask/fpn_swin_t_cityscapes",
)
COMPLETE_SET = (
    "criterion",
    *(f"detectron2/ade20k_semantic_{backbone}" for backbone in ("r50", "r101")),
    "detectron2/batch2_cityscapes_semantic_r50",
    *(f"detectron2/cityscapes_semantic_{backbone}" for backbone in ("r50", "swin_base")),
    "detectron2/coco_instance_r50",
    *(f"detectron2/coco_panoptic_{backbone}" for backbone in ("r50", "swin_tiny", "swin_large")),
    "detectron2/youtubevis2019_video_r50",
    "easycv/easycv_r50_coco_panoptic",
    *(f"openmmlab/{name}" for name in ("mmdet_r50_coco_panoptic", "mmseg_r50_ade20k", "mmseg_swin_b_in22k_cityscapes")),
    *(f"semask/fpn_swin_{size}_{data}" for size in "tsbl" for data in ("ade20k", "cityscapes")),
    *(f"semask/mask2former_{name}_l_ade20k" for name in ("swin", "fapn_swin", "msfapn_swin")),
    "semask/mask2former_swin_l_cityscapes",
    *(f"transformers/{name}" for name in ("resnet50_coco_panoptic", "swin_tiny_coco_panoptic", "swin_large_q200")),
)
SMALLEST = BUNDLED / "detectron2" / "batch2_cityscapes_semantic_r50.json"


def copy(source: Path, folder: Path, **changes: object) -> Path:
    """A copy of a fixture with some facts of its json changed; returns the folder."""
    folder.mkdir()
    shutil.copyfile(source.with_suffix(".npz"), folder / source.with_suffix(".npz").name)
    facts = json.loads(source.read_text(encoding="utf-8")) | changes
    (folder / source.name).write_text(json.dumps(facts), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", QUICK)
def test_model_and_criterion_equal_the_original(name):
    report = compare.run(Fixture(BUNDLED / f"{name}.json"))
    assert not report.failures
    assert report.figures


@pytest.mark.slow
@needs_full_size
@pytest.mark.parametrize("name", COMPLETE_SET)
def test_model_and_criterion_equal_the_original_on_the_complete_set(name):
    fixture = Fixture(SHARED / f"{name}.json")
    if fixture.kind.startswith("unsupported"):
        pytest.skip(fixture.kind)
    assert not compare.run(fixture).failures


@needs_full_size
def test_the_complete_set_is_listed_here():
    found = {fixture.path.resolve() for fixture in find([SHARED])}
    assert found == {(SHARED / f"{name}.json").resolve() for name in COMPLETE_SET}


@pytest.mark.slow
def test_the_fixture_that_only_the_command_runs_equals_the_original():
    assert not compare.run(Fixture(BUNDLED / "detectron2" / "ade20k_semantic_r50.json")).failures


@pytest.mark.slow
def test_a_model_goes_out_to_every_layout():
    pytest.importorskip("transformers")
    report = compare.run(Fixture(BUNDLED / "detectron2" / "coco_panoptic_swin_tiny.json"), write=True)
    assert not report.failures
    assert not report.refused
    assert {"to detectron2: weights", "to transformers: class logits"} <= report.differences.keys()


def test_the_table_has_the_largest_difference_of_each_cell():
    report = Report(refused=["detectron2"])
    for name, value in (("class logits", 2e-5), ("mask logits", 4e-5), ("to transformers: class logits", 1e-6)):
        report.most(name, value, 1.0)
    report.most("to mmdetection: weights", 0.0, 0.0)
    assert table([("easycv", "r50", report)]).splitlines()[-1] == (
        "| easycv | r50 | 2.0e-05 | 4.0e-05 | refused | 1.0e-06 | 0 | not run |"
    )


def test_the_command_fails_when_one_weight_changes_by_a_tenth(tmp_path, capsys):
    folder = copy(SMALLEST, tmp_path / "perturbed")
    rule = Path(compare.__file__).with_name("weights.py").read_text(encoding="utf-8")
    change = (
        "\n_fill = fill\n"
        "def fill(shapes, **arguments):\n"
        "    filled = _fill(shapes, **arguments)\n"
        "    filled['sem_seg_head.pixel_decoder.adapter_1.weight'][7] += 0.1\n"
        "    return filled\n"
    )
    (folder / "weights.py").write_text(rule + change, encoding="utf-8")
    assert main([str(folder)]) == 1
    assert "FAILED  perturbed/batch2_cityscapes_semantic_r50: class logits" in capsys.readouterr().out


def test_the_command_fails_when_weights_do_not_fit_and_says_which(tmp_path, capsys):
    keys = json.loads(SMALLEST.read_text(encoding="utf-8"))["keys"]
    keys["sem_seg_head.predictor.unheard_of.weight"] = [3, 4]
    folder = copy(SMALLEST, tmp_path / "renamed", keys=keys)
    assert main([str(folder)]) == 1
    assert "unheard_of" in capsys.readouterr().out


def test_other_layouts_and_video_are_reported_as_not_supported(tmp_path, capsys):
    other = copy(SMALLEST, tmp_path / "other", format="unheard_of")
    video = tmp_path / "video"
    video.mkdir()
    (video / "clip.json").write_text(json.dumps({"format": "detectron2"}), encoding="utf-8")
    np.savez(video / "clip.npz", frames=np.zeros((2, 4, 4, 3), np.uint8))
    assert main([str(other), str(video)]) == 0
    out = capsys.readouterr().out
    assert "not supported  other/batch2_cityscapes_semantic_r50: layout unheard_of" in out
    assert "not supported  video/clip: video" in out
    assert "0 passed, 0 failed, 2 not supported" in out


def test_a_folder_that_is_absent_or_empty_is_not_a_success(tmp_path):
    assert main([str(tmp_path / "nothing")]) == 2
    assert main([str(tmp_path)]) == 1


def test_an_array_may_be_absent_only_where_the_fixture_leaves_it_out(tmp_path):
    whole = BUNDLED / "detectron2" / "coco_panoptic_r50.json"
    assert not Fixture(whole).holds("pred_masks")
    careless = copy(whole, tmp_path / "careless", left_out=[]) / whole.name
    with pytest.raises(KeyError, match="pred_masks"):
        Fixture(careless).holds("pred_masks")


def test_bundled_fixtures_are_small_and_leave_out_nothing_that_is_compared():
    assert sum(path.stat().st_size for path in BUNDLED.rglob("*") if path.is_file()) < 11_000_000
    for path in (BUNDLED / "detectron2").glob("*.json"):
        fixture = Fixture(path)
        assert {"pred_logits", "pred_masks_sub4"} <= fixture.arrays.keys()
        assert not set(fixture.facts["left_out"]) & {"aux_pred_logits", "semantic", "panoptic", "instance_masks"}


@needs_full_size
def test_bundled_fixtures_are_what_the_complete_ones_reduce_to(tmp_path):
    for path in BUNDLED.glob("*/*.json"):
        reduce(SHARED / path.parent.name / path.name, tmp_path / path.name)
        ours, theirs = Fixture(path), Fixture(tmp_path / path.name)
        assert ours.facts == theirs.facts
        assert ours.arrays.keys() == theirs.arrays.keys()
        assert all(np.array_equal(ours.arrays[name], theirs.arrays[name]) for name in ours.arrays)
