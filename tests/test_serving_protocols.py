"""The Open Inference Protocol, by Triton's client, and the protocol of Label Studio's model backends."""

import base64
import json
import os

import numpy as np
import pytest

from maskwright.errors import MaskwrightError
from maskwright.inference.predictor import Predictor
from maskwright.results.formats.label_config import read_control, write_config
from maskwright.results.formats.label_studio import make_prediction
from maskwright.serving import tensors
from maskwright.serving.tensors import read_inference
from maskwright.structures.annotations import Category
from tests import tiny

pytest.importorskip("fastapi", reason="the service needs the extra `serve`")
pytest.importorskip("httpx", reason="httpx is the client of these tests")
pytest.importorskip("psutil", reason="psutil finds the model process")

from tests.service import Service, encoded, is_problem
from tests.test_tool_formats import read_brush

INFER = "/v2/models/tiny/infer"
IMAGE = tiny.scene_image(3, (48, 64))


@pytest.fixture(scope="module")
def predictor():
    return Predictor(tiny.trained_model(), device="cpu")


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    folder = tmp_path_factory.mktemp("service")
    for name in ("files/street 1", "media/upload/7", "secret"):
        (folder / name).mkdir(parents=True)
    for name in ("files/street 1/ä.png", "media/upload/7/x.png", "secret/x.png"):
        (folder / name).write_bytes(encoded(IMAGE))
    (folder / "files/link.png").symlink_to(folder / "secret/x.png")
    (folder / "files/text.png").write_text("private words")
    (folder / "files/large.png").write_bytes(bytes(400_000))
    os.mkfifo(folder / "files/pipe.png")
    models = [f"tiny={tiny.trained_model()}"]
    folders = ["--label-studio-files", str(folder / "files"), "--label-studio-media", str(folder / "media")]
    limits = ["--device", "cpu", "--max-bytes", "300000", "--max-pixels", "20000"]
    service = Service(folder, *folders, *limits, models=models)
    yield service
    service.process.kill()


# Open Inference Protocol


@pytest.fixture(scope="module")
def triton(service):
    http = pytest.importorskip("tritonclient.http", reason="Triton's client")
    client = http.InferenceServerClient(service.url.removeprefix("http://"))
    yield client
    client.close()


def infer(triton, pixels, outputs=None, *, binary_input=True, **parameters):
    """Call the model by Triton's client; outputs: whether each is binary."""
    from tritonclient.http import InferInput, InferRequestedOutput

    tensor = InferInput("image", list(pixels.shape), "UINT8")
    tensor.set_data_from_numpy(pixels, binary_data=binary_input)
    wanted = None if outputs is None else [InferRequestedOutput(name, binary) for name, binary in outputs.items()]
    return triton.infer("tiny", [tensor], outputs=wanted, request_id="7", parameters=parameters)


