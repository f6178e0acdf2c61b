"""maskwright-runtime: its post-processing against that of PyTorch, and its wheel in an environment without PyTorch."""

import atexit
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskwright.config.schema import EvaluateConfig
from maskwright.errors import MaskwrightError
from maskwright.export.check import agreement
from maskwright.export.export import ExportOptions, export
from maskwright.export.graph import ExportGraph
from maskwright.export.onnx import write_onnx
from maskwright.inference.exported.postprocess import Sizes, decide, number_segments
from maskwright.inference.exported.predictor import ExportedPredictor
from maskwright.inference.exported.runtimes import write_checksum
from maskwright.inference.exported.settings import Settings
from maskwright.inference.mask_upsampling import CropPrediction
from maskwright.inference.predictor import Predictor
from maskwright.inference.segment import segment
from maskwright.structures.annotations import Category
from maskwright.structures.predictions import MaskPrediction, PixelPrediction
from tests import tiny
from tests.full_size import SAMPLE
from tests.in_process import run_command
from tests.test_export_graph import SIZE, Blobs, metadata_of

pytest.importorskip("onnxruntime", reason="needs the packages of the extra 'export'")

ROOT = Path(__file__).resolve().parents[1]
CATEGORIES = tuple(Category(n, f"class {n}", n % 2 == 0, (n, n, n)) for n in range(5))
QUERIES = 15
PADDED = (64, 96)
TASKS = ("semantic", "instance", "panoptic")


