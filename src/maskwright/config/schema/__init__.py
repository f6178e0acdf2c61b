"""The sections of a recipe and their keys: types, defaults, meaning, and combinations that are refused.

`maskwright recipes --keys` prints all keys; `docs/recipe-keys.md` has the same table.
"""

from maskwright.config.schema.base import Strict
from maskwright.config.schema.data import GENERAL_FORMATS, CategoryConfig, DataConfig, SplitConfig
from maskwright.config.schema.evaluate import EvaluateConfig, MetricName
from maskwright.config.schema.model import ModelConfig
from maskwright.config.schema.train import AugmentConfig, CopyPasteConfig, LoraConfig, ResizingPhase, TrainConfig

__all__ = [
    "GENERAL_FORMATS",
    "AugmentConfig",
    "CategoryConfig",
    "CopyPasteConfig",
    "DataConfig",
    "EvaluateConfig",
    "LoraConfig",
    "MetricName",
    "ModelConfig",
    "ResizingPhase",
    "SplitConfig",
    "Strict",
    "TrainConfig",
]
