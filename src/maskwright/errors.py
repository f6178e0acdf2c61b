"""The errors a user can cause and can mend. Each message says what was found, where, and what to do."""

from __future__ import annotations


class MaskwrightError(Exception):
    """Base of all errors that the user can fix; the command line prints it as one line and exits with status 1."""


class RecipeError(MaskwrightError):
    """A recipe or an override has an unknown key, a wrong type, or a value that contradicts another."""


class DatasetError(MaskwrightError):
    """Annotations, label pictures or their folders are missing, broken, or contradict each other."""


class ImageError(MaskwrightError):
    """A picture cannot be read, or is not something a network should be fed."""


class CheckpointError(MaskwrightError):
    """A weight file is broken, unsafe, of an unknown layout, or does not fit the model."""


class TrainingError(MaskwrightError):
    """A run cannot go on, e.g. because a loss is not finite."""


class RunInterrupted(MaskwrightError):
    """A run was asked to leave (SIGTERM), and has saved where it stands; the command line exits with status 75."""


def printable(text: object, most: int = 120) -> str:
    """Text out of a file as part of a message: on one line, without control characters, and not too long."""
    shown = str(text)[: most + 1]
    shown = shown if shown.isprintable() else repr(shown)[1:-1]
    return shown if len(shown) <= most else f"{shown[:most]}..."