def test_triton_finds_the_service_ready_and_its_model_described(service, triton, predictor):
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.is_model_ready("tiny")
    assert not triton.is_model_ready("other")
    assert triton.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    metadata = triton.get_model_metadata("tiny")
    assert metadata["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, -1, -1, 3]}]
    names = [category["name"] for category in metadata["parameters"]["categories"]]
    assert names == [category.name for category in predictor.model.categories]
    found = infer(triton, IMAGE, {output["name"]: True for output in metadata["outputs"]})
    for output in metadata["outputs"]:
        answer = found.get_output(output["name"])
        assert answer["datatype"] == output["datatype"]


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
def test_triton_gets_the_results_of_predict(triton, predictor, task, binary):
    names = {"semantic": ["label_map"], "instance": ["masks"], "panoptic": ["segment_map"]}[task]
    names += ["labels", "scores", "boxes"] if task != "semantic" else []
    found = infer(triton, IMAGE, dict.fromkeys(names, binary), binary_input=binary, task=task)
    result = predictor(IMAGE, task=task)
    assert found.get_response()["id"] == "7"
    for name in names:
        np.testing.assert_array_equal(found.as_numpy(name), getattr(result, name), err_msg=name)
    assert task == "semantic" or len(result)


def test_a_batch_is_segmented_image_by_image(triton, predictor):
    pixels = np.stack([tiny.scene_image(number) for number in (1, 2, 3)])
    found = infer(triton, pixels, task="instance", score_threshold=0.3)
    results = predictor(list(pixels), task="instance", score_threshold=0.3)
    index = found.as_numpy("image_index")
    for number, result in enumerate(results):
        np.testing.assert_array_equal(found.as_numpy("masks")[index == number], result.instance_masks)
        np.testing.assert_array_equal(found.as_numpy("boxes")[index == number], result.boxes)
    maps = infer(triton, pixels).as_numpy("segment_map")
    np.testing.assert_array_equal(maps, [result.segment_map for result in predictor(list(pixels))])
    assert infer(triton, pixels[:1]).as_numpy("segment_map").shape == (1, 64, 64)


def test_triton_raises_our_errors(triton):
    from tritonclient.utils import InferenceServerException

    def refused(pixels, outputs=None, **options):
        with pytest.raises(InferenceServerException) as error:
            infer(triton, pixels, outputs, **options)
        return error.value.message()

    assert refused(IMAGE, {"masks": True}) == (
        "outputs: a panoptic result has no output 'masks'; use segment_map, labels, scores, boxes, image_index"
    )
    assert refused(IMAGE, task="depth").startswith("task: Input should be 'semantic', 'instance' or 'panoptic'")
    assert refused(IMAGE, png="ids").startswith("png: unknown option; use one of task,")
    assert refused(IMAGE[:, :, :2]).startswith("shape: found [48, 64, 2], expected [height, width, 3]")
    assert refused(np.zeros((2, 20001, 3), np.uint8)) == "image: 40,002 pixels, the limit is 20,000"
    assert refused(np.zeros((17, 1, 1, 3), np.uint8)) == "shape: 17 images, expected at most 16"
    assert refused(np.zeros((400, 400, 3), np.uint8)).startswith("body: more than 300,000 bytes")


def request(**changes):
    tensor = {"name": "image", "datatype": "UINT8", "shape": [1, 2, 3], "data": [1, 2, 3, 4, 5, 6]} | changes
    return {"inputs": [tensor]}


@pytest.mark.parametrize(
    ("document", "found"),
    [
        ([], "body: expected an object"),
        ({}, "inputs: expected a list"),
        ({"inputs": []}, "inputs: expected one input"),
        (request(name="x"), "inputs: expected one input"),
        (request(datatype="BYTES"), "image: expected the datatype UINT8, UINT16, FP32"),
        (request(datatype=["UINT8"]), "image: expected the datatype"),
        (request(shape=[1, 2]), "shape: found [1, 2]"),
        (request(shape=[1, -2, 3]), "shape: found [1, -2, 3]"),
        (request(shape=[1, 2.0, 3]), "shape: expected an integer"),
        (request(shape=[1, True, 3]), "shape: expected an integer"),
        (request(shape=[10**30, 2, 3]), "image: 2,000"),
        (request(data=[1] * 5), "image: 5 values, but the shape (1, 2, 3) has 6"),
        (request(data=[1] * 5 + [256]), "data: has values other than UINT8"),
        (request(data=[1] * 5 + [0.5]), "data: has values other than UINT8"),
        (request(data=["1"] * 6), "data: has values other than UINT8"),
        (request(data=[[1], 2, 3]), "data: has values other than UINT8"),
        (request(data="123456"), "data: expected a list"),
        (request(datatype="FP32", data=[2.0] * 6), "image: float values from 2 to 2, expected 0..1"),
        (request(datatype="FP32", data=[float("nan")] * 6), "image: 6 values are NaN or infinite"),
        (request(parameters={"binary_data_size": 6}), "image: 0 bytes follow the JSON"),
        (request(parameters={"shared_memory_region": "x"}), "image: unknown parameter"),
        (request() | {"parameters": {"timeout": 1}}, "timeout: unknown option"),
        (request() | {"parameters": {"binary_data_output": 1}}, "binary_data_output: expected true or false"),
        (request() | {"outputs": [{"name": "labels", "parameters": {"classification": 3}}]}, "labels: unknown param"),
        (request() | {"outputs": ["labels"]}, "outputs: expected an object"),
        (request() | {"id": 7}, "id: expected a string"),
    ],
)
def test_damaged_requests_are_refused_in_one_sentence(service, document, found):
    answer = service.client.post(INFER, content=json.dumps(document))
    assert is_problem(answer, 422)
    assert answer.json()["error"] == answer.json()["detail"]
    assert answer.json()["error"].startswith(found), answer.json()["error"]


def test_bodies_that_are_no_requests_are_refused(service):
    post = service.client.post
    for body in (b"", b"\xff\xfe", b"{", b"[" * 100_000):
        assert is_problem(post(INFER, content=body), 422), body
    for length in ("x", "-1", "3.0", "9" * 30, "1000"):
        headers = {"Inference-Header-Content-Length": length}
        assert is_problem(post(INFER, content=b"{}", headers=headers), 400), length
    assert is_problem(post(INFER, content=b"{}", headers={"Content-Encoding": "gzip"}), 415)
    assert is_problem(post("/v2/models/other/infer", content=b"{}"), 404)
    assert "error" in service.client.get("/v2/repository/index").json()


def test_nested_lists_and_other_numbers_are_the_same_image():
    wide = IMAGE.astype(np.uint16) * 257
    unit = (IMAGE / 255).astype(np.float32)
    for kind, pixels in (("UINT8", IMAGE), ("UINT16", wide), ("FP32", unit)):
        for data in (pixels.tolist(), pixels.ravel().tolist()):
            body = json.dumps(request(shape=pixels.shape, datatype=kind, data=data)).encode()
            ((found,), is_batch) = read_inference(body, None, 3, 10**6)[1:3]
            np.testing.assert_array_equal(found, pixels)
            assert not is_batch


def test_answers_that_do_not_fit_are_refused(service, monkeypatch):
    body = json.dumps({"inputs": [request()["inputs"][0] | {"shape": [100, 200, 3], "data": [0] * 60000}]})
    assert service.client.post(INFER, content=body).status_code == 200
    result = Predictor(tiny.trained_model(), device="cpu")(IMAGE, task="instance", score_threshold=0)
    monkeypatch.setattr(tensors, "_MAX_ANSWER_BYTES", 10**5)
    with pytest.raises(MaskwrightError, match="the answer is too large"):
        tensors.write_inference([result], read_inference(json.dumps(request()).encode(), None, 3, 10**6), "tiny")


# Label Studio


def config(predictor, kind="BrushLabels", **renamed):
    """A labeling config in which classes have other labels; None removes one."""
    text = '<View><Image name="picture" value="$photo"/><Rectangle name="r" toName="picture"/>'
    text += f'<{kind} name="mask &amp; label" toName="picture">'
    for category in predictor.model.categories:
        label = renamed.get(category.name, category.name)
        alias = f' predicted_values="nothing, {category.name}"' if label != category.name else ""
        text += f'<Label value="{label}"{alias}/>' if label else ""
    return f"{text}</{kind}></View>"


def local(path):
    return {"id": 1, "data": {"photo": f"/data/local-files/?d={path}"}}


def inline(image):
    return {"data": {"photo": "data:image/png;base64," + base64.b64encode(image).decode()}}


def predict(service, config, *tasks):
    document = {"tasks": tasks, "label_config": config, "project": "1.1", "params": {"login": None}}
    return service.client.post("/label-studio/predict", json=document)


@pytest.mark.parametrize("prefix", ["/label-studio", "/label-studio/tiny"])
def test_label_studio_connects(service, predictor, prefix):
    assert service.client.get(f"{prefix}/health").json() == {"status": "UP"}
    setup = {"schema": config(predictor), "project": "1.1", "hostname": "http://localhost:8080", "access_token": "x"}
    answer = service.client.post(f"{prefix}/setup", json=setup)
    assert answer.json() == {"model_version": "maskwright tiny"}
    assert is_problem(service.client.get("/label-studio/other/health"), 404)


def test_a_config_without_labels_of_the_model_is_refused_at_setup(service, predictor):
    def setup(schema):
        answer = service.client.post("/label-studio/setup", json={"schema": schema})
        assert is_problem(answer, 422)
        return answer.json()["detail"]

    none = dict.fromkeys((category.name for category in predictor.model.categories), None)
    assert setup(config(predictor, **none)).startswith("the labeling config: no label of mask & label has the name")
    assert setup("<View></View>").startswith("the labeling config: has no BrushLabels or PolygonLabels for an image")
    assert setup("<View>") == "the labeling config: is not valid XML"
    assert setup('<!DOCTYPE x [<!ENTITY a "b">]><View>&a;</View>').startswith("the labeling config: has a document")
    assert setup(None) == "the labeling config: is missing"


def test_brushes_are_the_masks_of_predict(service, predictor):
    tasks = [local("street%201/%C3%A4.png"), {"data": {"photo": "/data/upload/7/x.png"}}, inline(encoded(IMAGE))]
    answer = predict(service, config(predictor), *tasks).json()
    result = predictor(IMAGE)
    assert answer["model_version"] == "maskwright tiny"
    assert answer["results"] == [answer["results"][0]] * 3
    regions = answer["results"][0]["result"]
    assert len(regions) == np.count_nonzero(result.areas) > 0
    for region, index in zip(regions, np.flatnonzero(result.areas), strict=True):
        mask = read_brush(region["value"]["rle"]).reshape(*result.size, 4)[..., 3] > 0
        np.testing.assert_array_equal(mask, result.masks[index])
        assert region["value"]["brushlabels"] == [result.names[index]]
        assert (region["from_name"], region["to_name"]) == ("mask & label", "picture")


def test_polygons_have_the_labels_that_stand_for_the_classes(service, predictor):
    result = predictor(IMAGE)
    renamed, removed = result.names[0], next(name for name in result.names if name != result.names[0])
    text = config(predictor, "PolygonLabels", **{renamed: "Thing &lt;1&gt;", removed: None})
    (answer,) = predict(service, text, local("street 1/ä.png")).json()["results"]
    labels = {region["value"]["polygonlabels"][0] for region in answer["result"]}
    assert "Thing <1>" in labels
    assert not {renamed, removed} & labels
    assert answer["unlabeled"] == {removed: result.names.count(removed)}
    for region in answer["result"]:
        points = np.array(region["value"]["points"])
        assert (points >= 0).all()
        assert (points <= 100).all()


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("http://127.0.0.1:1/x.png", "URLs are not downloaded"),
        ("https://example.org/data/local-files/?d=x.png", "URLs are not downloaded"),
        ("//example.org/data/upload/7/x.png", "URLs are not downloaded"),
        ("s3://bucket/x.png", "URLs are not downloaded"),
        ("file:///etc/passwd", "URLs are not downloaded"),
        ("/etc/passwd", "URLs are not downloaded"),
        ("http://[", "is not a URL"),
        ("/data/local-files/?d=../secret/x.png", "is outside the folder of --label-studio-files"),
        ("/data/local-files/?d=%2e%2e/secret/x.png", "is outside the folder of --label-studio-files"),
        ("/data/local-files/?d=link.png", "is outside the folder of --label-studio-files"),
        ("/data/local-files/?d=", "is outside the folder of --label-studio-files"),
        ("/data/upload/../../secret/x.png", "is outside the folder of --label-studio-media"),
        ("/data/upload/%2e%2e/%2e%2e/secret/x.png", "is outside the folder of --label-studio-media"),
        ("/data/local-files/?d=a%00b", "is not a path"),
        ("/data/local-files/?d=none.png", "No such file or directory"),
        ("/data/local-files/?d=" + "x" * 300, "File name too long"),
        ("/data/local-files/?d=street 1", "Is a directory"),
        ("/data/local-files/?d=pipe.png", "is not a regular file"),
        ("/data/local-files/?d=large.png", "has more than 300,000 bytes"),
        ("/data/local-files/?d=text.png", "not an image"),
        ("data:image/png;base64,%%%", "the image is not valid base64"),
        ("data:image/png,x", "expected data:image/...;base64,..."),
    ],
)
def test_other_images_are_refused_in_one_sentence(service, predictor, url, found):
    answer = predict(service, config(predictor), {"data": {"photo": url}})
    assert is_problem(answer, 422)
    assert found in answer.json()["found"]
    assert "secret/x.png" not in answer.text.replace(url, "")
    assert "private" not in answer.text


