"""The service: a real server with its model process, and a real client."""

import asyncio
import base64
import io
import json
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from pathlib import Path

import numpy as np
import pytest
from hotcoco import mask as coco_mask
from PIL import Image

from maskwright.cli import app
from maskwright.data.images.safe_pillow import MAX_PIXELS
from maskwright.errors import MaskwrightError
from maskwright.inference.predictor import Predictor
from maskwright.serving import service_options
from maskwright.serving.request_options import RequestOptions
from maskwright.serving.service_options import ServiceOptions, name_models
from tests import hostile_files, tiny

pytest.importorskip("fastapi", reason="the service needs the extra `serve`")
httpx = pytest.importorskip("httpx", reason="httpx is the client of these tests")
pytest.importorskip("psutil", reason="psutil finds the model process")

import uvicorn  # noqa: E402

from maskwright.serving import server  # noqa: E402
from maskwright.serving.app import create_app  # noqa: E402
from maskwright.serving.encode import encode, id_image  # noqa: E402
from maskwright.serving.guard import Guard  # noqa: E402
from maskwright.serving.messages import JSON, PNG, Job  # noqa: E402
from maskwright.serving.metrics import Metrics  # noqa: E402
from maskwright.serving.model_process import ModelProcess  # noqa: E402
from tests.service import SEGMENT, Service, as_answer, encoded, expected, is_problem, wait_until  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def predictor():
    return Predictor(tiny.trained_model(), device="cpu")


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    service = Service(
        tmp_path_factory.mktemp("service"), "--device", "cpu", "--max-queue", "3", "--max-bytes", "300000"
    )
    yield service
    service.process.kill()


def test_every_image_is_answered_exactly_as_predict_does(service, predictor):
    sizes = [(64, 64), (64, 64), (40, 96), (64, 64), (40, 96), (33, 17)]
    images = [encoded(tiny.scene_image(number, size)) for number, size in enumerate(sizes)]
    tasks = ("panoptic", "semantic", "instance")
    wanted = [(image, task) for image in images for task in tasks]
    with ThreadPoolExecutor(3) as clients:
        answers = list(clients.map(lambda pair: service.segment(pair[0], task=pair[1]), wanted))
    for (image, task), answer in zip(wanted, answers, strict=True):
        assert answer.status_code == 200
        assert answer.json() == expected(predictor, image, task=task)


def test_form_fields_and_thresholds_are_those_of_predict(service, predictor):
    image = encoded(tiny.scene_image(3))
    form = {"task": "instance", "score_threshold": "0.3", "top_k": "5"}
    answer = service.client.post(SEGMENT, files={"image": ("any name", image)}, data=form)
    result = expected(predictor, image, task="instance", score_threshold=0.3, top_k=5)
    assert answer.json() == result
    assert result["segments"]


@pytest.mark.parametrize("task", ["panoptic", "semantic", "instance"])
def test_polygons_fill_to_the_masks_if_there_are_no_holes(predictor, task):
    result = predictor(encoded(tiny.scene_image(3)), task=task)
    body = encode(result, Job(1, "tiny", b"", RequestOptions(masks="polygons"), JSON))
    segments = json.loads(body)["segments"]
    exact = 0
    for segment, mask in zip(segments, result.masks, strict=True):
        assert "mask" not in segment
        parts = coco_mask.frPyObjects(segment["polygons"], *result.size) if segment["polygons"] else []
        filled = coco_mask.decode(coco_mask.merge(parts)).astype(bool) if parts else np.zeros_like(mask)
        assert (filled | mask == filled).all()
        assert segment["has_holes"] == (filled != mask).any()
        exact += not segment["has_holes"]
    assert exact


