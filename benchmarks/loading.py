"""Time from a weight file to a model that is ready to predict, against transformers.

Processor time of one thread is measured, because the files are cached in memory on both sides. Each side loads the same
weights from a file of its own format.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import peer
from benchmarks.rows import Options, Part, compared
from benchmarks.timing import WHOLE, alternate, threads, timed
from maskwright.checkpoints.checkpoint import save_checkpoint
from maskwright.checkpoints.load import load_model, read_checkpoint


def bench_loading(options: Options) -> Part:
    """Load both files in alternating rounds.

    Raises:
        MaskwrightError: transformers is not installed.
    """
    name = peer.peer_name()
    with (
        threads(1),
        peer.saved_model(options.backbone, options.seed) as folder,
        TemporaryDirectory() as own,
    ):
        ours = Path(own) / "model.safetensors"
        save_checkpoint(ours, read_checkpoint(folder))
        calls = (lambda: load_model(ours), lambda: peer.load_theirs(folder))
        timings = alternate([timed(call, time.process_time) for call in calls], options.rounds or 5)
        size = ours.stat().st_size / 1e6
    row = compared(
        "loading",
        WHOLE,
        f"{options.backbone}, fp32, {size:.0f} MB, 1 process, 1 thread",
        name,
        timings,
    )
    return Part([replace(row, clock="processor")])
