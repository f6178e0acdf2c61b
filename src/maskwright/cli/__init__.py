"""The command line: parse, call one verb, print. No logic, and nothing heavy is imported before a verb is chosen.

The commands are in `training`, `models` and `machine`, by what they are about.
"""

from __future__ import annotations

import logging
import os
import sys

from cyclopts import App

from maskwright import __version__
from maskwright.cli.machine import doctor
from maskwright.cli.models import convert, evaluate, predict, zoo
from maskwright.cli.terminal import speaks
from maskwright.cli.training import check, compare, plot, recipes, train
from maskwright.errors import MaskwrightError, RunInterrupted

app = App(
    name="maskwright",
    help="Universal image segmentation with Mask2Former: train, evaluate, predict and convert, on any device.",
    version=__version__,
    version_flags=["--version"],
    help_format="plaintext",  # markdown would cost a third of the time of --help
    suppress_keyboard_interrupt=False,  # `main` says so in a word
)
for _command in (train, evaluate, check, predict, convert, compare, plot, doctor, recipes, zoo):
    app.command(_command)


def main() -> None:
    """Entry point: a user's mistake is one line and exit status 1."""
    configure_logging()
    try:
        app()
    except RunInterrupted as interruption:
        print(interruption, file=sys.stderr)
        sys.exit(75)  # EX_TEMPFAIL of sysexits.h: try again
    except MaskwrightError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # the reader, e.g. `head`, has seen enough; without this, Python complains when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def configure_logging() -> None:
    """Let the main process say what it does, and the others only what goes wrong."""
    level = logging.INFO if speaks() else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    for noisy in ("timm", "matplotlib", "PIL", "torch", "accelerate"):
        logging.getLogger(noisy).setLevel(max(level, logging.WARNING))
