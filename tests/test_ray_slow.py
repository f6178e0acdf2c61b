"""Ray when things go wrong, and on more than one machine: kills, a resumed run, two nodes, S3, and memory."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import contextmanager, suppress

import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image

from maskwright.cluster.ray_options import RayOptions
from maskwright.cluster.ray_predict import predict_on_ray
from maskwright.errors import MaskwrightError
from maskwright.inference.predict_files import predict_files
from maskwright.inference.predictor import Predictor
from tests import tiny

pytestmark = pytest.mark.slow
pytest.importorskip("ray")


ONE_CORE = ("--worker-resources", "cpu=1")  # two threads would wait for each other on a busy machine


def write_images(folder, count):
    folder.mkdir()
    for number in range(count):
        Image.fromarray(tiny.scene_image(number, (32, 32))).save(folder / f"{number:04d}.png", compress_level=1)
    return folder


def workers_below(process):
    """Return the worker processes that Ray Data has started below a process."""
    found = []
    for child in process.children(recursive=True):
        try:
            if "MapWorker" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return value


def command(images, output, *options):
    return [
        *(sys.executable, "-m", "maskwright", "predict", str(tiny.trained_model()), str(images)),
        *("--output", str(output), "--device", "cpu", "--engine", "ray", "--workers", "1", *ONE_CORE, *options),
    ]


def results(output):
    return {path: path.stat().st_mtime_ns for path in output.glob("*.json")}


def test_a_killed_worker_is_replaced_and_a_killed_run_does_the_rest(tmp_path):
    """One command: its worker is killed, later it is killed itself; the second command finishes, without noise."""
    images, output = write_images(tmp_path / "images", 400), tmp_path / "out"
    first = subprocess.Popen(command(images, output), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process = psutil.Process(first.pid)
    wait_for(lambda: len(results(output)) > 10)
    (worker,) = workers_below(process)
    worker.send_signal(signal.SIGKILL)
    before = len(results(output))
    wait_for(lambda: len(results(output)) > before + 10)
    assert [other.pid for other in workers_below(process)] != [worker.pid]
    below = process.children(recursive=True)
    first.kill()
    first.wait()
    wait_for(lambda: not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in below))
    kept = results(output)
    assert 20 < len(kept) < 400

    second = subprocess.run(command(images, output), capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stderr
    assert second.stdout.startswith(f"400 of 400 images, {len(kept)} of them before -> {output}; ")
    assert second.stdout.endswith(" images/s\n")
    assert second.stderr.splitlines() == [
        f"{len(kept)} of 400 images are done already",
        f"{400 - len(kept)} images; workers: 1, threads per worker: 1",
    ], "nothing of Ray's own messages"
    after = results(output)
    assert len(after) == 400
    assert {path: after[path] for path in kept} == kept
    assert not list(output.glob(".*.partial"))


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """Return a bucket on a real S3 server on this machine; processes that are started later see it."""
    boto3 = pytest.importorskip("boto3")  # these three need an older python-dateutil than the pinned packages
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    environment = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    for name, value in (environment | {"AWS_DEFAULT_REGION": "us-east-1"}).items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="photos")
    yield client
    server.stop()


@contextmanager
def start_cluster(nodes):
    """Start a Ray of a head without cores, and nodes with one core each."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 80_000_000})
    try:
        for _ in range(nodes):
            cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
        yield cluster
    finally:
        cluster.shutdown()


def test_two_nodes_read_from_s3(tmp_path, bucket):
    images = write_images(tmp_path / "images", 12)
    for path in sorted(images.iterdir())[:4]:
        bucket.upload_file(str(path), "photos", f"day/{path.name}")
    with zipfile.ZipFile(tmp_path / "more.zip", "w") as archive:
        for path in sorted(images.iterdir())[4:8]:
            archive.write(path, path.name)
    bucket.upload_file(str(tmp_path / "more.zip"), "photos", "more.zip")
    (tmp_path / "list.csv").write_text("path\n" + "\n".join(f"late/{i:04d}.png" for i in range(8, 13)))
    bucket.upload_file(str(tmp_path / "list.csv"), "photos", "list.csv")
    for path in sorted(images.iterdir())[8:]:
        bucket.upload_file(str(path), "photos", f"late/{path.name}")
    inputs = ["s3://photos/day", "s3://photos/more.zip", "s3://photos/list.csv"]
    with start_cluster(2) as cluster:
        options = RayOptions(address=cluster.address)
        summary = predict_on_ray(tiny.trained_model(), inputs, tmp_path / "out", options, device="cpu")
        with pytest.raises(MaskwrightError, match="s3://photos/none: cannot be read"):
            predict_on_ray(tiny.trained_model(), ["s3://photos/none"], tmp_path / "out", options, device="cpu")
    assert (summary.done, len(summary.failures)) == (12, 1)
    assert "s3://photos/late/0012.png: cannot be read" in summary.failures[0][1]
    local = predict_files(Predictor(tiny.trained_model(), device="cpu"), [str(images)], tmp_path / "local")
    assert local.done == 12
    ours, theirs = (sorted((tmp_path / name).glob("*.png")) for name in ("out", "local"))
    assert [path.name for path in ours] == [path.name for path in theirs]
    assert [path.read_bytes() for path in ours] == [path.read_bytes() for path in theirs]
    (failure,) = pq.read_table(tmp_path / "out/failures.parquet").to_pylist()
    assert failure["name"] == "0012"


