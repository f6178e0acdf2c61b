"""Prediction for all kinds of input: from Python in all forms, from the command as files, folders and globs."""

import dataclasses
import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from maskwright.checkpoints.load import load_model
from maskwright.config.schema import EvaluateConfig
from maskwright.data.images.find import find_images
from maskwright.errors import ImageError, MaskwrightError
from maskwright.inference.predict_files import predict_files
from maskwright.inference.predictor import Predictor
from maskwright.models import build_model
from maskwright.results.save import unique_names
from maskwright.structures.annotations import Category
from tests import hostile_files, tiny
from tests.in_process import run_command

MEMORY_LIMIT_GB = 2.5  # of the whole command; the largest hostile image would take 10.8 GB


@pytest.fixture(scope="module")
def predictor():
    return Predictor(tiny.trained_model(), device="cpu")


@pytest.fixture
def image():
    return tiny.scene_image(1)


def map_of(result):
    return {"semantic": result.label_map, "panoptic": result.segment_map, "instance": result.instance_masks}[
        result.task
    ]


def assert_same(one, other):
    assert one.size == other.size
    np.testing.assert_array_equal(one.labels, other.labels)
    np.testing.assert_array_equal(map_of(one), map_of(other))
    np.testing.assert_array_equal(one.scores, other.scores)


def run(monkeypatch, capsys, *arguments):
    """`maskwright predict` with the trained model."""
    return run_command(monkeypatch, capsys, "predict", tiny.trained_model(), *arguments, "--device", "cpu")


def test_every_form_of_an_image_gives_the_same_result(predictor, image, tmp_path):
    file = tmp_path / "one.png"
    Image.fromarray(image).save(file)
    expected = predictor(image)
    assert len(expected) >= 3, "the model must find something for this test to mean anything"
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    for form in (file, str(file), file.read_bytes(), Image.fromarray(image), tensor):
        assert_same(predictor(form), expected)
    assert predictor(file).source == str(file)
    assert predictor(str(file)).source == str(file)
    assert expected.source is None
    np.testing.assert_array_equal(predictor(file).image, image)


def test_a_list_of_images_gives_a_list_of_results_in_order(predictor, image):
    other = tiny.scene_image(2)
    first, second = predictor([image, Image.fromarray(other)])
    assert_same(first, predictor(image))
    assert_same(second, predictor(other))
    (alone,) = predictor((image,))
    assert_same(alone, first)
    assert predictor([]) == []


def test_the_input_array_is_not_modified(predictor, image):
    before = image.copy()
    predictor(image).overlay()
    np.testing.assert_array_equal(image, before)


def test_batches_of_equal_sizes_give_what_single_images_give(predictor):
    pictures = [tiny.scene_image(number) for number in range(5)]
    batched = Predictor(predictor.model, device="cpu", batch_size=3)
    for one, other in zip(predictor(pictures), batched(pictures), strict=True):
        np.testing.assert_array_equal(one.labels, other.labels)
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-4)
        assert (map_of(one) == map_of(other)).mean() > 0.999


@pytest.mark.parametrize(
    ("things", "task"), [((True, False), "panoptic"), ((True,), "instance"), ((False,), "semantic")]
)
def test_fresh_model_predicts_with_defaults_and_the_task_that_its_classes_allow(image, tmp_path, things, task):
    recipe = tiny.recipe(tmp_path)
    categories = [Category(i, f"class {i}", is_thing, (i, i, i)) for i, is_thing in enumerate(things)]
    fresh = Predictor(build_model(recipe.model, categories), device="cpu")
    assert fresh.settings == EvaluateConfig(task=task)
    assert fresh(image).task == task
    assert fresh(image, task="semantic").label_map.shape == image.shape[:2]


def test_mixed_sizes_share_no_batch_and_keep_their_order(predictor):
    sizes = [(64, 64), (64, 64), (40, 90), (64, 64), (33, 17)]
    pictures = [tiny.scene_image(number, size) for number, size in enumerate(sizes)]
    results = Predictor(predictor.model, device="cpu", batch_size=4)(pictures)
    assert [result.size for result in results] == sizes
    for result, picture in zip(results[2:], pictures[2:], strict=True):
        assert_same(result, predictor(picture))


