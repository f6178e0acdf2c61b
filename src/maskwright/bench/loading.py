"""`maskwright bench loading`: seconds from a weight file to a model ready to predict, in turns with transformers.

Processor time, because the files are in the disk's cache on both sides. Each side loads the file of its own format,
with the same weights.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from maskwright.bench.prediction import Backbone, their_model
from maskwright.checkpoint import load_model, read_checkpoint, save_checkpoint
from maskwright.errors import MaskwrightError


@dataclass
class LoadingComparison:
    """Processor seconds per load, the median of all rounds.

    Attributes:
        backbone: of both models.
        megabytes: of our file, in 10^6 bytes.
        maskwright: our side.
        transformers: theirs.
    """

    backbone: str
    megabytes: float
    maskwright: float
    transformers: float

    def table(self) -> str:
        """For people."""
        return (
            f"{self.backbone}, {self.megabytes:.0f} MB: maskwright {self.maskwright:.2f} s, "
            f"transformers {self.transformers:.2f} s, ratio {self.transformers / self.maskwright:.1f}"
        )


def bench_loading(*, rounds: int = 5, backbone: Backbone = "r50", seed: int = 0) -> LoadingComparison:
    """Load both files in turns, once before the rounds that count.

    Raises:
        MaskwrightError: transformers is not installed, or rounds is below 1.
    """
    if rounds < 1:
        raise MaskwrightError(f"bench: rounds {rounds} must be at least 1")
    torch.manual_seed(seed)
    theirs = their_model(backbone)
    with tempfile.TemporaryDirectory() as folder:
        ours = Path(folder) / "model.safetensors"
        theirs.save_pretrained(Path(folder) / "theirs")
        save_checkpoint(ours, read_checkpoint(Path(folder) / "theirs"))
        sides = (lambda: load_model(ours), lambda: type(theirs).from_pretrained(Path(folder) / "theirs"))
        seconds = [[_processor_seconds(side) for side in sides] for _ in range(rounds + 1)][1:]
        size = ours.stat().st_size / 1e6
    return LoadingComparison(backbone, size, *(statistics.median(column) for column in zip(*seconds, strict=True)))


def _processor_seconds(load: Callable[[], object]) -> float:
    start = time.process_time()
    load()
    return time.process_time() - start
