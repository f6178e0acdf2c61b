"""Data: from the recipe's `data` section to batches.

Public here, resolved on first use, since predictions need no annotations: `open_dataset`, `train_loader`,
`evaluation_images`; the parts are in `image` (pictures and label pictures), `category_lists`, `formats` (annotations),
`truths` (what scores are measured against), `transforms` (augmentation) and `loader` (order, randomness).
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from maskwright.data.splits import evaluation_images as evaluation_images
    from maskwright.data.splits import open_dataset as open_dataset
    from maskwright.data.splits import train_loader as train_loader

__all__ = ["evaluation_images", "open_dataset", "train_loader"]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module 'maskwright.data' has no attribute '{name}'")
    from maskwright.data import splits

    return getattr(splits, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
