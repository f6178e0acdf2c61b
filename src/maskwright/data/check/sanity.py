"""Warnings that follow from the statistics of a dataset."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from maskwright.data.check.statistics import SplitStatistics
from maskwright.data.problems import Problem
from maskwright.structures.annotations import Category

_NAMED_CLASSES = 8


def check_statistics(
    splits: Mapping[str, SplitStatistics], categories: Sequence[Category], num_queries: int | None
) -> Iterator[Problem]:
    """Warn about whole splits.

    Args:
        splits: statistics by split name, of all images or a fair sample.
        categories: the classes of all splits.
        num_queries: queries of the model, which cannot find more objects in an image; None if there is no model.
    """
    for name, split in splits.items():
        if split.objects_per_image and not split.objects and not split.crowds:  # crowds only are reported elsewhere
            yield Problem(
                "warning",
                f"data.{name}",
                (),
                f"none of {len(split.objects_per_image)} images has an object",
                "annotate them; training on them would teach nothing",
            )
        crowded = sum(count > num_queries for count in split.objects_per_image) if num_queries else 0
        if crowded:
            yield Problem(
                "warning",
                f"data.{name}",
                (),
                f"{crowded} of {len(split.objects_per_image)} images have more objects than the model has queries "
                f"({num_queries}), the maximum is {max(split.objects_per_image)}",
                "raise model.num_queries, or train on crops with fewer objects",
            )
    train = splits.get("train")
    if train is not None and train.objects and train.read == train.images:
        yield from _missing_classes(train, splits, categories)


def _missing_classes(
    train: SplitStatistics, splits: Mapping[str, SplitStatistics], categories: Sequence[Category]
) -> Iterator[Problem]:
    missing = [label for label, count in enumerate(train.classes) if not count.images]
    if not missing:
        return
    names = [categories[label].name for label in missing]
    listed = ", ".join(names[:_NAMED_CLASSES]) + (", ..." if len(names) > _NAMED_CLASSES else "")
    found = f"{len(missing)} of {len(categories)} classes never occur ({listed})"
    elsewhere = [
        categories[label].name
        for label in missing
        if any(split.classes[label].images for name, split in splits.items() if name != "train")
    ]
    if elsewhere:
        found += f", though {len(elsewhere)} of them do in other splits ({', '.join(elsewhere[:_NAMED_CLASSES])})"
    remedy = "nothing can be learned about them; annotate or remove them"
    yield Problem("warning", "data.train", tuple(names), found, remedy)