def test_caches_per_image_size_are_bounded(predictor):
    for number in range(60):
        predictor(tiny.scene_image(number, (32 * (1 + number % 10), 32 * (1 + number // 10))))
    modules = [module for name, module in sys.modules.items() if name.startswith("maskwright.")]
    caches = {value for module in modules for value in vars(module).values() if hasattr(value, "cache_info")}
    found = {cache.__qualname__: cache.cache_info() for cache in caches if cache.__module__.startswith("maskwright.")}
    assert all(found[name].misses >= 60 for name in ("sine_positions", "reference_positions")), "each size is new"
    assert all(info.currsize <= 64 for info in found.values()), found


def test_one_checkpoint_gives_all_three_tasks(predictor, image):
    assert predictor(image).task == "panoptic"
    semantic, instance, panoptic = (predictor(image, task=task) for task in ("semantic", "instance", "panoptic"))
    assert {"sky", "grass"} <= set(semantic.names)
    assert set(instance.names) <= {"box", "card"}
    assert (np.diff(instance.scores) <= 0).all()
    assert {"sky", "grass"} <= set(panoptic.names)
    top, bottom = (panoptic.segment_map[row, 2] - 1 for row in (2, -3))
    assert [panoptic.names[top], panoptic.names[bottom]] == ["sky", "grass"]


def test_thresholds_of_a_call_replace_those_of_the_checkpoint(predictor, image):
    assert len(predictor(image, object_threshold=1.0)) == 0
    assert len(predictor(image, object_threshold=0.0)) >= len(predictor(image))
    assert len(predictor(image, overlap_threshold=0.0)) >= len(predictor(image, overlap_threshold=1.0))
    every = predictor(image, task="instance")
    assert len(predictor(image, task="instance", top_k=3)) <= 3
    middle = float(np.median(every.scores))
    kept = predictor(image, task="instance", score_threshold=middle)
    assert len(kept) == (every.scores >= middle).sum()
    assert predictor.settings.object_threshold == 0.4


@pytest.mark.parametrize(("name", "value"), [("object_threshold", 2), ("score_threshold", -0.1), ("top_k", 0)])
def test_threshold_out_of_range_is_refused_in_one_line(predictor, image, name, value):
    with pytest.raises(MaskwrightError, match=rf"^{name}: input should be .*; found {value} ") as error:
        predictor(image, **{name: value})
    assert "\n" not in str(error.value)


def test_every_key_of_the_evaluate_section_is_an_option_of_predictor_and_command(predictor, image):
    from maskwright.cli.predict import NOT_FOR_PREDICTION, EvaluateOptions

    keys = set(EvaluateConfig.model_fields) - set(NOT_FOR_PREDICTION)
    assert {option.name for option in dataclasses.fields(EvaluateOptions)} == keys
    for key in keys:
        assert EvaluateConfig.model_fields[key].description
        assert map_of(predictor(image, **{key: getattr(predictor.settings, key)})).shape == image.shape[:2]


def test_options_have_their_old_names_too(predictor, image, tmp_path, monkeypatch, capsys):
    new = predictor(image, task="semantic", window_size=(32, 48), window_stride=(16, 16))
    old = predictor(image, task="semantic", window=(32, 48), stride=(16, 16))
    np.testing.assert_array_equal(new.label_map, old.label_map)
    Image.fromarray(image).save(tmp_path / "0.png")
    for name, size, stride in (("old", "--window", "--stride"), ("new", "--window-size", "--window-stride")):
        arguments = ("--task", "semantic", size, "32", "48", stride, "16", "16", "--scales", "1,1.5", "--no-flip")
        assert run(monkeypatch, capsys, tmp_path / "0.png", "--output", tmp_path / name, *arguments)[0] == 0
    files = [(tmp_path / name / "0_labels.png").read_bytes() for name in ("old", "new")]
    assert files[0] == files[1]


def test_instances_of_a_checkpoint_without_things_are_refused(predictor, image, monkeypatch):
    stuff = tuple(Category(c.id, c.name, False, c.color) for c in predictor.model.categories)
    monkeypatch.setattr(predictor.model, "categories", stuff)
    with pytest.raises(MaskwrightError, match="no thing classes"):
        predictor(image, task="instance")


@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (1, 400), (400, 1)])
def test_tiny_and_thin_images_give_results_of_their_size(predictor, size, flip, task):
    result = predictor(np.full((*size, 3), 90, np.uint8), task=task, flip=flip)
    assert result.size == size
    assert map_of(result).shape[-2:] == size
    assert result.overlay().size == size[::-1]
    json.dumps(result.to_json())


def test_a_file_that_is_not_an_image_is_refused_by_name(predictor, tmp_path):
    (tmp_path / "page.jpg").write_text("<html>not found</html>")
    with pytest.raises(ImageError, match=r"page\.jpg"):
        predictor(tmp_path / "page.jpg")
    with pytest.raises(ImageError, match="no such file"):
        predictor(tmp_path / "nothing.jpg")


def test_a_result_has_an_overlay_files_and_json(predictor, tmp_path):
    Image.fromarray(tiny.scene_image(3)).save(tmp_path / "scene.png")
    result = predictor(tmp_path / "scene.png")
    picture = result.overlay()
    assert picture.size == (64, 64)
    assert not np.array_equal(np.asarray(picture), result.image)
    names = {path.name for path in result.save(tmp_path / "out")}
    assert names == {"scene_overlay.png", "scene_panoptic.png", "scene.json"}
    document = json.loads(json.dumps(result.to_json()))
    assert document["size"] == [64, 64]
    assert [segment["name"] for segment in document["segments"]] == result.names
    assert sum(segment["area"] for segment in document["segments"]) == (result.segment_map > 0).sum()


def test_a_loaded_model_in_bfloat16_predicts_nearly_the_same(image):
    model = load_model(tiny.trained_model())
    result = Predictor(model, device="cpu", precision="bf16")(image)
    reference = Predictor(tiny.trained_model(), device="cpu")(image)
    assert result.scores.dtype == np.float32
    assert {"sky", "grass"} <= set(result.names)
    agreement = np.equal(result.segment_map > 0, reference.segment_map > 0).mean()
    assert agreement > 0.9


def test_an_unreadable_file_does_not_stop_the_others(predictor, tmp_path):
    for number in range(3):
        Image.fromarray(tiny.scene_image(number)).save(tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_bytes(b"no picture")
    totals = []
    summary = predict_files(
        predictor, [str(tmp_path)], tmp_path / "out", on_image=lambda path, total: totals.append(total)
    )
    assert summary.done == 2
    assert totals == [3, 3, 3]
    ((path, reason),) = summary.failures
    assert path == tmp_path / "1.png"
    assert "not an image" in reason
    assert {file.name for file in (tmp_path / "out").glob("*.json")} == {"0.json", "2.json"}


def test_the_command_takes_files_folders_and_globs_and_gives_results_distinct_names(tmp_path, monkeypatch, capsys):
    for name in ("left/0.png", "right/0.png", "right/0.jpg", "more/Ä 图.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(tiny.scene_image(0)).save(tmp_path / name)
    (tmp_path / "right/folder.png").mkdir()
    inputs = (tmp_path / "left/0.png", tmp_path / "right", f"{tmp_path}/more/*.png")
    status, output, _ = run(monkeypatch, capsys, *inputs, "--output", tmp_path / "out")
    assert status == 0
    assert f"4 of 4 images -> {tmp_path / 'out'}" in output
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert len(names) == 12
    assert "Ä 图.json" in names


@pytest.mark.parametrize("name", ["nothing.png", "*.png", "empty"])
def test_input_that_matches_nothing_ends_the_command_in_one_line(tmp_path, monkeypatch, capsys, name):
    (tmp_path / "empty").mkdir()
    status, _, errors = run(monkeypatch, capsys, tmp_path / name, "--output", tmp_path / "out")
    assert status == 1
    (line,) = errors.strip().splitlines()
    assert line.startswith(f"error: {tmp_path / name}: ")
    assert not (tmp_path / "out").exists()


def test_output_that_cannot_be_written_ends_the_command_in_one_line(tmp_path, monkeypatch, capsys):
    Image.fromarray(tiny.scene_image(0)).save(tmp_path / "0.png")
    (tmp_path / "out").write_text("a file")
    status, _, errors = run(monkeypatch, capsys, tmp_path / "0.png", "--output", tmp_path / "out")
    assert status == 1
    (line,) = errors.strip().splitlines()
    assert line.startswith("error: ")
    assert "cannot be written" in line


def test_a_jpeg_in_memory(predictor, image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "jpeg", quality=95)
    assert {"sky", "grass"} <= set(predictor(buffer.getvalue()).names)


def test_command_survives_every_hostile_image(hostile, tmp_path):
    output = tmp_path / "out"
    command = [sys.executable, "-m", "maskwright", "predict", str(tiny.trained_model()), str(hostile / "images")]
    command += ["--task", "semantic", "--output", str(output), "--device", "cpu"]
    # Linux attributes the peak memory of a parent to its child, so a small process is started in between.
    watch = "import resource, subprocess, sys; status = subprocess.call(sys.argv[1:], stderr=subprocess.STDOUT); "
    watch += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr); sys.exit(status)"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-c", watch, *command], env=environment, capture_output=True, text=True, check=False
    )
    text = process.stdout
    assert process.returncode == 1
    assert "Traceback" not in text
    if sys.platform == "linux":
        assert int(process.stderr) * 1024 < MEMORY_LIMIT_GB * 1e9
    failed = [line for line in text.splitlines() if line.startswith("failed: ")]
    assert len(failed) == len(set(failed))
    paths = find_images(hostile / "images")
    names = dict(zip(paths, unique_names(paths), strict=True))
    written = {path.name for path in output.iterdir()}
    entries = {hostile / entry.file: entry for entry in hostile_files.IMAGES}
    rejected = 0
    for path, name in names.items():
        expect, size = entries[path].expect, entries[path].size
        lines = [line for line in failed if f"{path}:" in line]
        assert len(lines) <= 1
        rejected += bool(lines)
        if expect != "load_or_reject":
            assert bool(lines) == (expect == "reject"), path
        files = {f"{name}_labels.png", f"{name}_overlay.png"}
        assert files & written == (set() if lines else files)
        for file in files & written:
            with Image.open(output / file) as picture:
                assert picture.size == size, path
    assert len(written) == 2 * (len(paths) - rejected)
    assert len(failed) == rejected > 5
    assert f"{len(paths) - rejected} of {len(paths)} images" in text


def add_image(path, number=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(tiny.scene_image(number)).save(path)
    return path


def test_an_empty_text_as_input_is_refused_and_the_current_folder_stays_unread(tmp_path, monkeypatch, capsys):
    add_image(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    status, _, complaints = run(monkeypatch, capsys, "")
    assert status == 1
    assert "an empty text as input" in complaints
    assert not (tmp_path / "predictions").exists()


@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
def test_files_of_another_origin_are_never_replaced(task, tmp_path, monkeypatch, capsys):
    foreign = {
        add_image(tmp_path / "street_panoptic.png", 1),
        add_image(tmp_path / "street_labels.png", 1),
        tmp_path / "street.json",
        tmp_path / "other.json",
    }
    (tmp_path / "street.json").write_text('{"version": "5.0", "shapes": []}')
    (tmp_path / "other.json").write_text('[{"image_id": 7, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1}]')
    kept = {path: path.read_bytes() for path in foreign}
    images = (add_image(tmp_path / "street.png"), add_image(tmp_path / "good.png"))
    status, output, complaints = run(monkeypatch, capsys, *images, "--task", task, "--output", tmp_path)
    assert status == 1
    assert "1 of 2 images" in output
    assert "exists, and is not a result of maskwright; choose another output folder" in complaints
    assert kept == {path: path.read_bytes() for path in foreign}
    assert (tmp_path / "good_overlay.png").exists()
    assert not (tmp_path / "street_overlay.png").exists()


@pytest.mark.parametrize("output", ["", "predictions", "deep/predictions"])
@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
def test_a_second_run_replaces_its_own_results_and_does_not_read_them(task, output, tmp_path, monkeypatch, capsys):
    for number in range(2):
        add_image(tmp_path / f"photos/{number}.png", number)
    arguments = (tmp_path / "photos", "--task", task, "--output", tmp_path / "photos" / output)
    assert run(monkeypatch, capsys, *arguments)[0] == 0
    first = {path: path.read_bytes() for path in (tmp_path / "photos").rglob("*.*")}
    status, text, complaints = run(monkeypatch, capsys, *arguments)
    assert status == 0, complaints
    assert "2 of 2 images" in text
    assert first == {path: path.read_bytes() for path in (tmp_path / "photos").rglob("*.*")}
    expanded = sorted((tmp_path / "photos").glob("*.png"))
    assert "2 of 2 images" in run(monkeypatch, capsys, *expanded, *arguments[1:])[1]
    elsewhere = (tmp_path / "photos", "--output", tmp_path / "elsewhere")
    assert "2 of 2 images" in run(monkeypatch, capsys, *elsewhere)[1]


def test_images_without_instances_leave_results_that_may_be_replaced(predictor, tmp_path):
    empty = predictor(tiny.scene_image(0), task="instance", score_threshold=1.0)
    full = predictor(tiny.scene_image(0), task="instance", score_threshold=0.0)
    for result in (empty, full, empty):
        result.save(tmp_path, "0")
    (tmp_path / "0.json").write_text("{}")
    with pytest.raises(MaskwrightError, match="not a result of maskwright"):
        empty.save(tmp_path, "0")


def test_long_names_are_segmented_or_fail_without_ending_the_run(tmp_path, monkeypatch, capsys):
    for length in (200, 225, 241, 250):
        add_image(tmp_path / "photos" / f"{'x' * length}.png")
    add_image(tmp_path / "photos" / f"{'图' * 75}.png")
    status, output, complaints = run(monkeypatch, capsys, tmp_path / "photos", "--output", tmp_path / "out")
    assert status == 1
    assert "4 of 5 images" in output
    assert "the name of the result would have 262 bytes, but file systems allow 255; rename the image" in complaints
    assert not list((tmp_path / "out").glob(".*"))


def test_a_submission_names_the_images_that_have_no_place_in_it(tmp_path, monkeypatch, capsys):
    for name in ("000007", "7", "street"):
        add_image(tmp_path / "photos" / f"{name}.png")
    arguments = ("--task", "panoptic", "--submission", "coco", "--output", tmp_path / "out")
    status, output, complaints = run(monkeypatch, capsys, tmp_path / "photos", *arguments)
    assert status == 1
    assert "1 of 3 images" in output
    assert "the submission has one place for this image and '000007'" in complaints
    assert "image 'street': the image id is not a number" in complaints
    assert (tmp_path / "out/out.zip").exists()


def test_videos_and_other_formats_in_a_folder_are_counted(tmp_path, caplog):
    add_image(tmp_path / "a.png")
    for name in ("b.MP4", "c.mp4", "scan.nii.gz", "d.dcm", "notes.txt"):
        (tmp_path / name).write_bytes(b"content")
    assert find_images(tmp_path) == [tmp_path / "a.png"]
    assert caplog.messages == [f"{tmp_path}: skipped files of formats that are not read: 1 .dcm, 2 .mp4, 1 .nii"]
