"""Requests and answers of the Open Inference Protocol with its binary tensor extension.

Format: https://github.com/kserve/open-inference-protocol, and the extension "binary tensor data" of Triton. A body is
JSON; tensors are lists in it, or little-endian bytes after it.
"""

from __future__ import annotations

import array
import itertools
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from maskwright.errors import MaskwrightError, printable
from maskwright.serving.request_options import RequestOptions, parse_options

if TYPE_CHECKING:
    from maskwright.results.segmentation import Segmentation

Value = TypeVar("Value")

HEADER_LENGTH = "Inference-Header-Content-Length"
MAX_IMAGES = 16  # of a request
_MAX_ANSWER_BYTES = 2**28
_BYTES_IN_JSON = 16  # memory of a value while the answer is written
_MAX_OBJECTS, _MAX_LISTS = 1000, 2**22  # in the JSON of a request; a nested list has one per pixel
_INPUT = "image"
_TYPES = {"UINT8": "u1", "UINT16": "<u2", "INT32": "<i4", "FP32": "<f4", "BOOL": "?"}
_INPUT_TYPE_CODES = {"UINT8": "B", "UINT16": "H", "FP32": "f"}  # for `array.array`
_JSON_TYPES: dict[type, str] = {
    dict: "an object",
    list: "a list",
    bool: "true or false",
    str: "a string",
    int: "an integer",
}
_SEGMENTS = {
    "labels": ("INT32", (-1,)),
    "scores": ("FP32", (-1,)),
    "boxes": ("FP32", (-1, 4)),
    "image_index": ("INT32", (-1,)),
}
_OUTPUTS = {  # datatype and shape, in which -1 is any size, of the outputs of each task
    "semantic": {"label_map": ("INT32", (-1, -1, -1))},
    "panoptic": {"segment_map": ("INT32", (-1, -1, -1)), **_SEGMENTS},
    "instance": {"masks": ("BOOL", (-1, -1, -1)), **_SEGMENTS},
}


class InferenceRequest(NamedTuple):
    """A request.

    Attributes:
        id: the client's, or None.
        images: each (H, W, C).
        is_batch: whether maps have a batch dimension.
        options: thresholds and task.
        outputs: the wanted outputs, and whether their data is binary; None is all.
        binary: whether data is binary if `outputs` is None.
    """

    id: str | None
    images: list[np.ndarray]
    is_batch: bool
    options: RequestOptions
    outputs: dict[str, bool] | None
    binary: bool


def describe_tensors(task: str, channels: int) -> dict[str, Any]:
    """Return the inputs and outputs of a model for the protocol's metadata."""
    outputs = [{"name": name, "datatype": kind, "shape": shape} for name, (kind, shape) in _OUTPUTS[task].items()]
    return {"inputs": [{"name": _INPUT, "datatype": "UINT8", "shape": [-1, -1, -1, channels]}], "outputs": outputs}


def read_inference(body: bytes, header_bytes: int | None, channels: int, max_pixels: int) -> InferenceRequest:
    """Read a request.

    Args:
        body: of the request.
        header_bytes: length of the JSON at its start; None is the whole body.
        channels: of the model's images.
        max_pixels: of one image, height x width.

    Raises:
        MaskwrightError: it is malformed, or asks for an unknown output.
    """
    header = _read_header(body[:header_bytes])
    parameters = dict(_typed(header.get("parameters", {}), dict, "parameters"))
    binary = _typed(parameters.pop("binary_data_output", False), bool, "binary_data_output")
    tensors = _typed(header.get("inputs"), list, "inputs")
    if len(tensors) != 1 or not isinstance(tensors[0], dict) or tensors[0].get("name") != _INPUT:
        raise MaskwrightError(f"expected one input with the name '{_INPUT}'", where="inputs")
    pixels = _read_tensor(
        tensors[0], b"" if header_bytes is None else memoryview(body)[header_bytes:], channels, max_pixels
    )
    return InferenceRequest(
        id=_typed(header["id"], str, "id") if "id" in header else None,
        images=list(pixels) if pixels.ndim == 4 else [pixels],
        is_batch=pixels.ndim == 4,
        options=parse_options(parameters, drawing=False),
        outputs=_read_outputs(header["outputs"], binary) if header.get("outputs") else None,
        binary=binary,
    )


