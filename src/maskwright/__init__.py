"""maskwright: universal image segmentation with Mask2Former and SeMask, on any device PyTorch runs on."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from maskwright.checkpoints.load import load_model as load_model
    from maskwright.config.recipe import Recipe as Recipe
    from maskwright.config.recipe import load_recipe as load_recipe
    from maskwright.inference.predictor import Predictor as Predictor
    from maskwright.results.segmentation import Segmentation as Segmentation

_HOME = {
    "Predictor": "maskwright.inference.predictor",
    "Segmentation": "maskwright.results.segmentation",
    "Recipe": "maskwright.config.recipe",
    "load_model": "maskwright.checkpoints.load",
    "load_recipe": "maskwright.config.recipe",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'maskwright' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