def test_a_task_that_fails_among_others_has_an_empty_result_and_its_error(service, predictor):
    good = local("street%201/%C3%A4.png")
    answers = predict(service, config(predictor), good, local("none.png"), {"data": 7}, good).json()["results"]
    assert answers[0] == answers[3]
    assert answers[0]["result"]
    assert answers[1]["result"] == answers[2]["result"] == []
    assert answers[1]["error"] == "/data/local-files/?d=none.png: No such file or directory"
    assert answers[2]["error"] == "task: has no image 'photo' in its data"
    assert "2 of 4 Label Studio tasks failed" in service.log.read_text()


def test_requests_that_are_none_of_label_studio_are_refused(service, predictor):
    post = service.client.post
    for route in ("setup", "predict"):
        assert is_problem(post(f"/label-studio/{route}", content=b"[" * 100_000), 400)
        assert is_problem(post(f"/label-studio/{route}", json=[]), 400)
    assert is_problem(predict(service, config(predictor)), 422)
    assert is_problem(post("/label-studio/predict", json={"tasks": [7], "label_config": config(predictor)}), 422)
    assert is_problem(post("/label-studio/train", json={}), 404)
    assert is_problem(predict(service, config(predictor), *[7] * 1001), 422)


def test_json_that_needs_far_more_memory_than_its_text_is_not_read():
    for body in (b"{}," * 1001, b"[]," * (2**22 + 1)):
        with pytest.raises(MaskwrightError, match="too many lists or objects"):
            read_inference(body, None, 3, 10)