@pytest.mark.parametrize("task", ["panoptic", "semantic", "instance"])
def test_png_answers_are_the_overlay_and_the_ids_of_the_segments(service, predictor, task):
    image = encoded(tiny.scene_image(3))
    result = predictor(image, task=task)
    accept = {"Accept": "image/png,application/json;q=0.5"}
    overlay = service.client.post(SEGMENT, content=image, params={"task": task}, headers=accept)
    assert overlay.headers["content-type"] == "image/png"
    assert np.array_equal(Image.open(io.BytesIO(overlay.content)), result.overlay())
    answer = service.client.post(SEGMENT, content=image, params={"task": task, "png": "ids"}, headers=accept)
    ids = np.asarray(Image.open(io.BytesIO(answer.content)))
    assert np.array_equal(ids, id_image(result))
    best = int(np.argmax(result.scores)) if task == "instance" else 0
    assert (ids[result.masks[best]] == best + 1).all()


def test_hostile_images_are_answered_as_predict_does_or_refused_in_one_object(service, predictor, hostile):
    for entry in hostile_files.IMAGES:
        if (hostile / entry.file).is_dir():
            continue
        image = (hostile / entry.file).read_bytes()
        answer = service.segment(image)
        if answer.status_code == 200:
            assert entry.expect != "reject", entry
            assert answer.json() == expected(predictor, image), entry
        else:
            assert entry.expect != "load", (entry, answer.text)
            assert is_problem(answer, 413 if len(image) > 300_000 else 422), entry
    assert service.metric("maskwright_model_process_crashes_total") == 0


def test_wrong_requests_are_answered_with_one_problem(service):
    image = encoded(tiny.scene_image(3))
    post = service.client.post
    assert is_problem(post("/v1/models/other/segment", content=image), 404)
    assert is_problem(service.client.get("/nothing"), 404)
    assert is_problem(service.client.get(SEGMENT), 405)
    assert is_problem(post(SEGMENT, content=image, headers={"Accept": "text/html"}), 406)
    assert is_problem(post(SEGMENT, json={"url": "http://example.org/image.png"}), 415)
    assert is_problem(post(SEGMENT, content=b""), 422)
    assert is_problem(post(SEGMENT, content=b"\0" * 300_001), 413)
    assert is_problem(post(SEGMENT, content=(b"\0" * 1000 for _ in range(400))), 413)
    assert is_problem(service.segment(image, task="depth"), 422)
    assert is_problem(service.segment(image, score_threshold="2"), 422)
    unknown = service.segment(image, tile_size="1")
    assert is_problem(unknown, 422)
    assert unknown.json()["where"] == "tile_size"
    assert is_problem(post(f"{SEGMENT}?task=semantic&task=instance", content=image), 422)
    assert is_problem(post(SEGMENT, files={"image": image}, data={"task": ["semantic", "instance"]}), 422)
    assert is_problem(post(SEGMENT, files=[("image", image), ("image", image)]), 400)
    assert is_problem(post(SEGMENT, files={"photo": image}), 422)
    assert is_problem(post(SEGMENT, files={"image": image}, data={"task": "x" * 2000}), 400)
    damaged = {"Content-Type": "multipart/form-data"}
    assert is_problem(post(SEGMENT, content=image, headers=damaged), 400)
    assert service.segment(image).status_code == 200


def test_large_headers_are_refused(service):
    assert is_problem(service.client.get("/healthz", headers={"X-Long": "x" * 20_000}), 431)
    with socket.create_connection(address(service.url)) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nX-Long: " + b"x" * 20_000)
        assert client.recv(100).startswith(b"HTTP/1.1 400")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_commands_of_the_guide_run(service, tmp_path):
    text = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    commands = [line for line in text.splitlines() if line.startswith("curl ")]
    assert len(commands) >= 6
    Image.fromarray(tiny.scene_image(3)).save(tmp_path / "street.jpg")
    for command in commands:
        words = shlex.split(command.replace("http://127.0.0.1:8000", service.url))
        subprocess.run([words[0], "--fail", "--silent", *words[1:]], cwd=tmp_path, check=True, capture_output=True)
    assert Image.open(tmp_path / "overlay.png").mode == "RGB"
    assert Image.open(tmp_path / "ids.png").mode == "L"


