"""`python -m tests.parity.bundle`: make `data/`, the small copies of fixtures that come with the tests.

Each copy holds the arrays named here and lists those it leaves out in its json, so that a comparison is skipped only
where the copy says so. The criterion is copied whole.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np

from tests.parity.fixtures import BUNDLED, SHARED, Fixture

_IMAGES = (
    "coco_panoptic_r50",
    "coco_panoptic_swin_tiny",
    "ade20k_semantic_r50",
    "batch2_cityscapes_semantic_r50",
)
_SEMASK = ("fpn_swin_t_cityscapes",)
_KEPT = re.compile(
    r"image(_\d)?|label|.*_probe|pred|pred_input|pred_logits|pred_masks_sub4|aux_pred_logits|stage0_pred_logits|mask_features_sub8|attn_mask_\d+"
    r"|semantic(_\d)?|panoptic|instance_(scores|classes|query|masks)"
)


def reduce(source: Path, destination: Path) -> None:
    """Write the small copy of one fixture, given the paths of both json files."""
    fixture = Fixture(source)
    kept = {name: array for name, array in fixture.arrays.items() if _KEPT.fullmatch(name)}
    facts = fixture.facts | {"left_out": sorted(fixture.arrays.keys() - kept.keys())}
    destination.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(destination.with_suffix(".npz"), **kept)
    destination.write_text(json.dumps(facts, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for name in _IMAGES:
        reduce(SHARED / "detectron2" / f"{name}.json", BUNDLED / "detectron2" / f"{name}.json")
    for name in _SEMASK:
        reduce(SHARED / "semask" / f"{name}.json", BUNDLED / "semask" / f"{name}.json")
    for suffix in ("json", "npz"):
        shutil.copyfile(SHARED / f"criterion.{suffix}", BUNDLED / f"criterion.{suffix}")
