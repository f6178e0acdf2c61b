"""`maskwright export` and what takes exported files: one small trained model, exported once per process."""

import functools
import io
import json
import os
import signal
import subprocess
import sys
import threading
from multiprocessing import Pipe

import numpy as np
import pytest
from PIL import Image

from maskwright.checkpoints.load import load_model
from maskwright.cli import app
from maskwright.errors import MaskwrightError
from maskwright.evaluation.evaluate import evaluate
from maskwright.export import export as export_module
from maskwright.export import onnx as onnx_module
from maskwright.export.check import agreement
from maskwright.export.export import ExportOptions, default_size, export
from maskwright.inference.exported.runtimes import open_exported
from maskwright.inference.exported_model import open_model
from maskwright.inference.predictor import Predictor
from maskwright.inference.rank import rank_files
from maskwright.serving.messages import JSON, Job
from maskwright.serving.model_process import ModelProcess
from maskwright.serving.request_options import RequestOptions
from maskwright.serving.service_options import ServiceOptions
from tests import processes, tiny
from tests.in_process import run_command

pytest.importorskip("onnxscript", reason="needs the packages of the extra 'export'")

SIZE = (64, 64)


@functools.cache
def files():
    """Return a folder with one raw file, exported with plain operators, and one result, both of the same model."""
    folder = tiny.trained_model().parent
    export(
        tiny.trained_model(), folder / "raw.onnx", ExportOptions(), sizes=[SIZE], check_images=[str(scene(folder, 7))]
    )
    return folder


def scene(folder, number, size=(64, 64)):
    path = folder / f"scene-{number}-{size[0]}.png"
    Image.fromarray(tiny.scene_image(number, size)).save(path)
    return path


@pytest.fixture
def say(monkeypatch, capsys):
    """`say("export", ...)` runs a command and returns exit status, output and errors."""
    return lambda *arguments: run_command(monkeypatch, capsys, *arguments)


def same(first, second):
    """Whether two results agree but for rounding."""
    assert first.size == second.size
    return agreement(first, second) > 0.99


@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
@pytest.mark.parametrize("size", [(64, 64), (50, 60)])
def test_the_predictor_gives_the_results_of_the_model(task, size, tmp_path):
    image = scene(tmp_path, 3, size)  # the smaller one is padded
    expected, found = (
        Predictor(source, device="cpu")(image, task=task) for source in (tiny.trained_model(), files() / "raw.onnx")
    )
    assert same(expected, found)
    assert found.names == expected.names
    np.testing.assert_array_equal(found.image, expected.image)


def test_serve_answers_with_the_results_of_an_exported_file(tmp_path):
    for package in ("fastapi", "httpx", "psutil"):
        pytest.importorskip(package)
    from tests.service import Service, encoded, expected

    service = Service(tmp_path, models=[f"tiny={files() / 'raw.onnx'}"])
    image = encoded(tiny.scene_image(3, (50, 60)))
    for task in ("semantic", "instance", "panoptic"):
        answer = service.segment(image, task=task)
        assert answer.json() == expected(Predictor(files() / "raw.onnx"), image, task=task)
    service.process.kill()


def test_larger_images_are_shrunk_and_tiles_and_flips_work(tmp_path):
    predictor = Predictor(files() / "raw.onnx")
    image = scene(tmp_path, 5, (128, 96))
    assert predictor(image).size == (128, 96)
    assert predictor(image, flip=True).size == (128, 96)
    model = Predictor(tiny.trained_model(), device="cpu")
    assert same(model(image, tile_size=64), predictor(image, tile_size=64))
    shrunk = np.array(Image.fromarray(tiny.scene_image(5, (128, 96))).resize((48, 64), Image.Resampling.BILINEAR))
    small = model(shrunk, task="semantic").label_map
    large = predictor(image, task="semantic").label_map
    assert (small == large[1::2, 1::2]).mean() > 0.9


def test_a_batch_gives_the_results_of_single_images(tmp_path):
    images = [scene(tmp_path, number) for number in (1, 2, 3)]
    single = [Predictor(files() / "raw.onnx")(image) for image in images]
    for one, other in zip(single, Predictor(files() / "raw.onnx", batch_size=3)(images), strict=True):
        assert same(one, other)