def test_serve_commands_of_the_guide_parse():
    text = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    commands = re.findall(r"^(?:MASKWRIGHT_TOKEN=.* )?maskwright (serve .*)$", text, re.MULTILINE)
    assert len(commands) >= 2
    for command in commands:
        app.parse_args(shlex.split(command), print_error=False, exit_on_error=False)


def test_more_requests_than_the_queue_holds_are_refused(service):
    image = encoded(tiny.scene_image(3))
    service.model_process.suspend()
    with ThreadPoolExecutor(3) as clients:
        accepted = [clients.submit(service.segment, image) for _ in range(3)]
        service.wait_for_queue(3)
        refused = service.segment(image)
        service.model_process.resume()
        assert [future.result().status_code for future in accepted] == [200, 200, 200]
    assert is_problem(refused, 503)
    assert int(refused.headers["retry-after"]) >= 1
    assert service.metric("maskwright_queue") == 0


def test_a_client_that_leaves_cancels_its_work(service):
    image = encoded(tiny.scene_image(3))
    service.model_process.suspend()
    with pytest.raises(httpx.ReadTimeout):
        service.client.post(SEGMENT, content=image, timeout=0.3)
    service.wait_for_queue(0)
    before = service.metric("maskwright_batch_images_count")
    service.model_process.resume()
    assert service.segment(image).status_code == 200
    assert service.metric("maskwright_batch_images_count") == before + 1


def test_a_crash_of_the_model_process_is_answered_and_the_process_replaced(service, predictor):
    image = encoded(tiny.scene_image(3))
    service.model_process.suspend()
    with ThreadPoolExecutor(1) as client:
        answer = client.submit(service.segment, image)
        service.wait_for_queue(1)
        service.model_process.kill()
        assert is_problem(answer.result(), 500)
    service.wait_until_ready()
    assert service.metric("maskwright_model_process_crashes_total") == 1
    assert service.segment(image).json() == expected(predictor, image)


def test_sigterm_finishes_what_is_accepted_and_refuses_the_rest(service, predictor):
    """The last test with this service."""
    image = encoded(tiny.scene_image(3))
    service.model_process.suspend()
    with ThreadPoolExecutor(1) as client:
        answer = client.submit(service.segment, image)
        service.wait_for_queue(1)
        model_process = service.model_process
        service.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not is_listening(service.url))
        model_process.resume()
        assert answer.result().json() == expected(predictor, image)
    assert service.process.wait(60) == 0
    assert not model_process.is_running()
    assert service.log.read_text().splitlines()[-1] == "finished all accepted requests"


def is_listening(url):
    with socket.socket() as client:
        return client.connect_ex(address(url)) == 0


def address(url):
    host, port = url.removeprefix("http://").split(":")
    return host, int(port)


