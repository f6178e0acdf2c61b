"""Open exported files: ONNX in ONNX Runtime or OpenVINO, whichever is installed, and the formats of OpenVINO and
ExecuTorch.
"""

from __future__ import annotations

import functools
import logging
import mmap
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from maskwright.errors import MaskwrightError, one_line, printable
from maskwright.inference.exported.metadata import INPUT, KEY, NO_CHECKSUM, OUTPUTS, ExportMetadata, parse_metadata

if TYPE_CHECKING:
    import openvino

Outputs = dict[str, np.ndarray]

PT2 = ".pt2"

_MARK = b"crc32:"
_BLOCK = 2**24  # bytes


@dataclass
class ExportedFile:
    """An exported file, ready to run.

    Attributes:
        path: the file.
        runtime: name of the library that runs it.
        metadata: see the class.
        run: maps images (B, C, H, W) float32, 0..255, of the file's size to the outputs by name, each with B first.
    """

    path: Path
    runtime: str
    metadata: ExportMetadata
    run: Callable[[np.ndarray], Outputs]


def is_exported(source: object) -> bool:
    """Return whether a path has the suffix of an exported file."""
    return Path(str(source)).suffix.lower() in (*_OPENERS, PT2)


def open_exported(path: str | Path, device: str | None = None) -> ExportedFile:
    """Open an exported file with the first of its runtimes that is installed.

    Args:
        path: `.onnx`, `.xml` with its `.bin` beside it (OpenVINO), or `.pte` (ExecuTorch, which needs PyTorch here).
        device: "cpu", or "cuda" with onnxruntime-gpu; None is the CPU.

    Raises:
        MaskwrightError: there is no such file, it is damaged or was not written by maskwright, or no runtime for it is
            installed.
    """
    path = Path(path)
    if not path.is_file():
        raise MaskwrightError("no such file", where=path)
    if path.suffix.lower() == PT2:
        raise MaskwrightError(
            "PyTorch may run code that is in such a file when it loads it, so maskwright does not",
            where=path,
            remedy="use the checkpoint, or export to .onnx",
        )
    if path.suffix.lower() not in _OPENERS:
        raise MaskwrightError(
            "its suffix names no exported file", where=path, remedy=f"expected one of {', '.join(_OPENERS)}"
        )
    runtimes = _OPENERS[path.suffix.lower()]
    usable = [name for name in runtimes if find_spec(name) is not None]
    if not usable:
        raise MaskwrightError(
            f"needs {' or '.join(runtimes)}, which is not installed",
            where=path,
            remedy=f"pip install {next(iter(runtimes))}",
        )
    check_sums(path)
    try:
        metadata, run = runtimes[usable[0]](path, device or "cpu")
    except MaskwrightError as error:
        raise error.located_in(path) from None
    return ExportedFile(path, usable[0], metadata, run)


def _open_onnxruntime(path: Path, device: str) -> tuple[ExportMetadata, Callable[[np.ndarray], Outputs]]:
    import onnxruntime

    provider = f"{device.partition(':')[0].upper()}ExecutionProvider"  # CPU, CUDA
    if provider not in onnxruntime.get_available_providers():
        raise MaskwrightError(f"the installed onnxruntime cannot use device '{device}'", remedy="use --device cpu")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:  # its exceptions have no common base
        raise _damaged(error) from None
    metadata = _parse(session.get_modelmeta().custom_metadata_map.get(KEY))
    names = [output.name for output in session.get_outputs()]

    def run(images: np.ndarray) -> Outputs:
        outputs = (np.asarray(output) for output in session.run(names, {INPUT: images}))
        return dict(zip(names, outputs, strict=True))

    return metadata, run


@functools.cache
def openvino_core() -> openvino.Core:
    """Return the only OpenVINO core of this process; it is never released.

    Each core sets an alternate stack for signal handlers and, when it is released, puts back the one that it found. Of
    two cores the first may be gone by then, and the next signal, such as that of a child that ends, kills the process.
    """
    import openvino

    return openvino.Core()


def _open_openvino(path: Path, device: str) -> tuple[ExportMetadata, Callable[[np.ndarray], Outputs]]:
    core = openvino_core()
    if device.partition(":")[0].upper() not in core.available_devices:
        raise MaskwrightError(
            f"OpenVINO has no device '{device}' here", remedy=f"available: {', '.join(core.available_devices).lower()}"
        )
    try:
        model = core.read_model(path)
    except RuntimeError as error:
        raise _damaged(error) from None
    places = ([KEY], ["framework", KEY])  # the second of an ONNX file
    metadata = _parse(next((model.get_rt_info(at).astype(str) for at in places if model.has_rt_info(at)), None))
    compiled = core.compile_model(model, device.upper(), {"INFERENCE_PRECISION_HINT": "f32"} if device == "cpu" else {})

    names = [output.get_any_name() for output in model.outputs]  # those of `compiled` may have others as well

    def run(images: np.ndarray) -> Outputs:
        outputs = compiled({INPUT: images})
        return {name: np.array(outputs[place]) for place, name in enumerate(names)}

    return metadata, run