def random_outputs(seed, queries=QUERIES):
    """Outputs of a network for one image: smooth masks that overlap, and confident classes."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: PADDED[0] // 4, : PADDED[1] // 4]
    features = np.stack([np.ones_like(x), x / 5, y / 5, np.sin(x / 3), np.cos(y / 3)]).astype(np.float32)
    return {
        "class_logits": (rng.standard_normal((queries, len(CATEGORIES) + 1)) * 4).astype(np.float32),
        "mask_embeddings": (rng.standard_normal((queries, len(features))) * [3, 1, 1, 4, 4]).astype(np.float32),
        "mask_features": features,
    }


def config_of(task, **changes):
    values = {"task": task, "object_threshold": 0.4, "overlap_threshold": 0.4, "top_k": 12, "score_threshold": 0.3}
    return EvaluateConfig(**values | changes)


def settings_like(config):
    return Settings(**{name: getattr(config, name) for name in Settings.__dataclass_fields__})


def check_same(expected, found, share=0.9999):
    assert found.task == expected.task
    assert found.size == expected.size
    np.testing.assert_array_equal(found.labels, expected.labels)
    if expected.scores is not None:
        np.testing.assert_allclose(found.scores, expected.scores, atol=2e-5)
    if expected.task == "instance":
        assert found.masks.shape == expected.masks.shape
        assert (found.masks == expected.masks).sum() >= share * expected.masks.size
    else:
        assert (found.id_map() == expected.id_map()).mean() >= share


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("image", "result"),
    [(PADDED, PADDED), (PADDED, (200, 330)), ((50, 96), (37, 71)), ((61, 33), (61, 33)), ((1, 90), (3, 300))],
)
def test_decisions_in_numpy_are_those_of_pytorch(task, image, result):
    count = 0
    for seed in range(4):
        outputs = random_outputs(seed)
        prediction = MaskPrediction(*(torch.from_numpy(array)[None] for array in outputs.values()))
        for resolution in ("output", "input") if task == "semantic" else ("output",):
            config = config_of(task, semantic_resolution=resolution)
            crop = CropPrediction(prediction, PADDED, image)
            expected = segment([crop], task, output_size=result, categories=CATEGORIES, config=config)
            found = decide(outputs, settings_like(config), CATEGORIES, Sizes(PADDED, image, result))
            check_same(expected, found)
            count += len(expected)
    assert count > 4


def test_masks_and_class_logits_are_decided_too():
    outputs = random_outputs(3)
    masks = np.tensordot(outputs["mask_embeddings"], outputs["mask_features"], 1)
    config, sizes = settings_like(config_of("panoptic")), Sizes(PADDED, (60, 80), (120, 160))
    from_raw = decide(outputs, config, CATEGORIES, sizes)
    from_masks = decide({"class_logits": outputs["class_logits"], "mask_logits": masks}, config, CATEGORIES, sizes)
    np.testing.assert_array_equal(from_raw.segment_map, from_masks.segment_map)

    semantic = config_of("semantic")
    logits = masks[: len(CATEGORIES)]
    crop = CropPrediction(PixelPrediction(torch.from_numpy(logits)[None]), sizes.padded, sizes.image)
    expected = segment([crop], "semantic", output_size=sizes.result, categories=CATEGORIES, config=semantic)
    check_same(expected, decide({"pixel_logits": logits}, settings_like(semantic), CATEGORIES, sizes))


@pytest.mark.parametrize("task", TASKS)
def test_nothing_found_is_an_empty_result(task):
    outputs = random_outputs(0)
    outputs["class_logits"][:] = 0
    outputs["class_logits"][:, -1] = 50
    settings = settings_like(config_of(task))
    found = decide(outputs, settings, CATEGORIES, Sizes(PADDED, PADDED, (30, 40)))
    assert found.size == (30, 40)
    assert len(found) == 0 or task == "semantic"


def test_hidden_queries_are_dropped_and_stuff_is_merged():
    rows = [(0, 0.9, 10, 10, 9), (1, 0.8, 10, 9, 8), (1, 0.7, 10, 9, 9), (0, 0.6, 10, 3, 3), (2, 0.5, 0, 4, 0)]
    segments, table = number_segments(rows, [True, False, True], 0.5)
    assert segments == [(0, 0.9), (1, 0.8)]
    assert table == [0, 1, 0, 2, 0, 2, 0, 0, 0, 0]
    assert number_segments([], [True], 0.5) == ([], [0])


@functools.cache
def exported():
    """A folder with a raw file and a panoptic result file of one model."""
    folder = Path(tempfile.mkdtemp(prefix="maskwright-runtime-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    model = Blobs(3)
    for name, contents in (("small.onnx", "raw"), ("decided.onnx", "result")):
        graph = ExportGraph(model, contents, "panoptic", model.evaluate_config).eval()
        metadata = metadata_of(model, contents).to_json()
        write_onnx(graph, SIZE, folder / name, operators="plain", metadata=metadata)
        write_checksum(folder / name)
    return folder


def save_scene(folder, number, size=(64, 64)):
    path = folder / f"scene-{number}.png"
    Image.fromarray(tiny.scene_image(number, size)).save(path)
    return path


@pytest.mark.parametrize("size", [(40, 50), (100, 130)])
def test_an_exported_file_gives_the_results_of_maskwright(size, tmp_path):
    image = save_scene(tmp_path, 3, size)
    runtime = ExportedPredictor(exported() / "small.onnx")
    assert runtime.runtime == "onnxruntime"
    maskwright = Predictor(exported() / "small.onnx")
    for options in ({"task": "semantic"}, {"task": "instance", "top_k": 7}, {"task": "panoptic"}, {"tile_size": 80}):
        expected, found = maskwright(image, **options), runtime(image, **options)
        check_same(expected, found, 0.999)
        np.testing.assert_array_equal(found.image, expected.image)
        assert found.source == expected.source
    decided = ExportedPredictor(exported() / "decided.onnx")([image, np.asarray(Image.open(image))])
    for result in decided:
        check_same(Predictor(exported() / "decided.onnx")(image), result, 1)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_the_packaged_model_gives_the_results_of_maskwright(task):
    maskwright, runtime = Predictor("nuclei", device="cpu"), ExportedPredictor(exported_nuclei())
    for image in sorted((SAMPLE / "val").iterdir())[:2]:  # in tiles of 96 pixels
        expected, found = maskwright(str(image), task=task), runtime(image, task=task)
        assert len(found) == len(expected) > (1 if task == "semantic" else 10)
        assert agreement(expected, found) > 0.999


@functools.cache
def exported_nuclei():
    export("nuclei", exported() / "nuclei.onnx", ExportOptions(), sizes=[(160, 160)])
    return exported() / "nuclei.onnx"


def test_options_that_cannot_be_followed_are_refused(tmp_path):
    image = save_scene(tmp_path, 3)
    small, decided = (ExportedPredictor(exported() / name) for name in ("small.onnx", "decided.onnx"))

    def refuse(predictor, message, **options):
        with pytest.raises(MaskwrightError, match=message) as caught:
            predictor(image, **options)
        assert str(caught.value).startswith(str(predictor.path))
        assert "\n" not in str(caught.value)

    refuse(small, "unknown option 'score_treshold'; did you mean score_threshold", score_treshold=0.5)
    refuse(small, "unknown option 'confidence'", confidence=True)
    refuse(small, r"flip True combines several predictions for an image, which needs PyTorch", flip=True)
    refuse(small, "object_threshold is 2, expected 0..1", object_threshold=2)
    refuse(small, "top_k is 0, expected a whole number from 1", top_k=0)
    refuse(small, "task is 'depth', expected semantic, instance, panoptic", task="depth")
    refuse(small, "tile_overlap is 64, expected 0 to less than tile_size 64", tile_size=64, tile_overlap=64)
    refuse(decided, "it has no results of task semantic; it has panoptic", task="semantic")
    refuse(decided, "it decides with object_threshold 0.5, not 0.9; export .* --contents raw", object_threshold=0.9)
    small(image, flip=False, scales=(1.0,), window_size=None, tile_size=None)  # None keeps the setting


@functools.cache
def bare_environment():
    """The Python of an environment with maskwright-runtime, NumPy, Pillow and ONNX Runtime, and nothing else."""
    folder = exported() / "bare"
    environment = folder / "venv"
    venv.create(environment, symlinks=True)
    python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    wheel = ["wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([*pip, *wheel, str(ROOT / "runtime")], check=True)
    (built,) = folder.glob("maskwright_runtime-*.whl")
    install = ["install", "--quiet", "--no-index", "--no-deps", "--target", str(packages), str(built)]
    subprocess.run([*pip, *install], check=True)
    borrowed = folder / "borrowed"
    borrowed.mkdir()
    installed = Path(np.__file__).parents[1]
    for name in ("numpy", "numpy.libs", "PIL", "pillow.libs", "onnxruntime"):
        if (installed / name).exists():
            (borrowed / name).symlink_to(installed / name)
    (packages / "borrowed.pth").write_text(f"{borrowed}\n")
    return python


def run_bare(*arguments):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        [bare_environment(), "-I", *map(str, arguments)], capture_output=True, text=True, env=kept, cwd=exported()
    )


def test_the_wheel_predicts_without_pytorch_as_maskwright_does(tmp_path, monkeypatch, capsys):
    missing = run_bare("-c", "import torch")
    assert "No module named 'torch'" in missing.stderr
    image = save_scene(tmp_path, 3, (100, 130))
    for task, ending in (("semantic", "_labels.png"), ("panoptic", "_panoptic.png"), ("instance", ".json")):
        ours, theirs = tmp_path / f"ours-{task}", tmp_path / f"runtime-{task}"
        model = exported() / "small.onnx"
        assert run_command(monkeypatch, capsys, "predict", model, image, "--output", ours, "--task", task)[0] == 0
        done = run_bare("-m", "maskwright_runtime", "predict", model, image, "--output", theirs, "--task", task)
        assert done.stdout == f"1 of 1 images -> {theirs}\n", done.stderr
        assert sorted(path.name for path in ours.iterdir()) == sorted(path.name for path in theirs.iterdir())
        first, second = ours / f"scene-3{ending}", theirs / f"scene-3{ending}"
        if task == "instance":
            expected, found = json.loads(first.read_text()), json.loads(second.read_text())
            assert [entry["category_id"] for entry in found] == [entry["category_id"] for entry in expected]
            assert [entry["bbox"] for entry in found] == [entry["bbox"] for entry in expected]
            np.testing.assert_allclose(
                [entry["score"] for entry in found], [entry["score"] for entry in expected], atol=2e-5
            )
        else:
            assert (np.array(Image.open(first)) == np.array(Image.open(second))).mean() > 0.999
    code = "import sys, maskwright_runtime, maskwright_runtime.__main__; print(sorted(sys.modules))"
    loaded = run_bare("-c", code).stdout
    for name in ("'torch'", "'scipy'", "'pydantic'", "'maskwright'", "'onnxruntime'"):
        assert name not in loaded


def test_mistakes_at_its_command_line_are_one_line_each(tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"soup")
    done = run_bare(
        "-m", "maskwright_runtime", "predict", exported() / "small.onnx", broken, "--output", tmp_path / "o"
    )
    assert done.returncode == 1
    assert done.stdout == f"0 of 1 images -> {tmp_path / 'o'}\n"
    assert done.stderr.startswith(f"failed: {broken}: not an image")
    done = run_bare("-m", "maskwright_runtime", "predict", broken, broken)
    assert done.returncode == 1
    assert done.stderr == f"error: {broken}: its suffix names no exported file; expected one of .onnx, .xml, .pte\n"
    code = "from maskwright_runtime import Predictor; Predictor('decided.xml')"
    assert "no such file" in run_bare("-c", code).stderr


def test_a_source_distribution_builds_the_same_wheel(tmp_path):
    def build(target, root, folder):
        command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
        subprocess.run(command, cwd=root, check=True, capture_output=True)
        (built,) = folder.iterdir()
        return built

    wheel = build("wheel", ROOT / "runtime", tmp_path / "wheel")
    shutil.unpack_archive(build("sdist", ROOT / "runtime", tmp_path / "sdist"), tmp_path / "unpacked")
    (root,) = (tmp_path / "unpacked").iterdir()
    again = build("wheel", root, tmp_path / "again")
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        names = [name for name in first.namelist() if name.endswith(".py")]
        assert "maskwright_runtime/inference/exported/postprocess.py" in names
        assert sorted(name for name in second.namelist() if name.endswith(".py")) == sorted(names)
        for name in names:
            text = first.read(name)
            assert text == second.read(name)
            assert not re.search(rb"^\s*(from|import) maskwright\b", text, re.MULTILINE), name


def test_the_two_distributions_have_one_version():
    versions = {
        tomllib.loads((ROOT / name / "pyproject.toml").read_text())["project"]["version"] for name in ("", "runtime")
    }
    assert len(versions) == 1
    assert f'__version__ = "{versions.pop()}"' in (ROOT / "runtime/maskwright_runtime/__init__.py").read_text()
