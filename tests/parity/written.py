"""Writing: each model goes out to every layout. A file must come back with the same weights, and with the names and
shapes that its fixture recorded; a folder for transformers is run by the real library.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch

from maskwright.checkpoints.convert import convert
from maskwright.checkpoints.load import read_checkpoint
from maskwright.checkpoints.readers.weight_file import read_weight_file
from maskwright.errors import CheckpointError
from maskwright.models.segmenter import Segmenter
from maskwright.structures.annotations import pad_images
from maskwright.structures.predictions import ModelOutput
from tests.parity.attention_bits import decided_as_theirs
from tests.parity.fixtures import Fixture
from tests.parity.other_layouts import MARGIN
from tests.parity.report import LOGITS, Report, difference

FILES = {"detectron2": "model.pkl", "mmdetection": "mmdetection.pth", "mmsegmentation": "mmsegmentation.pth"}
# A key by which a fixture is known to have recorded that layout.
MARKS = {
    "detectron2": "sem_seg_head.predictor.query_embed.weight",
    "mmdetection": "panoptic_head.query_embed.weight",
    "mmsegmentation": "decode_head.query_embed.weight",
}
TARGETS = ("detectron2", "transformers", "mmdetection", "mmsegmentation")


def compare(fixture: Fixture, model: Segmenter, source: Path, report: Report) -> None:
    """Write `source`, the fixture's model in our format, for all others."""
    for to in TARGETS:
        destination = source.with_name(FILES.get(to, "folder"))
        try:
            convert(source, destination, to=to)
        except CheckpointError as error:
            report.figures.append(f"to {to}: refused: {error}")
            report.refused.append(to)
            continue
        if to == "transformers":
            _run_transformers(report, fixture, model, destination)
        else:
            _read_back(report, fixture, model, destination, to)


def _read_back(report: Report, fixture: Fixture, model: Segmenter, path: Path, to: str) -> None:
    state, back = model.state_dict(), read_checkpoint(path).state
    counters = {name for name in state.keys() ^ back.keys() if name.endswith("num_batches_tracked")}
    same = state.keys() - counters == back.keys() - counters
    worst = max(difference(back[name].numpy(), state[name].numpy()) for name in state.keys() & back.keys())
    report.most(f"to {to}: weights", worst if same else np.inf, 0.0)
    recorded = fixture.facts["keys"]
    if MARKS[to] in recorded:
        found = {key: list(tensor.shape) for key, tensor in read_weight_file(path).state.items()}
        report.check(f"to {to}: recorded keys", f"{len(found)}/{len(recorded)}", found == recorded)
    path.unlink()


def _run_transformers(report: Report, fixture: Fixture, model: Segmenter, folder: Path) -> None:
    """The logits of the real library beside ours, on the fixture's images."""
    import transformers

    transformers.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it speaks of every backbone that is no Swin
    theirs, loading_info = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(
        folder, output_loading_info=True
    )
    wrong = sorted(key for keys in loading_info.values() for key in keys)
    report.check("to transformers: keys it complains of", str(len(wrong)), not wrong)
    picture = next(fixture.arrays[name] for name in ("image", "image_0") if name in fixture.arrays)
    images, padding = pad_images([torch.from_numpy(picture).permute(2, 0, 1)])
    found = theirs.eval()(pixel_values=model.normalize(images, padding).contiguous())

    def distance(output: ModelOutput) -> float:
        return difference(output.final.class_logits.numpy(), found.class_queries_logits.numpy())

    ours = decided_as_theirs(lambda: model(images, padding), distance, MARGIN, report)
    masks = difference(ours.final.mask_logits().numpy(), found.masks_queries_logits.numpy())
    report.most("to transformers: class logits", distance(ours), LOGITS)
    report.most("to transformers: mask logits", masks, LOGITS)
