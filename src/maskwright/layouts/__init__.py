"""Checkpoint layouts of other implementations: one table of names each, and what weights tell about their model.

The only place that knows foreign names. No configuration is needed: every size that shapes a weight is read from the
weights.
"""

from __future__ import annotations

from maskwright.layouts.architecture import infer_config, published_setting
from maskwright.layouts.detectron2 import DETECTRON2
from maskwright.layouts.easycv import EASYCV
from maskwright.layouts.layout import Change, Layout, State
from maskwright.layouts.openmmlab import OPENMMLAB
from maskwright.layouts.transformers import TRANSFORMERS
from maskwright.layouts.translation import LAYOUTS, Translation, listing, recognise, translate

__all__ = [
    "DETECTRON2",
    "EASYCV",
    "LAYOUTS",
    "OPENMMLAB",
    "TRANSFORMERS",
    "Change",
    "Layout",
    "State",
    "Translation",
    "infer_config",
    "listing",
    "published_setting",
    "recognise",
    "translate",
]
