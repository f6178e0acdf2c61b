"""Commands for this machine."""

from __future__ import annotations

import json
import sys
from typing import Annotated

from cyclopts import Parameter


def doctor(*, device: str | None = None, json_: Annotated[bool, Parameter(name="--json")] = False) -> None:
    """Report versions, devices and memory of this machine, run a self-test, and suggest fixes.

    The exit status is 1 if something is broken.

    Parameters
    ----------
    device
        cpu, cuda, mps, ...; default: the accelerator of this machine.
    json_
        Print JSON.
    """
    from dataclasses import asdict

    from maskwright.diagnostics.doctor import examine

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