def write_inference(
    results: Sequence[Segmentation], request: InferenceRequest, model: str
) -> tuple[bytes, dict[str, str]]:
    """Return the body and the headers of an answer.

    Args:
        results: one per image of the request.
        request: the request.
        model: its name.

    Raises:
        MaskwrightError: an output does not exist for the task, or the answer is too large.
    """
    available = _OUTPUTS[results[0].task]
    wanted = request.outputs or dict.fromkeys(available, request.binary)
    for name in wanted:
        if name not in available:
            found = f"a {results[0].task} result has no output '{printable(name)}'"
            raise MaskwrightError(found, where="outputs", remedy=f"use {', '.join(available)}")
    _check_answer_size(results, wanted)
    entries, data = [], []
    for name, binary in wanted.items():
        kind = available[name][0]
        values = _output(name, results, request.is_batch).astype(_TYPES[kind], copy=False)
        entry = {"name": name, "datatype": kind, "shape": values.shape}
        if binary:
            data.append(values.tobytes())
            entries.append(entry | {"parameters": {"binary_data_size": values.nbytes}})
        else:
            entries.append(entry | {"data": values.ravel().tolist()})
    header = {"model_name": model, "outputs": entries} | ({} if request.id is None else {"id": request.id})
    text = json.dumps(header).encode()
    if not data:
        return text, {"Content-Type": "application/json"}
    return b"".join([text, *data]), {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(text))}


def _read_header(text: bytes) -> dict[str, Any]:
    if text.count(b"{") > _MAX_OBJECTS or text.count(b"[") > _MAX_LISTS:  # parsed, they need far more memory
        raise MaskwrightError("has too many lists or objects", where="body")
    try:
        return _typed(json.loads(text), dict, "body")
    except (ValueError, RecursionError):
        raise MaskwrightError(
            "is not valid JSON", where="body", remedy=f"set {HEADER_LENGTH} if binary tensors follow it"
        ) from None


def _typed(value: Any, kind: type[Value], where: str) -> Value:
    """Return a JSON value after checking its type.

    Raises:
        MaskwrightError: the type is another.
    """
    if type(value) is not kind:
        raise MaskwrightError(f"expected {_JSON_TYPES[kind]}", where=where)
    return value


def _read_tensor(tensor: dict[str, Any], binary: bytes | memoryview, channels: int, max_pixels: int) -> np.ndarray:
    """Return the input tensor (H, W, C) or (N, H, W, C)."""
    kind = tensor.get("datatype")
    if not isinstance(kind, str) or kind not in _INPUT_TYPE_CODES:
        raise MaskwrightError(f"expected the datatype {', '.join(_INPUT_TYPE_CODES)}", where=_INPUT)
    shape = _read_shape(tensor.get("shape"), channels, max_pixels)
    parameters = _typed(tensor.get("parameters", {}), dict, _INPUT)
    if parameters.keys() - {"binary_data_size"}:
        raise MaskwrightError(f"unknown parameter '{printable(next(iter(parameters)))}'", where=_INPUT)
    if "binary_data_size" in parameters:
        values = _read_binary(binary, kind, _typed(parameters["binary_data_size"], int, "binary_data_size"))
    else:
        values = _read_list(_typed(tensor.get("data"), list, "data"), kind, shape)
    if len(values) != math.prod(shape):
        found = f"{len(values):,} values, but the shape {shape} has {math.prod(shape):,}"
        raise MaskwrightError(found, where=_INPUT)
    return values.reshape(shape)


