"""A running `maskwright serve` with a small trained model, and what its answers must be."""

import io
import json
import os
import re
import subprocess
import sys
import time

import httpx
import psutil
from PIL import Image

from maskwright.results.draw import segment_colors
from tests import tiny

SEGMENT = "/v1/models/tiny/segment"


class Service:
    """A running `maskwright serve`."""

    def __init__(self, folder, *arguments, models=(), environment=None):
        self.log = folder / "log.txt"
        models = models or [f"{name}={tiny.trained_model()}" for name in ("tiny", "street")]
        command = [sys.executable, "-m", "maskwright", "serve", *models, "--port", "0", *arguments]
        with open(self.log, "wb") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {})
            self.process = subprocess.Popen(command, stderr=log, stdout=log, env=environment)
        wait_until(lambda: "listening on" in self.log.read_text() or self.process.poll() is not None)
        self.url = re.search(r"listening on (http://\S+),", self.log.read_text())[1]
        self.client = httpx.Client(base_url=self.url, timeout=120, limits=httpx.Limits(max_keepalive_connections=0))
        self.wait_until_ready()

    def wait_until_ready(self):
        wait_until(lambda: self.client.get("/readyz").status_code == 200 or self.process.poll() is not None)
        assert self.process.poll() is None, self.log.read_text()

    @property
    def model_process(self):
        children = psutil.Process(self.process.pid).children()
        return next(child for child in children if "spawn_main" in " ".join(child.cmdline()))

    def metric(self, name):
        lines = self.client.get("/metrics").text.splitlines()
        return float(next(line.split()[-1] for line in lines if line.startswith(f"{name} ")))

    def wait_for_queue(self, length):
        wait_until(lambda: self.metric("maskwright_queue") == length)

    def segment(self, image, **options):
        return self.client.post(SEGMENT, content=image, params=options)


def wait_until(condition, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def encoded(pixels, kind="png"):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def expected(predictor, image, **options):
    """The JSON answer that `predict` gives, with the colors of its overlay, as it comes out of JSON."""
    return as_answer(predictor(image, **options))


def as_answer(result):
    document = {"model": "tiny", **result.to_json()}
    for segment, color in zip(document["segments"], segment_colors(result).tolist(), strict=True):
        segment["color"] = color
    return json.loads(json.dumps(document))


def is_problem(response, status):
    """Whether the answer is one problem object, which names no file of the server."""
    problem = response.json()
    assert response.headers["content-type"] == "application/problem+json", response.text
    assert (response.status_code, problem["status"]) == (status, status), problem
    assert problem["found"]
    assert problem["found"] in problem["detail"]
    assert problem["request_id"] == response.headers["x-request-id"]
    assert not any(text in response.text for text in (tiny.trained_model().parent.name, "site-packages", "Traceback"))
    return True