def test_evaluation_takes_an_exported_file(tmp_path):
    recipe = tiny.recipe(tiny.write_panoptic(tmp_path), evaluate__object_threshold=0.4, evaluate__overlap_threshold=0.5)
    scores = [
        evaluate(model, recipe).scores for model in (load_model(tiny.trained_model()), open_model(files() / "raw.onnx"))
    ]
    assert scores[0]["PQ"] > 0.5
    assert abs(scores[0]["PQ"] - scores[1]["PQ"]) < 0.005


def test_predict_takes_an_exported_file(tmp_path, say):
    status, out, _ = say("predict", files() / "raw.onnx", scene(tmp_path, 3), "--output", tmp_path / "out")
    assert status == 0
    assert "1 of 1 images" in out
    assert (tmp_path / "out" / "scene-3-64.json").is_file()


def test_the_service_takes_an_exported_file():
    pytest.importorskip("httpx", reason="httpx is the client of the tests of the service")
    from tests.service import as_answer

    predictor = Predictor(files() / "raw.onnx")
    ours, theirs = Pipe()
    process = ModelProcess(theirs, {"raw": predictor}, ServiceOptions(models={"raw": "raw.onnx"}), max_batch=1)
    thread = threading.Thread(target=process.run)
    thread.start()
    buffer = io.BytesIO()
    Image.fromarray(tiny.scene_image(4, (50, 60))).save(buffer, "png")
    for task in ("semantic", "instance", "panoptic"):
        ours.send(Job(0, "raw", buffer.getvalue(), RequestOptions(task=task), JSON))
        answer = ours.recv()
        result = predictor(buffer.getvalue(), task=task)
        assert json.loads(answer.body) == as_answer(result) | {"model": "raw"}
    ours.close()
    thread.join()


def test_metadata_has_all_that_is_needed():
    metadata = open_exported(files() / "raw.onnx").metadata
    model = load_model(tiny.trained_model())
    assert metadata.categories == model.categories
    assert metadata.size == SIZE
    assert metadata.tasks == ("semantic", "instance", "panoptic")
    assert metadata.evaluate["object_threshold"] == 0.4
    assert len(metadata.weights_sha256) == 64
    assert metadata.model["backbone"] == model.config.backbone
    assert metadata.checksum != "crc32:00000000"


def test_another_runtime_runs_the_same_file(monkeypatch, tmp_path):
    image = scene(tmp_path, 3)
    expected = Predictor(files() / "raw.onnx")(image)
    hide(monkeypatch, "onnxruntime")
    predictor = Predictor(files() / "raw.onnx")
    assert predictor.model.file.runtime == "openvino"
    assert same(expected, predictor(image))


def hide(monkeypatch, *names):
    """Make packages look as if they were not installed."""
    from maskwright.inference.exported import runtimes

    found = runtimes.find_spec
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None if name in names else found(name))


