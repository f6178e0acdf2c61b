"""Prediction and evaluation on Ray: the results of a single process, nothing lost and nothing twice.

What needs Ray runs once, in a process of its own (`tests.ray_steps`); the other tests run the parts without it.
"""

import csv
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock
from PIL import Image

from maskwright.checkpoints.load import load_model
from maskwright.cluster import ray_predict
from maskwright.cluster import ray_session as session_module
from maskwright.cluster.ray_evaluate import EvaluateJob, EvaluateWorker
from maskwright.cluster.ray_options import RayOptions, WorkerPlan, parse_resources, plan_workers
from maskwright.cluster.ray_predict import PredictJob, PredictWorker, check_complete, cut_chunks, predict_on_ray
from maskwright.cluster.ray_session import check_node, ray_session
from maskwright.cluster.run_folder import RunFolder
from maskwright.errors import MaskwrightError
from maskwright.evaluation.evaluate import evaluate, merge_shares
from maskwright.inference.predict_files import predict_files
from maskwright.inference.predictor import Predictor
from tests import tiny
from tests.in_process import run_command

REPOSITORY = Path(__file__).parents[1]
TWO = RayOptions(workers=2)
TIMEOUT = 400  # seconds for all steps on Ray; 40 on two quiet cores


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Return the folder with a model, images in many forms, and a split; the processes of a session share it."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "on-ray"
    with FileLock(f"{root}.lock"):
        if not root.exists():
            write_inputs(root)
    return root


