"""Prediction and evaluation on Ray: the results of a single process, nothing lost and nothing twice.

One Ray with two cores serves the tests of this file that need one; the others run the parts without it.
"""

import csv
import os
import pickle
import socket
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from maskwright.checkpoints.load import load_model
from maskwright.cli import main
from maskwright.cluster import ray_session as session_module
from maskwright.cluster.ray_evaluate import EvaluateJob, EvaluateWorker, evaluate_on_ray
from maskwright.cluster.ray_options import RayOptions, WorkerPlan, parse_resources, plan_workers
from maskwright.cluster.ray_predict import PredictJob, PredictWorker, check_complete, cut_chunks, predict_on_ray
from maskwright.cluster.ray_session import check_node, ray_session
from maskwright.cluster.run_folder import RunFolder
from maskwright.errors import MaskwrightError
from maskwright.evaluation.evaluate import evaluate, merge_shares
from maskwright.inference.predict_files import predict_files
from maskwright.inference.predictor import Predictor
from tests import tiny

ONE, TWO = RayOptions(workers=1), RayOptions(workers=2)


def free_ports(*names):
    """Return a free port for each name. Ray gives its agents 15 seconds to choose ports of their own."""
    sockets = [socket.socket() for _ in names]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return dict(zip(names, ports, strict=True))


AGENTS = ("metrics_agent_port", "dashboard_agent_listen_port", "runtime_env_agent_port")


@pytest.fixture(scope="module")
def ray():
    """One Ray for the file."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    cluster.add_node(num_cpus=2, object_store_memory=80_000_000, include_dashboard=False, **free_ports(*AGENTS))
    ray.init(cluster.address, log_to_driver=False)
    yield ray
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Return a folder, a zip, a CSV and a Parquet file with three images each, and a folder with a damaged image."""
    root = tmp_path_factory.mktemp("images")
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
    return root


def inputs_of(root):
    return [str(root / name) for name in ("folder", "more.zip", "list.csv", "bytes.parquet", "damaged")]


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def predict(inputs, output, options=TWO, **settings):
    return predict_on_ray(tiny.trained_model(), inputs, output, options, device="cpu", **settings)


@pytest.fixture(scope="module")
def local(images, tmp_path_factory):
    """Return the folder in which a single process wrote the results."""
    output = tmp_path_factory.mktemp("local")
    summary = predict_files(Predictor(tiny.trained_model(), device="cpu"), inputs_of(images), output)
    assert (summary.done, len(summary.failures)) == (12, 1)
    return output


def test_the_files_are_those_of_a_single_process(ray, images, local, tmp_path):
    finished = []
    summary = predict(
        inputs_of(images), tmp_path / "out", on_image=lambda count, total: finished.append((count, total))
    )
    assert (summary.done, summary.kept, len(summary.failures)) == (12, 0, 1)
    assert sum(count for count, _ in finished) == 13
    assert {total for _, total in finished} == {13}
    found = files_in(tmp_path / "out")
    (failure,) = pq.read_table(pa.BufferReader(found.pop("failures.parquet"))).to_pylist()
    assert failure["source"] == str(images / "damaged/bad.png")
    assert "bad.png" in failure["reason"]
    assert len(found) == 36
    assert found == files_in(local)
    _does_only_what_is_missing(images, local, tmp_path / "out")


def _does_only_what_is_missing(images, local, output):
    """Continues the test above, because its results take seconds."""
    removed = sorted(output.glob("*.json"))[:2]
    for path in removed:
        path.unlink()
    before = {path: path.stat().st_mtime_ns for path in output.glob("*.json")}
    summary = predict([*inputs_of(images)[:-1], str(images / "other")], output, ONE)
    assert (summary.done, summary.kept, summary.failures) == (2, 10, [])
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert files_in(output) == files_in(local), "failures.parquet is gone, all files are there again"
    started = ray_is_needed(lambda: predict(inputs_of(images)[:-1], output))
    assert started == 0, "nothing is missing, so no worker is started"
    with pytest.raises(MaskwrightError, match=r"has results with object_threshold 0.4, not 0.9; choose another"):
        predict(inputs_of(images), output, object_threshold=0.9)


def ray_is_needed(call):
    """Return the number of Ray sessions that a call opens."""
    import maskwright.cluster.ray_predict as module

    opened, original = [], module.ray_session
    module.ray_session = lambda options: opened.append(1) or original(options)
    try:
        call()
    finally:
        module.ray_session = original
    return len(opened)


def rows_in(folder):
    return sorted(pq.read_table(sorted(folder.glob("part-*.parquet"))).to_pylist(), key=lambda row: row["name"])


def test_parquet_shards_are_those_of_a_single_process(ray, images, tmp_path):
    from pycocotools import mask as coco_mask

    predictor = Predictor(tiny.trained_model(), device="cpu")
    inputs = inputs_of(images)
    predict_files(predictor, inputs, tmp_path / "local", format="parquet", task="instance")
    summary = predict(inputs, tmp_path / "out", ONE, as_parquet=True, task="instance")
    assert (summary.done, len(summary.failures)) == (12, 1)
    rows = rows_in(tmp_path / "out")
    assert rows == rows_in(tmp_path / "local")
    assert len(rows) == len({row["name"] for row in rows}) == 12
    result = predictor(images / "folder/0.png", task="instance")
    (row,) = (row for row in rows if row["source"] == str(images / "folder/0.png"))
    assert (row["height"], row["width"], row["task"]) == (*result.size, "instance")
    assert [segment["name"] for segment in row["segments"]] == result.names
    np.testing.assert_array_equal(np.float32([segment["score"] for segment in row["segments"]]), result.scores)
    for segment, mask in zip(row["segments"], result.masks, strict=True):
        np.testing.assert_array_equal(coco_mask.decode(segment["mask"]).astype(bool), mask)
    assert predict(inputs, tmp_path / "out", as_parquet=True, task="instance").kept == 12
    with pytest.raises(MaskwrightError, match="has shards of an earlier prediction"):
        predict_files(predictor, inputs, tmp_path / "local", format="parquet")