def test_bad_files_give_one_line_each(tmp_path, monkeypatch):
    good = (files() / "raw.onnx").read_bytes()

    def refuse(content, message):
        (tmp_path / "bad.onnx").write_bytes(content)
        with pytest.raises(MaskwrightError, match=message) as caught:
            Predictor(tmp_path / "bad.onnx")
        assert str(caught.value).startswith(str(tmp_path / "bad.onnx"))
        assert "\n" not in str(caught.value)

    refuse(b"", "cannot be read, it is damaged or of another format")
    refuse(b"soup", "cannot be read, it is damaged or of another format")
    refuse(good[: len(good) // 2], "cannot be read, it is damaged")
    refuse(good[:1000] + bytes([good[1000] ^ 1]) + good[1001:], "its content has changed since it was written")
    refuse(good.replace(b"crc32:", b"none_:").replace(b"maskwright", b"maskwrong "), "was not exported by maskwright")
    with pytest.raises(MaskwrightError, match="no such file"):
        Predictor(tmp_path / "absent.onnx")
    hide(monkeypatch, "onnxruntime", "openvino")
    with pytest.raises(
        MaskwrightError, match=r"needs onnxruntime or openvino, which is not installed; pip install onnx"
    ):
        Predictor(files() / "raw.onnx")


def test_settings_that_a_file_cannot_follow_are_refused(tmp_path):
    image = scene(tmp_path, 3)
    predictor = Predictor(files() / "raw.onnx")
    with pytest.raises(MaskwrightError, match=r"scales \[0.5, 1.0\] need more sizes than its 64x64 pixels"):
        predictor(image, task="semantic", scales=(0.5, 1.0))
    with pytest.raises(MaskwrightError, match=r"window_size \[96, 96\] is larger than its 64x64 pixels"):
        predictor(image, task="semantic", window_size=(96, 96))
    with pytest.raises(MaskwrightError, match="--precision bf16 is for checkpoints"):
        Predictor(files() / "raw.onnx", precision="bf16")(image)
    with pytest.raises(MaskwrightError, match="an exported file has no features of the backbone"):
        rank_files(predictor, [str(image)], tmp_path, count=1)
    with pytest.raises(MaskwrightError, match="compile is for checkpoints"):
        Predictor(files() / "raw.onnx", compile=True)


def test_an_export_that_differs_from_the_model_is_removed(tmp_path, monkeypatch, say):
    write = export_module.write_onnx

    def write_wrongly(graph, *args, **options):
        bias = graph.model.masked_decoder.class_head.bias
        bias.data += 0.5
        write(graph, *args, **options)
        bias.data -= 0.5

    monkeypatch.setattr(export_module, "write_onnx", write_wrongly)
    wrong = tmp_path / "wrong.onnx"
    status, _, text = say("export", tiny.trained_model(), wrong, "--size", "64x64", "--operators", "grid_sample")
    assert status == 1
    assert "class_logits" in text
    assert "too large" in text
    assert "differs from the model by more than the tolerance, so it was not kept" in text
    assert not list(tmp_path.iterdir())


def interrupt(graph, size, path, **options):
    path.write_bytes(b"half")
    raise KeyboardInterrupt


def test_nothing_is_left_of_an_interrupted_export(tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "write_onnx", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(tiny.trained_model(), tmp_path / "half.onnx", ExportOptions(), sizes=[SIZE])
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="needs the signals of POSIX")
def test_a_terminated_export_leaves_nothing_and_the_next_one_removes_what_a_killed_one_left(tmp_path, monkeypatch):
    def stop(number):
        process = processes.start(
            processes.run_command,
            *("export", str(tiny.trained_model()), str(tmp_path / "model.onnx"), "--size", "64x64"),
            output=tmp_path.with_suffix(".out"),
        )
        processes.wait_until(lambda: list(tmp_path.iterdir()), process)
        os.kill(process.pid, number)
        return processes.wait(process)

    assert stop(signal.SIGTERM) == [128 + signal.SIGTERM]
    assert not list(tmp_path.iterdir())
    assert stop(signal.SIGKILL) == [-signal.SIGKILL]
    (left,) = tmp_path.iterdir()
    os.utime(left, (0, 0))
    monkeypatch.setattr(export_module, "write_onnx", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(tiny.trained_model(), tmp_path / "model.onnx", ExportOptions(), sizes=[SIZE])
    assert not list(tmp_path.iterdir())


def test_mistakes_are_refused_before_anything_is_exported(tmp_path, say, monkeypatch):
    def refuse(*words, message):
        status, _, text = say("export", tiny.trained_model(), *words)
        assert status == 1
        assert message in text
        assert text.count("\n") == 1

    refuse(tmp_path / "a.onnx", "--size", "dynamic", message="dynamic height and width cannot be exported")
    refuse(tmp_path / "a.onnx", "--size", "65x64", message="the nearest is 64x64")
    refuse(tmp_path / "a.bin", message="its suffix names no format; use .onnx or .xml or .pt2 or .pte")
    refuse(
        tmp_path / "a.onnx", "--format", "openvino", message="its suffix does not name the format openvino; use .xml"
    )
    refuse(tmp_path / "a.onnx", "--check-images", tmp_path / "none.png", message="none.png")
    (tmp_path / "there.onnx").write_bytes(b"")
    refuse(tmp_path / "there.onnx", message="exists already; choose another name, or add --overwrite")
    assert "export the checkpoint that it was made from" in say("export", files() / "raw.onnx", tmp_path / "b.onnx")[2]
    refuse(tmp_path / "a.pte", "--precision", "fp16", message="--precision fp16: is not for ExecuTorch; leave it out")
    found = onnx_module.find_spec
    monkeypatch.setattr(onnx_module, "find_spec", lambda name: None if name == "executorch" else found(name))
    refuse(tmp_path / "a.pte", message="--format executorch: needs executorch; pip install 'maskwright[executorch]'")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    refuse(tmp_path / "a.onnx", message="needs onnxscript; pip install 'maskwright[export]'")


def test_weights_that_do_not_fit_into_an_onnx_file_are_refused_but_for_openvino(tmp_path, say, monkeypatch):
    monkeypatch.setattr(onnx_module, "MAX_WEIGHTS", 10_000)
    status, _, text = say("export", tiny.trained_model(), tmp_path / "a.onnx")
    assert status == 1
    message = "this model has more than 2 GB of weights, the most that an ONNX file can hold"
    assert text.endswith(f"a.onnx: {message}; export it to .xml or .pt2\n")
    options = ExportOptions("openvino", operators="grid_sample")
    assert export(tiny.trained_model(), tmp_path / "a.xml", options, sizes=[SIZE])[0].comparison.passed
    assert {path.name for path in tmp_path.iterdir()} == {"a.xml", "a.bin"}


def test_options_take_several_values():
    words = ["export", "a", "b.onnx", "--size", "32x64", "64x64", "--check-images", "x.png", "y/", "--overwrite"]
    _, bound, _ = app.parse_args(words, print_error=False, exit_on_error=False)
    assert bound.arguments["size"] == ("32x64", "64x64")
    assert bound.arguments["check_images"] == ("x.png", "y/")
    assert bound.arguments["overwrite"]


def test_the_default_size_is_that_of_the_recipe():
    model = load_model(tiny.trained_model())
    assert default_size(model) == (64, 64)  # the crop size of its training
    model.recipe = None
    with pytest.raises(
        MaskwrightError, match="--size: this model has no default size; add it, for example --size 512x704"
    ):
        default_size(model)
    model.evaluate_config = model.evaluate_config.model_copy(update={"short_side": 70})
    assert default_size(model) == (96, 96)
    model.evaluate_config = model.evaluate_config.model_copy(update={"size": (40, 100)})
    assert default_size(model) == (64, 128)


def test_pt2_files_are_written_with_half_the_weights_and_never_loaded(tmp_path):
    (done,) = export(
        tiny.trained_model(), tmp_path / "model.pt2", ExportOptions(format="torch", precision="fp16"), sizes=[SIZE]
    )
    assert done.comparison.passed
    assert 0 < done.comparison.largest["class_logits"][1] < 0.1  # rounded, but not by much
    with pytest.raises(MaskwrightError, match="PyTorch may run code that is in such a file"):
        Predictor(tmp_path / "model.pt2")


def test_a_process_that_has_closed_two_openvino_files_survives_signals(tmp_path):
    """Each OpenVINO core has its own stack for signal handlers, which outlived it in the process."""
    export(tiny.trained_model(), tmp_path / "model.xml", ExportOptions(format="openvino", contents="raw"), sizes=[SIZE])
    script = f"""
import os, signal
from maskwright.inference.exported.runtimes import open_exported
files = [open_exported({str(tmp_path / "model.xml")!r}) for _ in range(2)]
del files[0], files[0]
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
os.kill(os.getpid(), signal.SIGUSR1)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr[-500:]


def test_two_sizes_give_two_files_with_results_for_openvino(tmp_path):
    done = export(
        tiny.trained_model(),
        tmp_path / "model.xml",
        ExportOptions(format="openvino", contents="result", operators="grid_sample"),
        sizes=[(64, 64), (32, 64)],
        check_images=[str(scene(tmp_path, 3))],
    )
    assert [file.path.name for file in done] == ["model-64x64.xml", "model-32x64.xml"]
    assert {path.name for path in tmp_path.glob("model*")} == {
        f"model-{size}{suffix}" for size in ("64x64", "32x64") for suffix in (".xml", ".bin")
    }
    predictor = Predictor(tmp_path / "model-64x64.xml")
    image = scene(tmp_path, 4)
    assert same(Predictor(tiny.trained_model(), device="cpu")(image), predictor(image))
    assert predictor(scene(tmp_path, 4, (96, 80))).size == (96, 80)
    with pytest.raises(MaskwrightError, match=r"it decides with object_threshold 0.4, not 0.9"):
        predictor(image, object_threshold=0.9)
    with pytest.raises(MaskwrightError, match="it holds results of task panoptic, not semantic"):
        predictor(image, task="semantic")
    with pytest.raises(MaskwrightError, match="flip and window_size average predictions, but it holds decisions"):
        predictor(image, flip=True)
    with pytest.raises(MaskwrightError, match="it holds decisions, without the scores"):
        predictor(image, confidence=True)
    (tmp_path / "model-64x64.bin").write_bytes(b"1" * 100)
    with pytest.raises(MaskwrightError, match="its content has changed"):
        Predictor(tmp_path / "model-64x64.xml")