def test_a_model_that_cannot_be_loaded_ends_the_service_in_one_line(tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    command = [sys.executable, "-m", "maskwright", "serve", str(tmp_path / "broken.safetensors"), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "broken.safetensors" in done.stderr.splitlines()[-1]


def test_exported_files_are_served_and_pt2_files_refused_in_one_line(tmp_path):
    pytest.importorskip("onnxscript")
    from tests.test_runtime import exported

    model, image = exported() / "small.onnx", encoded(tiny.scene_image(3))
    service = Service(tmp_path, "--device", "cpu", models=[f"tiny={model}"])
    try:
        assert service.segment(image).json() == expected(Predictor(model), image)
    finally:
        service.process.kill()
    (tmp_path / "model.pt2").write_bytes(b"PK")
    command = [sys.executable, "-m", "maskwright", "serve", str(tmp_path / "model.pt2"), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"error: {tmp_path / 'model.pt2'}: PyTorch may run code that is in such a file when it loads it, so maskwright "
        "does not; use the checkpoint, or export to .onnx"
    )


# The model process alone


def test_images_of_one_size_and_options_share_a_forward_pass(predictor):
    ours, theirs = Pipe()
    options = ServiceOptions(models={"tiny": ""}, max_wait_ms=10_000)
    process = ModelProcess(theirs, {"tiny": predictor}, options, max_batch=4)
    thread = threading.Thread(target=process.run)
    images = [encoded(tiny.scene_image(number)) for number in range(4)]
    other = encoded(tiny.scene_image(9, (32, 64)))
    jobs = [Job(number, "tiny", image, RequestOptions(), JSON) for number, image in enumerate(images)]
    jobs.insert(2, Job(4, "tiny", other, RequestOptions(), PNG))
    for job in jobs:
        ours.send(job)
    thread.start()
    answers = [ours.recv() for _ in range(4)]
    ours.close()
    thread.join()
    assert sorted(answer.number for answer in answers) == [0, 1, 2, 3]
    assert all(answer.batch == 4 for answer in answers)
    together = Predictor(predictor.model, device="cpu", batch_size=4)(images)
    for answer, result in zip(sorted(answers), together, strict=True):
        assert json.loads(answer.body) == as_answer(result)
    for image, result in zip(images, together, strict=True):
        alone = predictor(image)
        assert result.names == alone.names
        np.testing.assert_allclose(result.scores, alone.scores, atol=1e-4)
        assert (result.segment_map == alone.segment_map).mean() > 0.999


# Without a model process


def call(options, method, path, **arguments):
    """One request to a service whose models are not loaded."""

    async def request():
        transport = httpx.ASGITransport(create_app(options, lambda supervisor: None))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as client:
            return await client.request(method, path, **arguments)

    return asyncio.run(request())


OPEN = ServiceOptions(models={"tiny": "tiny.safetensors"})
CLOSED = ServiceOptions(models={"tiny": "tiny.safetensors"}, token="secret", host="0.0.0.0")


def basic(user, password):
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def test_the_token_is_needed_for_everything_but_probes():
    wrong = (
        "Bearer secre",
        "secret",
        "Bearer",
        "Basic",
        "Basic secret",
        "Basic %%%",
        basic("secret", "x"),
        basic("a", "b"),
    )
    for headers in ({}, *({"Authorization": value} for value in wrong)):
        refused = call(CLOSED, "GET", "/metrics", headers=headers)
        assert is_problem(refused, 401)
        assert refused.headers["www-authenticate"] == "Bearer"
        assert is_problem(call(CLOSED, "POST", SEGMENT, content=b"x", headers=headers), 401)
    for right in ("Bearer secret", "bearer secret", basic("anybody", "secret")):
        assert call(CLOSED, "GET", "/metrics", headers={"Authorization": right}).status_code == 200
    assert call(CLOSED, "GET", "/healthz").text == "ok"
    assert is_problem(call(CLOSED, "GET", "/readyz"), 503)


def test_every_answer_has_a_request_id_and_security_headers():
    for path in ("/healthz", "/nothing"):
        response = call(OPEN, "GET", path, headers={"X-Request-ID": "a-1"})
        assert response.headers["x-request-id"] == "a-1"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in response.headers["content-security-policy"]
    assert call(OPEN, "GET", "/healthz", headers={"X-Request-ID": "a b\t"}).headers["x-request-id"] != "a b\t"


def converse(application, *pieces, unread_until=lambda: True):
    """Send bytes to an application behind the service's HTTP; return what it answers until it closes the connection."""

    async def connect():
        config = uvicorn.Config(application, lifespan="off", log_config=None)
        state = uvicorn.server.ServerState()
        loop = asyncio.get_running_loop()
        listener = await loop.create_server(lambda: server._TimeoutProtocol(config, state, {}), "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*listener.sockets[0].getsockname())
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        while not unread_until():
            await asyncio.sleep(0.02)
        answer = await asyncio.wait_for(reader.read(), 60)
        writer.close()
        listener.close()
        return answer

    return asyncio.run(connect())


HEALTH = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n"


def test_headers_that_do_not_arrive_close_the_connection(monkeypatch):
    monkeypatch.setattr(server, "_HEADER_SECONDS", 0.1)
    answer = converse(create_app(OPEN, lambda supervisor: None), HEALTH + b"\r\n" + HEALTH)
    assert answer.count(b"HTTP/1.1 200") == 1


def test_an_answer_that_is_not_read_closes_the_connection_and_counts_until_then(monkeypatch):
    monkeypatch.setattr(server, "_STALL_SECONDS", 0.1)
    size, sent = 50_000_000, []

    async def application(scope, receive, send):
        scope["state"]["finish"].callback(sent.append, True)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % size)]})
        await send({"type": "http.response.body", "body": bytes(size)})

    app = Guard(application, OPEN, Metrics())
    assert len(converse(app, HEALTH + b"\r\n", unread_until=lambda: sent)) < size