def test_the_config_that_predict_writes_is_read():
    categories = (Category(7, 'cat "A" <b>', True, (255, 0, 0)), Category(3, "dög", True, (0, 255, 0)))
    for kind in ("BrushLabels", "PolygonLabels"):
        control = read_control(write_config(categories, kind))
        assert control == (kind, "segments", "image", {'cat "A" <b>': 'cat "A" <b>', "dög": "dög"}, "image")


def test_label_studios_converter_reads_brushes_back_to_the_masks(predictor):
    brush = pytest.importorskip(
        "label_studio_sdk.converter.brush", reason="pip install --no-deps label-studio-sdk: it needs an older OpenCV"
    )
    for task in ("semantic", "instance", "panoptic"):
        result = predictor(IMAGE, task=task)
        regions = make_prediction(result, read_control(config(predictor)), "tiny")["result"]
        flat = [{**region, **region["value"]} for region in regions]  # as the converter flattens them
        layers = brush.decode_from_annotation("tag", flat)
        assert len(layers) == np.count_nonzero(result.areas) > 0
        for region, index in zip(regions, np.flatnonzero(result.areas), strict=True):
            mask = brush.decode_rle(region["value"]["rle"]).reshape(*result.size, 4)[:, :, 3] > 0
            np.testing.assert_array_equal(mask, result.masks[index])