def _open_executorch(path: Path, device: str) -> tuple[ExportMetadata, Callable[[np.ndarray], Outputs]]:
    if device != "cpu":
        raise MaskwrightError(f"its operators are for CPUs, not for device '{device}'", remedy="use --device cpu")
    if find_spec("torch") is None:
        raise MaskwrightError("ExecuTorch for Python needs PyTorch", remedy="pip install torch, or export to .onnx")
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # about torchao, which ExecuTorch imports
    import torch
    from executorch.runtime import Runtime, Verification  # ty: ignore[import-not-found]

    try:
        program = Runtime.get().load_program(path, verification=Verification.InternalConsistency)
        constants = [
            program.load_method(name).execute([])[0] for name in (KEY, OUTPUTS) if name in program.method_names
        ]
        method = program.load_method("forward")
    except RuntimeError as error:
        raise _damaged(error) from None
    metadata = _parse(constants[0] if constants else None)
    names = constants[1].split()

    def run(images: np.ndarray) -> Outputs:
        try:
            found = [method.execute([torch.from_numpy(image)[None]]) for image in images]
        except RuntimeError as error:
            raise MaskwrightError(f"ExecuTorch cannot run it: {printable(one_line(error), 160)}", where=path) from None
        batches = (torch.cat(parts).numpy() for parts in zip(*found, strict=True))
        return dict(zip(names, batches, strict=True))

    return metadata, run


Opener = Callable[[Path, str], tuple[ExportMetadata, Callable[[np.ndarray], Outputs]]]

_OPENERS: dict[str, dict[str, Opener]] = {
    ".onnx": {"onnxruntime": _open_onnxruntime, "openvino": _open_openvino},
    ".xml": {"openvino": _open_openvino},
    ".pte": {"executorch": _open_executorch},
}


def _parse(text: str | None) -> ExportMetadata:
    if text is None:
        raise MaskwrightError(
            "was not exported by maskwright: it has no metadata named 'maskwright'",
            remedy="export a checkpoint with `maskwright export`",
        )
    return parse_metadata(text)


def _damaged(error: Exception) -> MaskwrightError:
    return MaskwrightError(
        f"cannot be read, it is damaged or of another format: {printable(one_line(error), 160)}",
        remedy="copy it or export the model again",
    )


def check_sums(path: Path) -> None:
    """Compare a file with the checksum in its metadata; a file without one passes.

    Raises:
        MaskwrightError: the file was changed or is incomplete.
    """
    found = _read_checksum(path)
    if found is None:
        return
    offset, stored = found
    if stored != _MARK + b"00000000" and stored != _compute(path, offset):
        raise MaskwrightError(
            "damaged: its content has changed since it was written",
            where=path,
            remedy="copy it or export the model again",
        )


def write_checksum(path: Path) -> None:
    """Replace the placeholder `NO_CHECKSUM` in the metadata of a file by the checksum of the file."""
    found = _read_checksum(path)
    assert found is not None
    with path.open("r+b") as file:
        file.seek(found[0])
        file.write(_compute(path, found[0]))


def _read_checksum(path: Path) -> tuple[int, bytes] | None:
    """Return offset and value of the last checksum in a file; None if there is none."""
    with path.open("rb") as file, suppress(ValueError), mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        offset = content.rfind(_MARK)
        return (offset, content[offset : offset + len(NO_CHECKSUM)]) if offset >= 0 else None
    return None  # an empty file


def _compute(path: Path, offset: int) -> bytes:
    """Return the checksum of a file, and of the `.bin` beside an `.xml`, as if it held the placeholder."""
    with path.open("rb") as file:
        crc = _crc(file.read(offset), 0)
        crc = _crc(NO_CHECKSUM.encode(), crc)
        file.seek(len(NO_CHECKSUM), 1)
        while block := file.read(_BLOCK):
            crc = _crc(block, crc)
    weights = path.with_suffix(".bin")
    if path.suffix.lower() == ".xml" and weights.is_file():
        with weights.open("rb") as file:
            while block := file.read(_BLOCK):
                crc = _crc(block, crc)
    return _MARK + f"{crc:08x}".encode()


def _crc(data: bytes, start: int) -> int:
    return zlib.crc32(data, start)
