"""Commands for models: evaluate, convert, and the list of published models."""

from __future__ import annotations

import json
import logging
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from maskwright.cli.ray_options import EngineOptions
from maskwright.cli.terminal import OUTPUT, ProgressBar
from maskwright.errors import MaskwrightError

logger = logging.getLogger(__name__)

Task = Literal["semantic", "instance", "panoptic"]
Precision = Literal["fp32", "bf16", "fp16"]
Layout = Literal["maskwright", "transformers", "detectron2", "mmdetection", "mmsegmentation", "eomt"]
Benchmark = Literal["coco", "cityscapes", "ade20k"]


def evaluate(
    checkpoint: Path,
    recipe: str,
    *overrides: str,
    split: Literal["train", "val", "test"] = "val",
    task: Task | None = None,
    submission: Benchmark | None = None,
    output: Annotated[Path, OUTPUT] = Path("submission"),
    device: str | None = None,
    precision: Precision = "fp32",
    json_: Annotated[bool, Parameter(name="--json")] = False,
    engine: Annotated[EngineOptions | None, Parameter(name="*")] = None,
) -> None:
    """Evaluate a checkpoint on a split of a recipe's data, by the rules of COCO, Cityscapes or mmseg.

    The scores are those of the recipe's evaluate.metrics. Before they are printed, they are appended to
    evaluations.jsonl next to the checkpoint, or in the current folder for a published model.

    Parameters
    ----------
    checkpoint
        Checkpoint, weight file of another implementation, exported file, or name of a published model (see
        `maskwright zoo`).
    recipe
        Name of a recipe (see `maskwright recipes`) or YAML file; its data and evaluate sections are used.
    overrides
        Recipe values to change, as section.key=value.
    split
        Split to evaluate.
    task
        Kind of results; default: the recipe's evaluate.task. Panoptic includes the metrics of the other tasks.
    submission
        Also write the results in the submission format of this benchmark.
    output
        Folder of the submission files.
    device
        cpu, cuda, mps, ...; default: the accelerator of this machine.
    precision
        Mixed-precision type of the network.
    json_
        Print JSON instead of tables.
    engine
        Where to run.
    """
    from maskwright.config.recipe import load_recipe
    from maskwright.evaluation.evaluate import evaluate as run
    from maskwright.inference.exported_model import open_model
    from maskwright.results.submission import open_submission

    task_override = [f"evaluate.task={task}"] if task else []
    loaded = load_recipe(recipe, [*overrides, *task_override])
    if engine and (ray_options := engine.ray()):
        from maskwright.cluster.ray_evaluate import evaluate_on_ray

        if submission:
            raise MaskwrightError("--submission is for the local engine", remedy="leave out --engine ray")
        with ProgressBar("evaluating") as advance:
            evaluation = evaluate_on_ray(
                checkpoint, loaded, split, ray_options, device=device, precision=precision, on_image=advance
            )
    else:
        model = open_model(checkpoint, device)
        files = open_submission(submission, loaded.evaluate.task, output) if submission else None
        with ProgressBar("evaluating") as advance, files or nullcontext():
            on_result = files.add if files else None
            evaluation = run(model, loaded, split, precision=precision, on_image=advance, on_result=on_result)
    scores = evaluation.scores
    if evaluation.hint:
        logger.warning("%s", evaluation.hint)
    _record(scores, checkpoint, loaded.name, split, loaded.evaluate.task)
    if json_:
        print(json.dumps(scores))
    else:
        _print_scores(scores)


def convert(
    source: Path,
    destination: Path,
    *,
    to: Layout = "maskwright",
    categories: str | None = None,
    dtype: Literal["float32", "float16", "bfloat16"] | None = None,
    base: str | None = None,
    overwrite: bool = False,
) -> None:
    """Convert a checkpoint between maskwright and other implementations.

    The layout and architecture of the source are detected from its weights.

    Parameters
    ----------
    source
        Weight file, transformers folder, Hub id, or name of a published model (see `maskwright zoo`).
    destination
        Output: .safetensors (maskwright), new folder (transformers), .pkl or .pth (detectron2), .pth (OpenMMLab),
        .bin or .pth (eomt).
    to
        Layout to write.
    categories
        Built-in class list or YAML file; default: the checkpoint's, else the matching published model's, else numbers.
    dtype
        Type of the weights in the file, default: that of the source. Half precision halves the file; models compute in
        float32 all the same.
    base
        Weights of the backbone, if the source only has deltas from them, as EoMT's published models with DINOv3.
    overwrite
        Replace the destination if it is an existing file.
    """
    from maskwright.checkpoints.convert import convert as run

    checkpoint = run(source, destination, to=to, categories=categories, dtype=dtype, overwrite=overwrite, base=base)
    by_reason: dict[str, list[str]] = {}
    for key, reason in checkpoint.dropped:
        by_reason.setdefault(reason, []).append(key)
    for reason, keys in by_reason.items():
        print(f"dropped {keys[0]}{f' and {len(keys) - 1} more' if len(keys) > 1 else ''}: {reason}")
    model = checkpoint.config
    print(
        f"{checkpoint.provenance.get('layout', 'maskwright')} -> {destination}: {model.backbone}, "
        f"{model.num_queries} queries, "
        f"{len(checkpoint.categories)} classes ({checkpoint.categories[0].name}, ...), {checkpoint.evaluate.task}"
    )


def zoo(name: str | None = None, *, markdown: bool = False) -> None:
    """List the published models and the backbone weights in packages, or describe one model: scores, license, download.

    Parameters
    ----------
    name
        Model to describe; every command that takes a checkpoint also takes such a name.
    markdown
        Print the content of docs/zoo.md.
    """
    from maskwright.checkpoints import zoo as models
    from maskwright.checkpoints.packaged import packaged_models

    if markdown:
        print(models.markdown())
    elif name in packaged_models():
        print(packaged_models()[name].with_suffix(".md").read_text(encoding="utf-8"))
    elif name:
        print(models.describe(models.get_entry(name)))
    else:
        print(f"in the package: {', '.join(packaged_models())}\n")
        print(models.terminal_table(models.published_models().values()))
        print(f"\n{models.backbone_table()}")


def _record(scores: dict, checkpoint: Path, recipe: str, split: str, task: str) -> None:
    """Append scores to a file, so that no failure of the output loses them; skip a folder that is not writable."""
    entry = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "checkpoint": str(checkpoint),
        "recipe": recipe,
        "split": split,
        "task": task,
        "scores": scores,
    }
    folders = [checkpoint.parent, Path()] if checkpoint.exists() else [Path()]
    for folder in folders:
        path = folder / "evaluations.jsonl"
        with suppress(OSError), path.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(entry)}\n")
            logger.info("scores are appended to %s", path)
            return


def _print_scores(scores: dict) -> None:
    from rich.console import Console

    from maskwright.evaluation.metrics.tables import format_table, format_tables

    console = Console()
    for table in (*format_tables(scores), format_table(scores)):
        console.print(table)