@pytest.mark.parametrize(
    "request_",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /healthz\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\n\r\n",
        HEALTH + b"Host: 127.0.0.1\r\n\r\n",
        HEALTH + b"Content-Length: -1\r\n\r\n",
        HEALTH + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
        HEALTH + b"Transfer-Encoding: gzip, chunked\r\n\r\n",
        HEALTH + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /metrics HTTP/1.1\r\n",
        b"POST /v1/models/tiny/segment HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_requests_that_are_no_http_are_answered_with_one_problem(request_):
    answer = converse(create_app(OPEN, lambda supervisor: None), request_)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request")
    assert b"application/problem+json" in head
    assert b"nosniff" in head
    assert json.loads(body)["status"] == 400


def test_head_is_answered_as_get_without_a_body():
    answer = converse(
        create_app(OPEN, lambda supervisor: None), HEALTH.replace(b"GET", b"HEAD") + b"Connection: close\r\n\r\n"
    )
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK")
    assert body == b""


def test_foreign_host_names_and_origins_are_refused_unless_allowed():
    assert is_problem(call(OPEN, "GET", "/metrics", headers={"Host": "evil.example:8000"}), 403)
    preflight = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in call(OPEN, "OPTIONS", SEGMENT, headers=preflight).headers
    allowed = ServiceOptions(models={"tiny": ""}, allow_origin=("https://a.example",))
    response = call(allowed, "OPTIONS", SEGMENT, headers=preflight)
    assert response.headers["access-control-allow-origin"] == "https://a.example"


def test_openapi_describes_the_answer_and_its_errors_with_examples():
    api = call(OPEN, "GET", "/openapi.json").json()["paths"]["/v1/models/{name}/segment"]["post"]
    assert set(api["requestBody"]["content"]) == {"multipart/form-data", "image/*"}
    assert api["responses"]["200"]["content"][JSON]["example"]["segments"]
    assert api["responses"]["422"]["content"]["application/problem+json"]["example"]["remedy"]
    names = {parameter["name"] for parameter in api["parameters"]}
    assert names == {"name", *RequestOptions.model_fields}


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"host": "0.0.0.0"}, "--host"),
        ({"host": "::"}, "--host"),
        ({"host": "example.org"}, "--host"),
        ({"token": "tökén"}, "--token"),
        ({"max_queue": 0}, "--max-queue"),
        ({"max_pixels": MAX_PIXELS + 1}, "--max-pixels"),
        ({"timeout": 0}, "--timeout"),
        ({"port": 70000}, "--port"),
        ({"label_studio_files": "/no/such/folder"}, "--label-studio-files"),
    ],
)
def test_options_that_are_wrong_or_unsafe_are_refused(changes, where):
    with pytest.raises(MaskwrightError) as error:
        ServiceOptions(models={"tiny": ""}, **changes).check()
    assert error.value.where == where
    ServiceOptions(models={"tiny": ""}, host="0.0.0.0", allow_open=True).check()
    assert service_options.MAX_PIXELS == MAX_PIXELS


def test_models_have_names():
    assert name_models(("a/street.onnx", "b=x/y.pkl")) == {"street": "a/street.onnx", "b": "x/y.pkl"}
    for wrong in ((), ("a.safetensors", "b/a.safetensors"), ("a/b=c.pkl",)):
        with pytest.raises(MaskwrightError):
            name_models(wrong)
