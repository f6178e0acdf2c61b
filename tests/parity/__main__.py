"""`python -m tests.parity [DIR ...]`: run every fixture below the folders, one line each; exit status 1 on a failure.

Without folders: the fixtures that come with the tests, the shared set where it is present, and small random EoMTs of
the installed transformers (`live`). `--write` also writes
each model for the other implementations, and compares what transformers computes from it. `--table` ends with the
Markdown table of docs/checkpoints.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from maskwright.errors import MaskwrightError
from tests.parity import compare, fixtures, live
from tests.parity.report import table


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.parity")
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--write", action="store_true", help="also write each model for the other implementations")
    parser.add_argument("--table", action="store_true", help="end with a Markdown table")
    chosen = parser.parse_args(arguments)
    folders = chosen.folders or [p for p in (fixtures.BUNDLED, fixtures.SHARED) if p.is_dir()]
    for folder in folders:
        if not folder.is_dir():
            print(f"no folder {folder}", file=sys.stderr)
            return 2
    passed = failed = unsupported = 0
    rows = []
    for fixture in fixtures.find(folders):
        kind = fixture.kind
        if kind.startswith("unsupported"):
            unsupported += 1
            print(f"not supported  {fixture.name}: {kind.removeprefix('unsupported: ')}", flush=True)
            continue
        try:
            report = compare.run(fixture, chosen.write)
        except (MaskwrightError, KeyError) as error:
            report = compare.Report(failures=[str(error)])
        passed, failed = passed + (not report.failures), failed + bool(report.failures)
        print(f"{'FAILED' if report.failures else 'passed'}  {fixture.name}: {'; '.join(report.figures)}", flush=True)
        for failure in report.failures:
            print(f"        {failure}", flush=True)
        if "class logits" in report.differences:
            rows.append((fixture.layout, fixture.path.stem, report))
    for name, case in {} if chosen.folders else live.CASES.items():
        report = case()
        passed, failed = passed + (not report.failures), failed + bool(report.failures)
        print(f"{'FAILED' if report.failures else 'passed'}  live/{name}: {'; '.join(report.figures)}", flush=True)
    if chosen.table:
        print(f"\n{table(rows)}\n")
    print(f"{passed} passed, {failed} failed, {unsupported} not supported")
    return 1 if failed or not (passed or unsupported) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
