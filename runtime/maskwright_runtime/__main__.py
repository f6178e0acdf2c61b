"""The command line: `maskwright-runtime predict MODEL IMAGE... --output FOLDER`."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from maskwright.errors import MaskwrightError
from maskwright.inference.exported.predictor import ExportedPredictor
from maskwright.inference.inputs import find_inputs
from maskwright.results.save import unique_names
from maskwright.runtime.termination import exit_when_terminated


def main() -> None:
    """Run a command; an error of the user is printed as one line, with exit status 1."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    arguments = _parser().parse_args()
    try:
        with exit_when_terminated():
            failures = predict(arguments)
    except MaskwrightError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(1 if failures else 0)


def predict(arguments: argparse.Namespace) -> int:
    """Segment images, and write the files of `maskwright predict`; return how many images failed."""
    predictor = ExportedPredictor(arguments.model, device=arguments.device)
    options = {name: getattr(arguments, name) for name in _OPTIONS}
    paths = find_inputs(arguments.images, arguments.output)
    failures = 0
    for path, name in zip(paths, unique_names(paths), strict=True):
        try:
            predictor(path, **options).save(arguments.output, name)
        except MaskwrightError as error:
            failures += 1
            print(f"failed: {error}", file=sys.stderr)
    print(f"{len(paths) - failures} of {len(paths)} images -> {arguments.output}")
    return failures


_OPTIONS = {"task": str, "object_threshold": float, "overlap_threshold": float, "top_k": int, "score_threshold": float}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="maskwright-runtime", description="Segment images with a model that maskwright has exported."
    )
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("predict", help="segment images and write overlays and masks")
    command.add_argument("model", help="exported file: .onnx, or .xml for OpenVINO")
    command.add_argument("images", nargs="+", help="files, folders and globs")
    command.add_argument("--output", type=Path, default=Path("predictions"), help="folder of the results")
    command.add_argument("--device", help="cpu, or cuda with onnxruntime-gpu; default: cpu")
    for name, kind in _OPTIONS.items():
        command.add_argument(f"--{name.replace('_', '-')}", type=kind, help=f"replaces the {name} of the file")
    return parser


if __name__ == "__main__":
    main()