def _read_shape(value: Any, channels: int, max_pixels: int) -> tuple[int, ...]:
    shape = tuple(_typed(size, int, "shape") for size in _typed(value, list, "shape"))
    if len(shape) not in (3, 4) or shape[-1] != channels or min(shape) < 1:
        expected = f"[height, width, {channels}] or [images, height, width, {channels}]"
        raise MaskwrightError(f"found {printable(list(shape))}, expected {expected}", where="shape")
    if len(shape) == 4 and shape[0] > MAX_IMAGES:
        raise MaskwrightError(f"{shape[0]:,} images, expected at most {MAX_IMAGES}", where="shape")
    if (pixels := shape[-3] * shape[-2]) > max_pixels:
        raise MaskwrightError(f"{pixels:,} pixels, the limit is {max_pixels:,}", where=_INPUT)
    return shape


def _read_binary(binary: bytes | memoryview, kind: str, size: int) -> np.ndarray:
    if size != len(binary):
        found = f"{len(binary):,} bytes follow the JSON, but binary_data_size is {size:,}"
        raise MaskwrightError(found, where=_INPUT)
    if size % np.dtype(_TYPES[kind]).itemsize:
        raise MaskwrightError(f"{size:,} bytes are not a whole number of {kind} values", where=_INPUT)
    return np.frombuffer(binary, _TYPES[kind])


def _read_list(data: list[Any], kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the values of a flat or nested list; `array` refuses everything that is not a number of the type."""
    try:
        for _ in shape[1:]:
            if data and isinstance(data[0], list):
                data = list(itertools.chain.from_iterable(data))
        return np.frombuffer(array.array(_INPUT_TYPE_CODES[kind], data), _TYPES[kind])
    except (TypeError, ValueError, OverflowError):
        raise MaskwrightError(f"has values other than {kind}", where="data") from None


def _read_outputs(value: Any, binary: bool) -> dict[str, bool]:
    """Return the names of the wanted outputs, and whether their data is binary."""
    wanted = {}
    for output in _typed(value, list, "outputs"):
        name = _typed(_typed(output, dict, "outputs").get("name"), str, "outputs")
        parameters = dict(_typed(output.get("parameters", {}), dict, "outputs"))
        wanted[name] = _typed(parameters.pop("binary_data", binary), bool, "binary_data")
        if parameters:
            raise MaskwrightError(f"unknown parameter '{printable(next(iter(parameters)))}'", where=printable(name))
    return wanted


def _check_answer_size(results: Sequence[Segmentation], wanted: dict[str, bool]) -> None:
    pixels = math.prod(results[0].size)
    count = pixels * (sum(map(len, results)) if "masks" in wanted else len(results))
    names = {"masks", "label_map", "segment_map"} & wanted.keys()
    size = sum(count * ((1 if name == "masks" else 4) if wanted[name] else _BYTES_IN_JSON) for name in names)
    if size > _MAX_ANSWER_BYTES:
        remedy = "ask for binary data, or set top_k or score_threshold; /v1/models/NAME/segment answers with RLE"
        raise MaskwrightError("the answer is too large", where="outputs", remedy=remedy)


def _output(name: str, results: Sequence[Segmentation], is_batch: bool) -> np.ndarray:
    if name == "image_index":
        return np.repeat(np.arange(len(results)), [len(result) for result in results])
    if name not in ("label_map", "segment_map"):
        return np.concatenate([getattr(result, name) for result in results])
    maps = [_label_map(result) if name == "label_map" else result.id_map() for result in results]
    return np.stack(maps) if is_batch else maps[0]


def _label_map(result: Segmentation) -> np.ndarray:
    """(H, W) int32 index of the class of each pixel; -1 is none."""
    table = np.arange(len(result.categories) + 1, dtype=np.int32)
    table[-1] = -1
    return result.map_labels(table)
