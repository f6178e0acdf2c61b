"""Start-up: time of whole processes for `--help` and for a first prediction from a local file.

The prediction is compared with the shortest program that loads their folder and segments the same image; `--help` has
no counterpart there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from benchmarks import peer
from benchmarks.rows import Options, Part, Row
from benchmarks.timing import WHOLE, alternate, timed
from maskwright.checkpoints.checkpoint import save_checkpoint
from maskwright.checkpoints.load import read_checkpoint

SIDE = 256  # pixels of the image; small, because only start-up matters
_PREDICT = """
import sys, torch
from PIL import Image
from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor
processor = Mask2FormerImageProcessor(size={"shortest_edge": %d, "longest_edge": 1333})
model = Mask2FormerForUniversalSegmentation.from_pretrained(sys.argv[1]).eval()
picture = Image.open(sys.argv[2])
with torch.no_grad():
    output = model(**processor(images=picture, return_tensors="pt"))
sizes = [picture.size[::-1]]
processor.post_process_panoptic_segmentation(output, label_ids_to_fuse=set(), target_sizes=sizes)
"""


def bench_startup(options: Options) -> Part:
    """Time whole processes of both sides.

    Raises:
        MaskwrightError: transformers is not installed.
    """
    name, python, rows = peer.peer_name(), sys.executable, []
    with peer.saved_model(options.backbone, options.seed) as folder, TemporaryDirectory() as own:
        ours, picture = Path(own) / "model.safetensors", Path(own) / "picture.png"
        checkpoint = read_checkpoint(folder)
        small = checkpoint.evaluate.model_copy(update={"short_side": SIDE, "max_side": None})
        save_checkpoint(ours, replace(checkpoint, evaluate=small))
        Image.fromarray(peer.smooth_image(options.seed)[:SIDE, :SIDE]).save(picture)
        predict = ["predict", str(ours), str(picture), "--output", own]
        commands = {
            "maskwright --help": (["-m", "maskwright", "--help"],),
            "first prediction": (["-m", "maskwright", *predict], ["-c", _PREDICT % SIDE, str(folder), str(picture)]),
        }
        setting = f"{options.backbone}, fp32, an image of {SIDE}x{SIDE}, 1 process, {options.threads} threads"
        for piece, sides in commands.items():
            calls = [timed(lambda side=side: _run([python, *side], options.threads)) for side in sides]
            ours, *theirs = (timing[WHOLE] for timing in alternate(calls, options.rounds or 5))
            rows.append(Row("start-up", piece, setting, name, ours, theirs[0] if theirs else None))
    return Part(rows)


def _run(command: list[str], threads: int) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
