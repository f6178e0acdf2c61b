"""The metadata in an exported file: everything needed to use it. `docs/export.md` describes the JSON for users."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from maskwright.errors import MaskwrightError, printable
from maskwright.structures.category import Category, Task

KEY = "maskwright"  # of the metadata in ONNX files; also of the runtime information in OpenVINO files
FORMAT = "maskwright-export-1"
INPUT = "images"
OUTPUTS = "output_names"  # constant in ExecuTorch's files, whose outputs have no names; separated by spaces
NO_CHECKSUM = "crc32:00000000"  # placeholder while the checksum is computed

Contents = Literal["raw", "masks", "result"]


@dataclass(frozen=True)
class Sizing:
    """The keys of a recipe's `evaluate` section that decide the size of an image, see `network_size`."""

    size: tuple[int, int] | None
    short_side: int | None
    max_side: int | None
    size_divisor: int | None


@dataclass(frozen=True)
class ExportMetadata:
    """Description of an exported file, and of how to use it.

    Attributes:
        contents: what the outputs are: "raw", "masks" or "result".
        task: "semantic", "instance" or "panoptic": of the result, or the usual one for other contents.
        tasks: tasks that the outputs can be used for; only `task` for a result.
        size: (height, width) of the input in pixels.
        channels: of the input; RGB, unless `model` has a value for channels.
        pixel_mean: per channel, 0..255; also the value of the padding at the right and bottom of an image.
        pixel_std: per channel. Mean and deviation are applied inside the file.
        categories: the classes in label order.
        evaluate: the recipe's `evaluate` section: sizing rule, thresholds, and options of prediction.
        model: the recipe's `model` section.
        precision: "fp32", "fp16" or "int8".
        operators: "plain" or "grid_sample".
        licence: of the weights, if known.
        provenance: of the checkpoint.
        weights_sha256: digest of the checkpoint's weights.
        version: of maskwright that wrote the file.
        quantization: of an int8 file: its data, and its scores before and after, see `export.int8.Quantization`.
        checksum: of the file, see `runtimes`.
    """

    contents: Contents
    task: Task
    tasks: tuple[Task, ...]
    size: tuple[int, int]
    channels: int
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]
    categories: tuple[Category, ...]
    evaluate: dict[str, Any]
    model: dict[str, Any]
    precision: str
    operators: str
    licence: str | None
    provenance: dict[str, Any]
    weights_sha256: str
    version: str
    quantization: dict[str, Any] | None = None
    checksum: str = NO_CHECKSUM
    format: str = field(default=FORMAT)

    @property
    def sizing(self) -> Sizing:
        """The rule by which an image is resized before it is shrunk to fit the file's size."""
        values = {name: self.evaluate.get(name) for name in Sizing.__dataclass_fields__}
        return Sizing(**values | {"size": values["size"] and tuple(values["size"])})  # ty: ignore[invalid-argument-type]

    def to_json(self) -> str:
        """Return the metadata as JSON in ASCII, so that every format stores the same bytes."""
        return json.dumps(asdict(self))


def parse_metadata(text: str) -> ExportMetadata:
    """Parse the JSON of `ExportMetadata.to_json`.

    Raises:
        MaskwrightError: it is of another version, or not such JSON.
    """
    try:
        values = json.loads(text)
        if values["format"] != FORMAT:
            raise MaskwrightError(
                f"has format {printable(values['format'])}, expected {FORMAT}", remedy="export the model again"
            )
        values["categories"] = tuple(
            Category(**entry | {"color": tuple(entry["color"])}) for entry in values["categories"]
        )
        for name in ("tasks", "size", "pixel_mean", "pixel_std"):
            values[name] = tuple(values[name])
        metadata = ExportMetadata(**values)
        _check(metadata)
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise MaskwrightError(
            f"its metadata is damaged: {printable(error)}", remedy="copy it or export the model again"
        ) from None
    return metadata


def _check(metadata: ExportMetadata) -> None:
    if metadata.contents not in get_args(Contents):
        raise ValueError(f"contents {metadata.contents}")
    if not set(metadata.tasks) <= set(get_args(Task)) or metadata.task not in metadata.tasks:
        raise ValueError(f"task {metadata.task} of {metadata.tasks}")
    if len(metadata.size) != 2 or not all(isinstance(side, int) and 0 < side < 2**16 for side in metadata.size):
        raise ValueError(f"size {metadata.size}")
    if not len(metadata.pixel_mean) == len(metadata.pixel_std) == metadata.channels:
        raise ValueError(f"{metadata.channels} channels, {len(metadata.pixel_mean)} means")
    if not isinstance(metadata.evaluate, dict) or not metadata.categories:
        raise ValueError("no evaluate section or no classes")
