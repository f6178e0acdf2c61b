"""What the numbers of a data set say against training with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from maskwright.data.check.statistics import SplitStatistics
from maskwright.data.problems import Problem
from maskwright.structures.annotations import Category


def judge(
    splits: Mapping[str, SplitStatistics], categories: Sequence[Category], queries: int | None
) -> Iterator[Problem]:
    """Warnings about whole splits.

    Args:
        splits: by name; all images of each have been read, or a fair sample.
        categories: of all splits.
        queries: of the model, where one is known: it cannot find more objects in an image.
    """
    for name, split in splits.items():
        if split.objects_per_image and not split.objects:
            found = f"data.{name}: none of {len(split.objects_per_image)} images has an object"
            yield Problem("warning", "", (), found, "annotate them; training on them would teach nothing")
        yield from _too_many(name, split, queries)
    train = splits.get("train")
    if train is not None and train.objects and train.read == train.images:
        yield from _missing_classes(train, splits, categories)


def _too_many(name: str, split: SplitStatistics, queries: int | None) -> Iterator[Problem]:
    crowded = sum(number > queries for number in split.objects_per_image) if queries else 0
    if crowded:
        found = (
            f"data.{name}: {crowded} of {len(split.objects_per_image)} images have more objects than the model has "
            f"queries ({queries}), the fullest has {max(split.objects_per_image)}"
        )
        yield Problem("warning", "", (), found, "raise model.num_queries, or train on crops with fewer objects")


def _missing_classes(
    train: SplitStatistics, splits: Mapping[str, SplitStatistics], categories: Sequence[Category]
) -> Iterator[Problem]:
    absent = [label for label, count in enumerate(train.classes) if not count.images]
    if not absent:
        return
    names = [categories[label].name for label in absent]
    listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    found = f"data.train: {len(absent)} of {len(categories)} classes never occur ({listed})"
    elsewhere = [
        categories[label].name
        for label in absent
        if any(split.classes[label].images for name, split in splits.items() if name != "train")
    ]
    if elsewhere:
        found += f", though {len(elsewhere)} of them do in other splits ({', '.join(elsewhere[:8])})"
    yield Problem("warning", "", tuple(names), found, "nothing can be learned about them; annotate or remove them")
