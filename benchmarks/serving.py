"""`maskwright serve` against a plain loop over the same images, and with many requests of which a tenth are hostile.

Both sides of the comparison decode the bytes of an image, segment it and write the result as JSON, with the same number
of threads. The loop is in this process; the service has its own two, and its clients are threads of this process.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, TypeVar

import psutil

from benchmarks.rows import Options, Part, Row, compared
from benchmarks.timing import Timing, alternate, threads, timed
from maskwright.errors import MaskwrightError
from maskwright.inference.predictor import Predictor
from tests import hostile_files, tiny
from tests.service import Service, encoded, expected

Asked = TypeVar("Asked")
Answered = TypeVar("Answered")

MODEL = "nuclei"
CLIENTS = (1, 8)
REQUESTS = 2000  # of the part `load`
_IMAGES = 8
_HOSTILE_EVERY = 10
_MAX_BYTES = 300_000
_MAX_GROWTH = 1.1  # of memory, between the first and the last quarter of the requests


def bench_serving(options: Options) -> Part:
    """Time a number of images through the service, with one client and with several, and in a loop."""
    folder = resources.files("maskwright.data") / "sample" / "val"
    images = [file.read_bytes() for file in sorted(folder.iterdir(), key=lambda file: file.name)[:_IMAGES]]
    predictor, waits = Predictor(MODEL, device="cpu"), {count: list[float]() for count in CLIENTS}

    def loop() -> None:
        for image in images:
            json.dumps(predictor(image).to_json())

    with threads(options.threads), _service(options, [f"model={MODEL}"]) as service:

        def ask(image: bytes) -> tuple[int, bytes]:
            return _post(service, "/v1/models/model/segment", image)

        def serve(count: int) -> None:
            for (status, _), seconds in _send(ask, images, count):
                if status != 200:
                    raise MaskwrightError(f"the service answered with status {status}")
                waits[count].append(seconds)

        calls = [timed(loop), *(timed(lambda count=count: serve(count)) for count in CLIENTS)]
        loop_seconds, *sides = alternate(calls, options.rounds or 3)
    setting = f"{MODEL}, fp32, {len(images)} images of about 256x256, {options.threads} threads"
    rows = [
        compared("serving", _clients(count), setting, "loop", [side, loop_seconds])
        for count, side in zip(CLIENTS, sides, strict=True)
    ]
    return Part(rows, [_latency(_clients(count), waits[count][len(images) :]) for count in CLIENTS])


def bench_load(options: Options) -> Part:
    """Send many requests, every tenth of them hostile, to a service with a small model.

    Raises:
        MaskwrightError: a good request has another answer than that of `predict`, a hostile one another than a problem
            with a status 4xx, the model process crashed, or memory grows.
    """
    with threads(options.threads), TemporaryDirectory() as folder:
        hostile = hostile_files.write(Path(folder) / "hostile")
        good, bad = _good_requests(hostile), _hostile_requests(hostile)
        chosen = random.Random(options.seed)
        requests = [chosen.choice(good if number % _HOSTILE_EVERY else bad) for number in range(REQUESTS)]
        with _service(options, [f"tiny={tiny.trained_model()}"], "--max-bytes", str(_MAX_BYTES)) as service:
            memory, seconds, failures = [], [], []
            processes = [psutil.Process(service.process.pid), service.model_process]

            def ask(request: _Request) -> str:
                return request.find_problem(*_post(service, request.path, request.body, request.headers))

            for request, (problem, took) in zip(requests, _send(ask, requests, CLIENTS[-1]), strict=True):
                memory.append(sum(process.memory_info().rss for process in processes) / 1e6)
                failures += [f"{request.name}: {problem}"] if problem else []
                seconds += [took] if request.answer is not None else []
            crashes = service.metric("maskwright_model_process_crashes_total")
    first, last = (statistics.fmean(part) for part in (memory[: len(memory) // 4], memory[-len(memory) // 4 :]))
    if failures or crashes or last > _MAX_GROWTH * first:
        found = f"{len(failures)} wrong answers, {crashes:g} crashes, {first:.0f} MB became {last:.0f} MB"
        raise MaskwrightError(f"{found}; {'; '.join(failures[:5])}")
    setting = f"{len(requests):,} requests, {CLIENTS[-1]} clients, a small model, images of 1x1 to 160x104"
    notes = [
        f"{len(seconds):,} good requests: all answered as `predict` does",
        f"{len(requests) - len(seconds):,} hostile requests of {len(bad)} kinds: all answered with one problem, 4xx",
        f"memory of the service, first and last quarter: {first:.0f} MB, {last:.0f} MB",
        _latency("good requests", seconds),
    ]
    return Part([Row("load", "good requests", setting, "", Timing(seconds), None)], notes)


class _Request(NamedTuple):
    """A request, and the JSON of its answer; None if it must be refused."""

    name: str
    path: str
    body: bytes
    headers: dict[str, str]
    answer: dict | None

    def find_problem(self, status: int, body: bytes) -> str:
        """Return what is wrong with the answer; empty if nothing is."""
        document = json.loads(body)
        if self.answer is not None:
            return "" if (status, document) == (200, self.answer) else f"status {status}, or another result"
        is_problem = isinstance(document, dict) and document.get("status") == status and document.get("found")
        return "" if 400 <= status < 500 and is_problem else f"status {status}: {body[:200]!r}"


def _good_requests(hostile: Path) -> list[_Request]:
    images = {f"scene {number}": encoded(tiny.scene_image(number, size)) for number, size in enumerate(_sizes())}
    entries = [entry for entry in hostile_files.IMAGES if entry.expect == "load"]
    images |= {entry.name: (hostile / entry.file).read_bytes() for entry in entries}
    predictor = Predictor(tiny.trained_model(), device="cpu")
    return [
        _Request(
            f"{name}, {task}", f"/v1/models/tiny/segment?task={task}", image, {}, expected(predictor, image, task=task)
        )
        for name, image in images.items()
        for task in ("semantic", "instance", "panoptic")
        if len(image) <= _MAX_BYTES
    ]


def _sizes() -> Iterator[tuple[int, int]]:
    for height in (33, 64, 96):
        for width in (40, 64, 81):
            yield height, width


def _hostile_requests(hostile: Path) -> list[_Request]:
    segment, infer = "/v1/models/tiny/segment", "/v2/models/tiny/infer"
    image = encoded(tiny.scene_image(0))
    entries = [
        entry for entry in hostile_files.IMAGES if entry.expect == "reject" and not (hostile / entry.file).is_dir()
    ]
    requests = [(entry.name, segment, (hostile / entry.file).read_bytes(), {}) for entry in entries]
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    field = b'--x\r\nContent-Disposition: form-data; name="%b"\r\n\r\n1\r\n'
    tensor = {"name": "image", "datatype": "UINT8", "shape": [1, 1, 3], "data": [0, 0, 0]}
    config = '<View><Image name="i" value="$i"/><BrushLabels name="b" toName="i"/></View>'
    requests += [
        ("unknown model", "/v1/models/other/segment", image, {}),
        ("path as a model", "/v1/models/..%2f..%2fetc%2fpasswd/segment", image, {}),
        ("unknown option", f"{segment}?tile_size=1", image, {}),
        ("option out of range", f"{segment}?top_k=100000000", image, {}),
        (
            "address in place of an image",
            segment,
            b'{"url": "http://127.0.0.1/"}',
            {"Content-Type": "application/json"},
        ),
        ("unknown type of answer", segment, image, {"Accept": "text/html"}),
        ("compressed body", segment, image, {"Content-Encoding": "gzip"}),
        ("too many bytes", segment, image + bytes(_MAX_BYTES), {}),
        ("form without a boundary", segment, image, {"Content-Type": "multipart/form-data"}),
        ("form without an end", segment, field % b"task" + b"--x", form),
        ("1,000 fields", segment, field % b"a" * 1000 + b"--x--\r\n", form),
        ("long name of a field", segment, field % (b"a" * 100_000) + b"--x--\r\n", form),
        ("nested JSON", infer, b"[" * 100_000, {}),
        ("tensor of other size", infer, json.dumps({"inputs": [tensor | {"data": [0]}]}).encode(), {}),
        ("huge tensor", infer, json.dumps({"inputs": [tensor | {"shape": [2**40, 2**40, 3]}]}).encode(), {}),
        ("texts as a tensor", infer, json.dumps({"inputs": [tensor | {"data": ["x" * 9999] * 20}]}).encode(), {}),
        ("false header length", infer, b"{}", {"Inference-Header-Content-Length": "99"}),
        ("file of the server", "/label-studio/predict", _tasks(config, "/data/local-files/?d=../../etc/passwd"), {}),
        ("address in a task", "/label-studio/predict", _tasks(config, "http://127.0.0.1/"), {}),
        ("entities", "/label-studio/predict", _tasks('<!DOCTYPE x [<!ENTITY a "b">]><View/>', "x"), {}),
    ]
    return [_Request(*request, None) for request in requests]


def _tasks(config: str, url: str) -> bytes:
    return json.dumps({"label_config": config, "tasks": [{"data": {"i": url}}]}).encode()


@contextmanager
def _service(options: Options, models: Sequence[str], *arguments: str) -> Iterator[Service]:
    """Run a service on the CPU, with a time limit that a busy machine keeps."""
    environment = {"OMP_NUM_THREADS": str(options.threads)}
    with TemporaryDirectory() as folder:
        command = ("--device", "cpu", "--timeout", "600", *arguments)
        service = Service(Path(folder), *command, models=models, environment=environment)
        try:
            yield service
        finally:
            service.process.terminate()
            service.process.wait()


def _send(
    ask: Callable[[Asked], Answered], requests: Sequence[Asked], clients: int
) -> Iterator[tuple[Answered, float]]:
    """Yield the answer of each request and its seconds, in order; each client sends one request after the other."""

    def call(request: Asked) -> tuple[Answered, float]:
        start = time.perf_counter()
        return ask(request), time.perf_counter() - start

    with ThreadPoolExecutor(clients) as pool:
        yield from pool.map(call, requests)


def _post(service: Service, path: str, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
    connection = HTTPConnection(service.url.removeprefix("http://"), timeout=600)
    try:
        connection.request("POST", path, body, headers or {})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def _clients(count: int) -> str:
    return f"{count} client{'s' * (count > 1)}"


def _latency(name: str, seconds: Sequence[float]) -> str:
    cuts = statistics.quantiles(seconds, n=20)
    return f"latency, {name}: median {statistics.median(seconds):.3f} s, 95 % within {cuts[-1]:.3f} s"
