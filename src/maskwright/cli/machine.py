"""Commands about this machine: what it has, and how fast it is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from maskwright.bench import PartName


def doctor(*, device: str | None = None, json_: Annotated[bool, Parameter(name="--json", negative=())] = False) -> None:
    """Tell what this machine has, whether it computes rightly, and what to do where it does not.

    The exit status is 1 if something is broken.

    Parameters
    ----------
    device
        cpu, cuda, mps, ...; default: the machine's accelerator.
    json_
        Print JSON instead of lines.
    """
    from dataclasses import asdict

    from maskwright.doctor import examine

    findings = []
    for finding in examine(device):
        findings.append(finding)
        if not json_:
            remedy = f"\n{'':8}-> {finding.remedy}" if finding.remedy else ""
            state = "BROKEN" if finding.state == "broken" else finding.state
            print(f"{state:8}{finding.text}{remedy}", flush=True)
    if json_:
        print(json.dumps([asdict(finding) for finding in findings]))
    if any(finding.state == "broken" for finding in findings):
        sys.exit(1)


def bench(
    *parts: PartName,
    rounds: int | None = None,
    threads: int = 2,
    precision: Literal["fp32", "bf16"] = "fp32",
    backbone: Literal["r50", "r50-timm", "swin-t"] = "r50",
    data: Path | None = None,
    output: Path | None = None,
    json_: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> None:
    """Time ours against its peers on the same input, in turns, on the CPU.

    Parameters
    ----------
    parts
        What to time; without, all but `accuracy`, which trains both sides on CamVid for most of an hour.
    rounds
        Timed calls of each side; each part has its own number.
    threads
        Of PyTorch.
    precision
        Number format of both networks.
    backbone
        Of both models.
    data
        Folder of CamVid, for `accuracy`.
    output
        Folder for bench.json, bench.md and bench.png.
    json_
        Print JSON instead of tables.
    """
    from maskwright.bench import suite
    from maskwright.bench.rows import Options, table

    options = Options(rounds=rounds, threads=threads, precision=precision, backbone=backbone, data=data)
    found, blocks = {}, [suite.machine()]
    for name, part in suite.run_benchmarks(parts, options):  # told and kept one by one: all of them take a quarter hour
        found[name] = part
        blocks.append(table([part]))
        values = json.dumps(suite.to_json(found, options))
        if not json_:
            print(f"{blocks[0]}\n" if len(found) == 1 else "", blocks[-1], sep="\n", flush=True)
        if output:
            suite.save(found, "\n\n".join(blocks), values, output)
    if json_:
        print(values)