def write_inputs(root):
    root.mkdir()
    shutil.copy(tiny.trained_model(), root / "model.safetensors")
    tiny.write_panoptic(root / "data", 6)
    for number in range(9):
        folder = root / ("folder", "other", "more")[number // 3]
        folder.mkdir(exist_ok=True)
        Image.fromarray(tiny.scene_image(number)).save(folder / f"{number}.png")
    with zipfile.ZipFile(root / "more.zip", "w") as archive:
        for file in sorted((root / "more").iterdir()):
            archive.write(file, f"inside/{file.name}")
    with (root / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", "path"], *([i, f"other/{i}.png"] for i in (3, 4, 5))])
    stored = [{"bytes": (root / f"folder/{i}.png").read_bytes(), "path": f"stored/s{i}.png"} for i in (0, 1, 2)]
    pq.write_table(pa.table({"image": stored}), root / "bytes.parquet", row_group_size=2)
    (root / "damaged").mkdir()
    (root / "damaged/bad.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    transparent = np.dstack([tiny.scene_image(1), np.full((64, 64), 7, np.uint8)])
    transparent[::2, ::3, 3] = np.arange(22)
    (root / "transparent").mkdir()
    Image.fromarray(transparent).save(root / "transparent/image.png")


def inputs_of(root, *more):
    return [str(root / name) for name in ("folder", "more.zip", "list.csv", "bytes.parquet", *more)]


@pytest.fixture(scope="module")
def on_ray(root):
    """Return a function that returns the outcome of a step of `tests.ray_steps`, which run once per session."""
    pytest.importorskip("ray")
    with FileLock(f"{root}.lock"):
        if not (root / "outcomes.pkl").exists():
            (root / "outcomes.pkl").write_bytes(pickle.dumps({"end": "the steps on Ray have no outcome"}))
            problem = run_steps(root)
            outcomes = pickle.loads((root / "outcomes.pkl").read_bytes())
            (root / "outcomes.pkl").write_bytes(pickle.dumps(outcomes | {"end": problem}))
    outcomes = pickle.loads((root / "outcomes.pkl").read_bytes())
    if "start" in outcomes:
        pytest.skip(f"Ray does not start on this machine: {outcomes['start']}")

    def outcome(step):
        assert not outcomes["end"], outcomes["end"]
        assert not isinstance(outcomes[step], str), outcomes[step]
        return outcomes[step]

    return outcome


def run_steps(root):
    """Run `tests.ray_steps`; return what was wrong with its end."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # short, because paths of sockets have at most 107 bytes
    resources = {"CPU": 2, "GPU": 0, "object_store_memory": 80_000_000}
    environment = {
        "RAY_TMPDIR": folder,
        "RAY_OVERRIDE_RESOURCES": json.dumps(resources),
        "RAY_memory_monitor_refresh_ms": "0",  # otherwise it kills workers where other programs use most of the memory
        "RAY_ADDRESS": "",  # not the cluster of whoever runs the tests
    }
    command = [sys.executable, "-m", "tests.ray_steps", str(root), str(TIMEOUT - 10)]
    problem = ""
    with (root / "output.txt").open("w") as output:
        steps = subprocess.Popen(command, cwd=REPOSITORY, stdout=output, stderr=output, env=os.environ | environment)
        try:
            steps.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            problem = f"the steps on Ray took more than {TIMEOUT} seconds\n"
            steps.kill()
            steps.wait()
    left = wait_for_the_end(folder)
    shutil.rmtree(folder, ignore_errors=True)
    if steps.returncode and not problem:
        problem = f"the steps on Ray ended with status {steps.returncode}\n"
    if left and not problem:
        problem = f"processes of Ray that did not end: {', '.join(left)}\n"
    if problem:
        problem += "\n".join((root / name).read_text()[-4000:] for name in ("output.txt", "stacks.txt"))
    return problem


def wait_for_the_end(folder):
    """Wait for the processes of the Ray in a folder; kill those that stay, and return their names."""

    def running():
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("RAY_TMPDIR") == folder and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    end = time.monotonic() + 60
    while (left := running()) and time.monotonic() < end:
        time.sleep(0.5)
    names = []
    for process in left:
        with suppress(psutil.Error):
            names.append(process.name())
            process.kill()
    return names


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def predict(root, inputs, output, options=TWO, **settings):
    return predict_on_ray(root / "model.safetensors", inputs, output, options, device="cpu", **settings)


@pytest.fixture(scope="module")
def local(root, tmp_path_factory):
    """Return the folder in which a single process wrote the results."""
    output = tmp_path_factory.mktemp("local")
    predictor = Predictor(root / "model.safetensors", device="cpu")
    summary = predict_files(predictor, inputs_of(root, "damaged", "transparent"), output)
    assert (summary.done, len(summary.failures)) == (13, 1)
    return output


def test_workers_get_as_much_of_the_processor_as_the_command(on_ray):
    worker, command = on_ray("niceness")
    assert worker == command


def test_the_files_are_those_of_a_single_process(on_ray, root, local):
    summary, finished, logged = on_ray("files")
    assert (summary.done, summary.kept, len(summary.failures)) == (13, 0, 1)
    assert sum(count for count, _ in finished) == 14
    assert {total for _, total in finished} == {14}
    assert "14 images; workers: 2, threads per worker: 1" in logged
    assert [line for line in logged if "image.png: " in line and "transparent" in line], "a warning of a worker"
    found = files_in(root / "files")
    (failure,) = pq.read_table(pa.BufferReader(found.pop("failures.parquet"))).to_pylist()
    assert failure["source"] == str(root / "damaged/bad.png")
    assert "bad.png" in failure["reason"]
    assert len(found) == 39
    assert found == files_in(local)


def test_scores_are_those_of_a_single_process(on_ray, root):
    scores, images = on_ray("scores")
    recipe = tiny.recipe(root / "data", evaluate__metrics=["pq", "ap", "mean_iou"])
    assert scores == evaluate(load_model(root / "model.safetensors", "cpu"), recipe).scores
    assert images == 6


# Without Ray


class InlineSession:
    """A session whose workers run in this process."""

    def plan(self, _):
        return WorkerPlan(2, {"CPU": 1})

    def check_nodes(self, _):
        pass

    def run(self, worker, job, chunks, _):
        one = worker(job, lambda *_: 1)
        for number, chunk in enumerate(chunks):
            yield pickle.loads(pickle.dumps(one(number, chunk)))


@pytest.fixture
def sessions(monkeypatch):
    """Run predictions without Ray; return a list with an item for each session."""
    opened = []
    monkeypatch.setattr(ray_predict, "ray_session", lambda _: opened.append(1) or nullcontext(InlineSession()))
    return opened


def test_a_second_run_does_only_what_is_missing(root, local, tmp_path, sessions):
    output = tmp_path / "out"
    assert len(predict(root, inputs_of(root, "damaged"), output).failures) == 1
    for path in sorted(output.glob("*.json"))[:2]:
        path.unlink()
    before = {path: path.stat().st_mtime_ns for path in output.glob("*.json")}
    summary = predict(root, inputs_of(root, "transparent"), output)
    assert (summary.done, summary.kept, summary.failures) == (3, 10, [])
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert files_in(output) == files_in(local), "failures.parquet is gone, all files are there"
    assert len(sessions) == 2
    assert predict(root, inputs_of(root, "transparent"), output).kept == 13
    assert len(sessions) == 2, "nothing is missing, so Ray is not started"
    with pytest.raises(MaskwrightError, match=r"has results with object_threshold 0.4, not 0.9; choose another"):
        predict(root, inputs_of(root), output, object_threshold=0.9)


def rows_in(folder):
    return sorted(pq.read_table(sorted(folder.glob("part-*.parquet"))).to_pylist(), key=lambda row: row["name"])


def test_parquet_shards_are_those_of_a_single_process(root, tmp_path, sessions):
    from pycocotools import mask as coco_mask

    predictor = Predictor(root / "model.safetensors", device="cpu")
    inputs = inputs_of(root, "damaged")
    predict_files(predictor, inputs, tmp_path / "local", format="parquet", task="instance")
    summary = predict(root, inputs, tmp_path / "out", as_parquet=True, task="instance")
    assert (summary.done, len(summary.failures)) == (12, 1)
    rows = rows_in(tmp_path / "out")
    assert rows == rows_in(tmp_path / "local")
    assert len(rows) == len({row["name"] for row in rows}) == 12
    result = predictor(root / "folder/0.png", task="instance")
    (row,) = (row for row in rows if row["source"] == str(root / "folder/0.png"))
    assert (row["height"], row["width"], row["task"]) == (*result.size, "instance")
    assert [segment["name"] for segment in row["segments"]] == result.names
    np.testing.assert_array_equal(np.float32([segment["score"] for segment in row["segments"]]), result.scores)
    for segment, mask in zip(row["segments"], result.masks, strict=True):
        np.testing.assert_array_equal(coco_mask.decode(segment["mask"]).astype(bool), mask)
    assert predict(root, inputs, tmp_path / "out", as_parquet=True, task="instance").kept == 12
    with pytest.raises(MaskwrightError, match="has shards of an earlier prediction"):
        predict_files(predictor, inputs, tmp_path / "local", format="parquet")


def make_worker(folder):
    job = PredictJob(tiny.trained_model(), folder, {"confidence": False}, Path.cwd(), "cpu", "fp32", False)
    counts = Counter()

    def count(key, amount):
        counts[key] += amount
        return counts[key]

    return PredictWorker(job, count), counts


def test_a_threshold_that_lets_nothing_pass_is_explained_once(root, tmp_path, sessions, caplog):
    with caplog.at_level("INFO"):
        summary = predict(root, [str(root / "folder")], tmp_path / "out", object_threshold=1.0)
    assert summary.done == 3
    assert caplog.text.count("no segment in any of 3 images: the best score is") == 1


def numbered(root):
    paths = [*sorted((root / "folder").iterdir()), root / "damaged/bad.png"]
    return [(10 + i, path, path.stem) for i, path in enumerate(paths)]


def test_shares_of_a_split_have_the_scores_of_the_whole(tmp_path):
    recipe = tiny.recipe(tiny.write_panoptic(tmp_path / "data", 5), evaluate__metrics=["pq", "ap", "mean_iou"])
    alone = evaluate(load_model(tiny.trained_model(), "cpu"), recipe)
    workers = [EvaluateWorker(EvaluateJob(tiny.trained_model(), recipe, "val", "cpu", "fp32", 1), None) for _ in "ab"]
    shares = [pickle.loads(pickle.dumps(workers[rank % 2](rank, (rank, 3)))) for rank in (2, 0, 1)]
    assert [share.images for share in shares] == [1, 2, 2]
    assert merge_shares(shares).scores == alone.scores
    gone = EvaluateWorker(EvaluateJob(tmp_path / "gone.onnx", recipe, "val", "cpu", "fp32", 1), None)
    assert "gone.onnx" in str(gone(0, (0, 1)))


@pytest.mark.parametrize("as_parquet", [False, True])
def test_an_image_that_kills_its_workers_fails_alone(root, tmp_path, monkeypatch, as_parquet):
    folder = RunFolder(tmp_path, "panoptic", as_parquet, False)
    worker, counts = make_worker(folder)
    killed = root / "folder/1.png"
    original = worker._try

    def die_over_one(chunk, write):
        for image in chunk:
            original([image], write)
            if image[1] == killed:
                raise SystemExit("killed")
        return original([], write) if len(chunk) != 1 else original(chunk, write)

    monkeypatch.setattr(worker, "_try", die_over_one)
    for _ in range(3):
        with pytest.raises(SystemExit):
            worker(0, numbered(root))
        if as_parquet:
            assert not list(tmp_path.iterdir())
        for path in tmp_path.glob("1*"):  # the worker died before it wrote them
            path.unlink()
    outcome = worker(0, numbered(root))
    assert sorted(outcome.done) == [10, 12]
    assert [number for number, _ in outcome.failed] == [11, 13]
    assert outcome.failed[0][1].startswith("its process was killed each time")
    assert counts["image", 10] == counts["image", 12] == 0


def test_an_unexpected_error_is_the_failure_of_its_image(root, tmp_path, monkeypatch):
    worker, _ = make_worker(RunFolder(tmp_path, "panoptic", False, False))
    original = worker.pipeline.prepare
    broken = np.asarray(Image.open(root / "folder/2.png").convert("RGB"))

    def prepare(image):
        if np.array_equal(image.pixels, broken):
            raise RuntimeError("no memory\non the device")
        return original(image)

    monkeypatch.setattr(worker.pipeline, "prepare", prepare)
    outcome = worker(0, numbered(root))
    assert outcome.done == [10, 11]
    assert outcome.failed[0] == (12, "RuntimeError: no memory on the device")


def test_a_full_disk_ends_the_run_with_one_line(root, tmp_path, monkeypatch):
    worker, _ = make_worker(RunFolder(tmp_path, "panoptic", False, False))

    def write(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write)
    assert str(worker(0, numbered(root)).fatal).endswith(
        "cannot be written: No space left on device; free up disk space or choose another folder"
    )


def test_a_model_that_workers_cannot_see_ends_the_run_with_one_line(tmp_path):
    folder = RunFolder(tmp_path, "panoptic", False, False)
    job = PredictJob(tmp_path / "gone.onnx", folder, {}, Path.cwd(), "cpu", "fp32", False)
    assert "gone.onnx" in str(PredictWorker(job, lambda *_: 1)(0, []).fatal)


def test_results_of_other_predictions_are_neither_kept_nor_replaced(root, local, tmp_path):
    with pytest.raises(MaskwrightError, match="is a result of another prediction"):
        predict(root, inputs_of(root), local)
    folder = RunFolder(tmp_path, "panoptic", False, False)
    folder.open({"model": "a"}, [("street", "a/street.png")])
    assert (folder.attempt, folder.done) == (1, frozenset())
    (tmp_path / "street.json").write_text("mine")
    assert "exists, and is not a result" in folder.refusals(["street", "other"])["street"]
    with pytest.raises(MaskwrightError, match=r"a/street.png under the name 'street', which is now that of b/street"):
        RunFolder(tmp_path, "panoptic", False, False).open({"model": "a"}, [("street", "b/street.png")])


def test_every_image_must_have_one_outcome():
    check_complete({1, 2, 3}, [3, 1], [(2, "damaged")])
    for done, failed in (([1], []), ([1, 1], [(2, "")]), ([1, 2], [(2, "")])):
        with pytest.raises(MaskwrightError, match="does not add up"):
            check_complete({1, 2}, done, failed)
    images = [(i, Path(f"{i}.png"), str(i)) for i in range(1000)]
    for workers, largest in ((1, 64), (8, 64), (3, 7), (2000, 64)):
        chunks = cut_chunks(images, workers, largest)
        assert [image for chunk in chunks for image in chunk] == images
        assert max(map(len, chunks)) <= largest


@pytest.mark.parametrize(
    ("nodes", "options", "plan"),
    [
        ([{"CPU": 2}], {"workers": 2}, WorkerPlan(2, {"CPU": 1})),
        ([{"CPU": 2}], {}, WorkerPlan(1, {"CPU": 2})),
        ([{"CPU": 16}, {"CPU": 16}, {"CPU": 2}], {}, WorkerPlan(8, {"CPU": 4})),
        ([{"CPU": 16}] * 3, {"workers": 4}, WorkerPlan(4, {"CPU": 8})),
        ([{"CPU": 0}, {"CPU": 32, "GPU": 4}], {}, WorkerPlan(4, {"GPU": 1, "CPU": 8})),
        ([{"CPU": 32, "GPU": 4}], {"resources": {"GPU": 0.5}}, WorkerPlan(8, {"GPU": 0.5, "CPU": 4})),
        ([{"CPU": 8, "NPU": 2}], {"resources": {"NPU": 1}}, WorkerPlan(2, {"NPU": 1, "CPU": 4})),
        ([{"CPU": 8}], {"workers": 4, "resources": {"CPU": 4}}, WorkerPlan(4, {"CPU": 4}, is_waiting=True)),
    ],
)
def test_cores_and_accelerators_are_divided_among_the_workers(nodes, options, plan):
    assert plan_workers(nodes, RayOptions(**options), on_cpu=False) == plan


def test_accelerators_are_not_reserved_for_a_prediction_on_the_cpu():
    assert plan_workers([{"CPU": 8, "GPU": 8}], RayOptions(), on_cpu=True) == WorkerPlan(2, {"CPU": 4})


def test_more_workers_than_cores_are_an_error():
    with pytest.raises(MaskwrightError, match="3 workers with CPU 1 each do not fit into the cluster, which has CPU 2"):
        plan_workers([{"CPU": 2}], RayOptions(workers=3), on_cpu=True)
    with pytest.raises(MaskwrightError, match="expected a list like cpu=4,gpu=1, found 'cpu'"):
        parse_resources("cpu")
    assert parse_resources("cpu=4,gpu=0.5,NPU=1") == {"CPU": 4, "GPU": 0.5, "NPU": 1}


def test_an_address_that_nobody_answers_is_one_line(monkeypatch):
    monkeypatch.setattr(session_module, "_ANSWER_SECONDS", 1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{free.getsockname()[1]}"
        for name in (address, f"ray://{address}"):
            with pytest.raises(MaskwrightError, match=f"{name}: no Ray cluster answers within 1 seconds"):
                session_module._check_answers(name)


def test_a_machine_without_a_cluster_is_one_line():
    class NoRay:
        def init(self, *_, **__):
            raise ConnectionError("Could not find any running Ray instance. Please specify")

    with pytest.raises(
        MaskwrightError, match="--address auto: no Ray cluster that can be joined runs on this machine; start"
    ):
        session_module._start(NoRay(), "auto", False)


def test_nodes_must_have_the_same_versions_and_see_the_paths():
    ours = {"maskwright": "0.1.0", "torch": "2.14.0"}
    check_node("10.0.0.7", ours, ours, [])
    for theirs, missing, message in (
        ({"torch": "2.9.0"}, [], "node 10.0.0.7: has torch 2.9.0, and this process has 2.14.0"),
        ({"maskwright": None}, [], "node 10.0.0.7: does not have maskwright, and this process has 0.1.0"),
        ({}, ["/data/out"], "node 10.0.0.7: does not see /data/out; use a path that all machines share"),
    ):
        with pytest.raises(MaskwrightError, match=message):
            check_node("10.0.0.7", ours, ours | theirs, missing)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--worker-resources", "cpu=2"], "--worker-resources: is an option of the engine ray; add --engine ray"),
        (["--engine", "ray", "--submission", "coco"], "--submission is for the local engine"),
        (["--engine", "ray", "--format", "yolo"], "--format yolo is for the local engine"),
        (["--engine", "ray", "--worker-resources", "x"], "--worker-resources: expected a list like cpu=4"),
    ],
)
def test_options_that_do_not_fit_are_one_line(monkeypatch, capsys, root, tmp_path, arguments, message):
    command = ["predict", tiny.trained_model(), root / "folder", "--output", tmp_path / "out", *arguments]
    status, _, errors = run_command(monkeypatch, capsys, *command)
    assert status == 1
    assert errors.startswith(f"error: {message}")
    assert errors.count("\n") == 1


def test_without_ray_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MaskwrightError, match=r"needs Ray; pip install 'maskwright\[ray\]'"), ray_session(TWO):
        pass
