"""The commands predict and rank. Their options and help are generated from the recipe's `evaluate` section."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, field, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from cyclopts import Parameter, Token

from maskwright.cli.ray_options import EngineOptions
from maskwright.cli.terminal import OUTPUT, ProgressBar
from maskwright.config.old_names import OLD_NAMES
from maskwright.config.schema import EvaluateConfig
from maskwright.errors import MaskwrightError

NOT_FOR_PREDICTION = ("metrics", "max_images")
MAX_LISTED = 20  # failures that are printed one by one, if a file lists them too


def _parse_factors(_type: object, tokens: Sequence[Token]) -> tuple[float, ...]:
    """Parse comma-separated factors, such as 0.5,1,1.5."""
    try:
        return tuple(float(factor) for factor in tokens[0].value.split(","))
    except ValueError:
        raise MaskwrightError(
            f"expected factors separated by commas, like 0.5,1,1.5, found '{tokens[0].value}'", where="--scales"
        ) from None


def _option(key: str) -> Parameter:
    """Return the option for a key: its current and old names, with the schema's description as help.

    What null means in a recipe is left out: an option that is not given keeps the checkpoint's setting.
    """
    description = re.sub(r"[;,] null [^;]*", "", EvaluateConfig.model_fields[key].description or "")
    names = [key, *(old for old, new in OLD_NAMES["evaluate"].items() if new == key)]
    return Parameter(
        name=[f"--{name.replace('_', '-')}" for name in names],
        negative=f"--no-{key}" if key == "flip" else (),
        help=f"{description[:1].upper()}{description[1:]}.",
        converter=_parse_factors if key == "scales" else None,
        n_tokens=1 if key == "scales" else None,
    )


_TYPES = {key: type_ for key, type_ in get_type_hints(EvaluateConfig).items() if key in EvaluateConfig.model_fields}
EvaluateOptions: Any = make_dataclass(
    "EvaluateOptions",
    [
        (key, Annotated[type_ | None, _option(key)], field(default=None))
        for key, type_ in _TYPES.items()
        if key not in NOT_FOR_PREDICTION
    ],
    namespace={"__module__": __name__},  # cyclopts does not look into types of Python's own modules
    kw_only=True,
)


def predict(
    checkpoint: Path,
    *inputs: str,
    output: Annotated[Path, OUTPUT] = Path("predictions"),
    submission: Literal["coco", "cityscapes", "ade20k"] | None = None,
    format: Literal["coco", "cvat", "fiftyone", "label-studio", "label-studio-polygons", "labelme", "parquet", "yolo"]
    | None = None,
    confidence: bool = False,
    device: str | None = None,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    compile: bool = False,
    column: str | None = None,
    engine: Annotated[EngineOptions | None, Parameter(name="*")] = None,
    options: Annotated[EvaluateOptions | None, Parameter(name="*")] = None,
) -> None:
    """Segment images and write overlays and masks, or files for a benchmark or an annotation tool.

    Parameters
    ----------
    checkpoint
        Checkpoint, weight file of another implementation, exported file, or name of a published model (see
        `maskwright zoo`).
    inputs
        Files, folders, globs, archives, and .csv or .parquet lists of images; also at URLs such as s3://.
    output
        Folder of the results.
    submission
        Write the results in the submission format of this benchmark, and no overlays.
    format
        Write files that this tool imports, or Parquet files, and no overlays (see docs/results-for-tools.md).
    confidence
        Also write NAME_confidence.png, 8-bit gray: how sure the model is of each pixel, 255 is certain.
    device
        cpu, cuda, mps, ...; default: the accelerator of this machine.
    precision
        Mixed-precision type of the network.
    compile
        Compile the network with torch.compile, for many images of one size on a GPU: takes minutes per size, seconds if
        it was done before. On a CPU the plain network is faster.
    column
        Column of lists with paths, URLs or images; default: image, path, file, file_name or similar.
    engine
        Where to run.
    options
        Values that replace those of the checkpoint.
    """
    from maskwright.inference.predict_files import predict_files
    from maskwright.inference.predictor import Predictor

    if not inputs:
        raise MaskwrightError("no images to predict", remedy="name files, folders or globs after the checkpoint")
    settings = {"confidence": confidence, "column": column, **(asdict(options) if options else {})}
    machine: dict[str, Any] = {"device": device, "precision": precision, "compile": compile}
    if engine and (ray_options := engine.ray(local_workers=True)):
        if submission is not None or format not in (None, "parquet"):
            chosen = "--submission" if submission else f"--format {format}"
            raise MaskwrightError(f"{chosen} is for the local engine", remedy="leave out --engine ray")
        _predict_on_ray(checkpoint, inputs, output, ray_options, format == "parquet", machine | settings)
        return
    predictor = Predictor(checkpoint, **machine)
    with ProgressBar("predicting") as advance:
        summary = predict_files(
            predictor,
            inputs,
            output,
            submission=submission,
            format=format,
            workers=engine.workers if engine else None,
            on_image=lambda _, total: advance(1, total),
            **settings,
        )
    print(f"{summary.done} of {summary.done + len(summary.failures)} images -> {output}")
    _report_failures(summary.failures)


def _predict_on_ray(checkpoint: Path, inputs, output: Path, ray_options, as_parquet: bool, settings) -> None:
    from maskwright.cluster.ray_predict import predict_on_ray

    with ProgressBar("predicting") as advance:
        summary = predict_on_ray(
            checkpoint, inputs, output, ray_options, as_parquet=as_parquet, on_image=advance, **settings
        )
    total = summary.done + summary.kept + len(summary.failures)
    kept = f", {summary.kept} of them before" if summary.kept else ""
    rate = f"; {summary.done / summary.seconds:.1f} images/s" if summary.seconds else ""
    print(f"{summary.done + summary.kept} of {total} images{kept} -> {output}{rate}")
    if len(summary.failures) > MAX_LISTED:
        print(f"{len(summary.failures)} failed, see {output / 'failures.parquet'}", file=sys.stderr)
        sys.exit(1)
    _report_failures(summary.failures)


def rank(
    checkpoint: Path,
    *inputs: str,
    output: Annotated[Path, OUTPUT] = Path("rank"),
    count: int = 20,
    device: str | None = None,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    options: Annotated[EvaluateOptions | None, Parameter(name="*")] = None,
) -> None:
    """List the images to label next: those the model is least sure of, chosen to differ from each other.

    Parameters
    ----------
    checkpoint
        Checkpoint, weight file of another implementation, or name of a published model (see `maskwright zoo`).
    inputs
        Files, folders and globs.
    output
        Folder of rank.csv and rank.png.
    count
        Number of images to list.
    device
        cpu, cuda, mps, ...; default: the accelerator of this machine.
    precision
        Mixed-precision type of the network.
    options
        Values that replace those of the checkpoint.
    """
    from maskwright.inference.predictor import Predictor
    from maskwright.inference.rank import rank_files

    if not inputs:
        raise MaskwrightError("no images to rank", remedy="name files, folders or globs after the checkpoint")
    if count < 1:
        raise MaskwrightError(f"found {count}, expected at least 1", where="--count")
    predictor = Predictor(checkpoint, device=device, precision=precision)
    with ProgressBar("ranking") as advance:
        ranking = rank_files(
            predictor,
            inputs,
            output,
            count=count,
            on_image=lambda path, total: advance(1, total),
            **(asdict(options) if options else {}),
        )
    if ranking.images:
        print(f"{len(ranking.images)} of {ranking.done} images -> {output / 'rank.csv'}, {output / 'rank.png'}")
    _report_failures(ranking.failures)


def _report_failures(failures: Sequence[tuple[object, str]]) -> None:
    """Print the images that could not be read, and exit with status 1 if there are any."""
    for path, reason in failures:
        print(f"failed: {reason}" if str(path) in reason else f"failed: {path}: {reason}", file=sys.stderr)
    if failures:
        sys.exit(1)