def test_scores_are_those_of_a_single_process(ray, tmp_path):
    recipe = tiny.recipe(tiny.write_panoptic(tmp_path / "data", 6), evaluate__metrics=["pq", "ap", "mean_iou"])
    alone = evaluate(load_model(tiny.trained_model(), "cpu"), recipe)
    finished = []
    options = {"device": "cpu", "on_image": lambda count, total: finished.append((count, total))}
    assert evaluate_on_ray(tiny.trained_model(), recipe, "val", TWO, **options).scores == alone.scores
    assert sum(count for count, _ in finished) == 6


def test_workers_have_the_options_their_share_of_the_cores_and_a_voice(ray, tmp_path, caplog):
    """Run one worker whose threshold lets nothing pass, over an image that needs a warning."""
    transparent = np.dstack([tiny.scene_image(1), np.full((64, 64), 7, np.uint8)])
    transparent[::2, ::3, 3] = np.arange(22)
    Image.fromarray(transparent).save(tmp_path / "image.png")
    with caplog.at_level("INFO"):
        summary = predict(
            [str(tmp_path / "image.png")], tmp_path / "out", object_threshold=1.0, options=RayOptions(workers=1)
        )
    assert summary.done == 1
    assert "1 images, 1 workers with 2 threads" in caplog.text
    assert "no segment: the best score is" in caplog.text
    assert "image.png: " in caplog.text


# Without Ray


def make_worker(folder):
    job = PredictJob(tiny.trained_model(), folder, {"confidence": False}, Path.cwd(), "cpu", "fp32", False)
    counts = Counter()

    def count(key, amount):
        counts[key] += amount
        return counts[key]

    return PredictWorker(job, count), counts


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
def test_an_image_that_kills_its_workers_fails_alone(images, tmp_path, monkeypatch, as_parquet):
    folder = RunFolder(tmp_path, "panoptic", as_parquet, False)
    worker, counts = make_worker(folder)
    killed = images / "folder/1.png"
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
            worker(0, numbered(images))
        if as_parquet:
            assert not list(tmp_path.iterdir())
        for path in tmp_path.glob("1*"):  # the worker died before it wrote them
            path.unlink()
    outcome = worker(0, numbered(images))
    assert sorted(outcome.done) == [10, 12]
    assert [number for number, _ in outcome.failed] == [11, 13]
    assert outcome.failed[0][1].startswith("its process was killed each time")
    assert counts["image", 10] == counts["image", 12] == 0


def test_an_unexpected_error_is_the_failure_of_its_image(images, tmp_path, monkeypatch):
    worker, _ = make_worker(RunFolder(tmp_path, "panoptic", False, False))
    original = worker.pipeline.prepare
    broken = np.asarray(Image.open(images / "folder/2.png").convert("RGB"))

    def prepare(image):
        if np.array_equal(image.pixels, broken):
            raise RuntimeError("no memory\non the device")
        return original(image)

    monkeypatch.setattr(worker.pipeline, "prepare", prepare)
    outcome = worker(0, numbered(images))
    assert outcome.done == [10, 11]
    assert outcome.failed[0] == (12, "RuntimeError: no memory on the device")


def test_a_full_disk_ends_the_run_with_one_line(images, tmp_path, monkeypatch):
    worker, _ = make_worker(RunFolder(tmp_path, "panoptic", False, False))

    def write(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write)
    assert str(worker(0, numbered(images)).fatal).endswith(
        "cannot be written: No space left on device; free up disk space or choose another folder"
    )


def test_a_model_that_workers_cannot_see_ends_the_run_with_one_line(tmp_path):
    folder = RunFolder(tmp_path, "panoptic", False, False)
    job = PredictJob(tmp_path / "gone.onnx", folder, {}, Path.cwd(), "cpu", "fp32", False)
    assert "gone.onnx" in str(PredictWorker(job, lambda *_: 1)(0, []).fatal)


def test_results_of_other_predictions_are_neither_kept_nor_replaced(images, local, tmp_path):
    with pytest.raises(MaskwrightError, match="is a result of another prediction"):
        predict(inputs_of(images), local)
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


def run(monkeypatch, capsys, *arguments):
    """Exit status, stdout and stderr of a command in this process."""
    monkeypatch.setattr(sys, "argv", ["maskwright", *map(str, arguments)])
    status = 0
    try:
        main()
    except SystemExit as end:
        status = end.code or 0
    output = capsys.readouterr()
    return status, output.out, output.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "2"], "--workers: is an option of the engine ray; add --engine ray"),
        (["--engine", "ray", "--submission", "coco"], "--submission is for the local engine"),
        (["--engine", "ray", "--format", "yolo"], "--format yolo is for the local engine"),
        (["--engine", "ray", "--worker-resources", "x"], "--worker-resources: expected a list like cpu=4"),
    ],
)
def test_options_that_do_not_fit_are_one_line(monkeypatch, capsys, images, tmp_path, arguments, message):
    command = ["predict", tiny.trained_model(), images / "folder", "--output", tmp_path / "out", *arguments]
    status, _, errors = run(monkeypatch, capsys, *command)
    assert status == 1
    assert errors.startswith(f"error: {message}")
    assert errors.count("\n") == 1


def test_without_ray_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MaskwrightError, match=r"needs Ray; pip install 'maskwright\[ray\]'"), ray_session(TWO):
        pass
