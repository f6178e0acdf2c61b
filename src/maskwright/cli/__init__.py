"""The command line: parse, call one function, print. Nothing heavy is imported before a command is chosen.

The commands are in `training`, `data`, `models`, `predict`, `serve`, `export` and `machine`.
"""

from __future__ import annotations

import io
import logging
import os
import sys

from cyclopts import App, Parameter

from maskwright import __version__
from maskwright.cli.data import convert_data
from maskwright.cli.export import export
from maskwright.cli.machine import doctor
from maskwright.cli.models import convert, evaluate, zoo
from maskwright.cli.serve import serve
from maskwright.cli.terminal import is_main_process
from maskwright.cli.training import check, compare, plot, recipes, train
from maskwright.errors import MaskwrightError, RunInterrupted
from maskwright.runtime.termination import exit_when_terminated

app = App(
    name="maskwright",
    help="Universal image segmentation with Mask2Former: train, evaluate, predict, convert and export, on any device.",
    version=__version__,
    version_flags=["--version"],
    help_format="plaintext",  # rendering Markdown takes a third of the time of --help
    suppress_keyboard_interrupt=False,  # handled by `main`
    default_parameter=Parameter(negative=()),  # no --no-OPTION and --empty-OPTION
)
for _command in (train, evaluate, check, convert_data, convert, export, compare, plot, doctor, recipes, zoo, serve):
    app.command(_command)
_OPTIONS = "The options from --task on replace the values of the checkpoint."
app.command(  # imported only if it is called: its options are made from the schema of recipes, which imports pydantic
    "maskwright.cli.predict:predict",
    name="predict",
    help="Segment images and write overlays and masks, or a benchmark's submission files.\n\n"
    f"Images that cannot be read are listed at the end, and the exit status is then 1. {_OPTIONS}",
)
app.command(
    "maskwright.cli.predict:rank",
    name="rank",
    help="List the images to label next: those the model is least sure of, chosen to differ from each other.\n\n"
    "Writes rank.csv and a contact sheet, rank.png. Images that cannot be read are listed at the end, and the exit "
    f"status is then 1. {_OPTIONS}",
)


def main() -> None:
    """Run a command; a MaskwrightError is printed as one line, with exit status 1."""
    print_any_text()
    configure_logging()
    try:
        with exit_when_terminated():
            app()
    except RunInterrupted as error:
        print(error, file=sys.stderr)
        sys.exit(75)  # EX_TEMPFAIL of sysexits.h: try again
    except MaskwrightError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # e.g. `| head`; without this, Python prints a traceback when it flushes stdout at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def print_any_text() -> None:
    """Escape characters that the encoding of the console lacks, such as cp1252 on Windows, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def configure_logging() -> None:
    """Log progress in the main process, and errors only in the others."""
    level = logging.INFO if is_main_process() else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    for noisy in ("timm", "matplotlib", "PIL", "torch", "accelerate"):
        logging.getLogger(noisy).setLevel(max(level, logging.WARNING))
    logging.getLogger("tifffile").setLevel(logging.ERROR)  # it warns about tags that do not matter here