@contextmanager
def node_without(folder, address):
    """Start a node in which a folder is empty; skip the test where that is not allowed."""
    unshare = [shutil.which("unshare") or "unshare", "--mount"]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("unshare --mount, which hides the folder from the node, is not allowed here")
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={address}", "--num-cpus=1", "--block"]
    start += ["--object-store-memory=80000000", "--min-worker-port=0", "--max-worker-port=0"]
    command = [*unshare, "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(folder), *start]
    log = folder.with_suffix(".log")
    with log.open("w") as output:
        node = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        wait_for(lambda: "Ray runtime started" in log.read_text() or node.poll() is not None)
        assert node.poll() is None, log.read_text()
        yield
    finally:
        node.terminate()
        node.wait()


def test_a_node_that_does_not_see_an_exported_model_is_named(tmp_path):
    from tests.test_runtime import exported

    images, models = write_images(tmp_path / "images", 2), tmp_path / "models"
    models.mkdir()
    shutil.copy(exported() / "small.onnx", models)
    with start_cluster(1) as cluster, node_without(models, cluster.address):
        options = RayOptions(address=cluster.address)
        expected = r"node [\d.]+: does not see .*/models/small\.onnx; use a path that all machines share, or a URL$"
        with pytest.raises(MaskwrightError, match=expected):
            predict_on_ray(models / "small.onnx", [str(images)], tmp_path / "out", options, device="cpu")


def test_a_node_with_another_version_is_named(tmp_path):
    images = write_images(tmp_path / "images", 2)
    package = tmp_path / "newer/maskwright-9.9.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: maskwright\nVersion: 9.9\n")
    path = os.pathsep.join((str(package.parent), os.environ.get("PYTHONPATH", "")))
    with start_cluster(1) as cluster:
        cluster.add_node(num_cpus=1, object_store_memory=80_000_000, env_vars={"PYTHONPATH": path})
        options = RayOptions(address=cluster.address)
        expected = r"node [\d.]+: has maskwright 9\.9, and this process has .*; install the same version$"
        with pytest.raises(MaskwrightError, match=expected):
            predict_on_ray(tiny.trained_model(), [str(images)], tmp_path / "out", options, device="cpu")


def test_a_local_ray_refuses_programs_without_its_token():
    """In a process of its own, because Ray reads the token when it is imported."""
    join = "import ray; ray.init({address!r})"
    program = f"""if True:
        import os, subprocess, sys
        from maskwright.cluster.ray_options import RayOptions
        from maskwright.cluster.ray_session import ray_session
        with ray_session(RayOptions()):
            import ray
            join = {join!r}.format(address=ray.get_runtime_context().gcs_address)
            others = {{name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}}
            statuses = [
                subprocess.run([sys.executable, "-c", join], env=env, capture_output=True).returncode
                for env in (others, others | {{"RAY_AUTH_MODE": "disabled"}}, os.environ)
            ]
        sys.exit(statuses != [1, 1, 0])
    """
    subprocess.run([sys.executable, "-c", program], check=True)


class Memory(threading.Thread):
    """Samples the memory of a command, its worker, and the other processes of Ray, in MB, by the number of shards."""

    def __init__(self, process, output):
        super().__init__(daemon=True)
        self.process, self.output, self.samples, self.stopped = process, output, [], False

    def run(self):
        while not self.stopped:
            used = {"driver": 0.0, "worker": 0.0, "others": 0.0}
            for one in (self.process, *self.process.children(recursive=True)):
                with suppress(psutil.Error):
                    is_worker = "MapWorker" in " ".join(one.cmdline())
                    name = "driver" if one == self.process else "worker" if is_worker else "others"
                    used[name] += one.memory_full_info().uss / 1e6
            self.samples.append((len(list(self.output.glob("part-*.parquet"))), used))
            time.sleep(1)

    def peak(self, shards):
        """Return the peak of each until there were so many shards."""
        used = [used for count, used in self.samples if count <= shards]
        return {name: round(max(one[name] for one in used)) for name in used[0]}


def test_memory_is_flat_over_5000_images(tmp_path, capsys):
    images, output = write_images(tmp_path / "images", 5000), tmp_path / "out"
    start = time.monotonic()
    run = subprocess.Popen(command(images, output, "--format", "parquet"), stdout=subprocess.PIPE, text=True)
    memory = Memory(psutil.Process(run.pid), output)
    memory.start()
    text, _ = run.communicate()
    memory.stopped = True
    memory.join()
    assert run.returncode == 0
    assert text.startswith("5000 of 5000 images")
    rows = pq.read_table(sorted(output.glob("part-*.parquet")), columns=["name"])
    assert len(set(rows.column(0).to_pylist())) == len(rows) == 5000
    early, late = memory.peak(1), memory.peak(10)  # shards of 512: while the first 1,024 images run, and all
    with capsys.disabled():
        print(f"\npeak MB: {early} at 1,000 images, {late} at 5,000; {time.monotonic() - start:.0f} s, {text.strip()}")
    for name in early:
        assert late[name] < early[name] + 60, memory.samples
