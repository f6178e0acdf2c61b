"""Checkpoint layouts of other implementations: one table of names each, and what weights tell about their model.

The only place that knows foreign names, in both directions. No configuration is needed: every size that shapes a weight
is read from the weights.
"""

from __future__ import annotations

from maskwright.layouts.architecture import infer_config, published_setting, resnet_shape, swin_shape
from maskwright.layouts.detectron2 import DETECTRON2
from maskwright.layouts.easycv import EASYCV
from maskwright.layouts.layout import Buffer, Change, Layout, State
from maskwright.layouts.openmmlab import OPENMMLAB
from maskwright.layouts.semask import SEMASK, SEMASK_FAPN
from maskwright.layouts.transformers import TRANSFORMERS, TRANSFORMERS_TIMM
from maskwright.layouts.translation import LAYOUTS, Translation, listing, recognise, translate, translate_back

__all__ = [
    "DETECTRON2",
    "EASYCV",
    "LAYOUTS",
    "OPENMMLAB",
    "SEMASK",
    "SEMASK_FAPN",
    "TRANSFORMERS",
    "TRANSFORMERS_TIMM",
    "Buffer",
    "Change",
    "Layout",
    "State",
    "Translation",
    "infer_config",
    "listing",
    "published_setting",
    "recognise",
    "resnet_shape",
    "swin_shape",
    "translate",
    "translate_back",
]
