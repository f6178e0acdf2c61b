"""What a check found: statistics and problems, as JSON and as tables for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from maskwright.data.check.previews import Example
from maskwright.data.check.statistics import SplitStatistics
from maskwright.data.problems import MAX_PER_KIND, Problem
from maskwright.structures.annotations import Category


@dataclass(frozen=True)
class Sort:
    """Problems that differ only in names and numbers.

    Attributes:
        problems: at least one.
        count: how many there were; more than there are problems, where not all were kept.
    """

    problems: Sequence[Problem]
    count: int

    @property
    def severity(self) -> str:
        """Of all of them."""
        return self.problems[0].severity


@dataclass
class TaskStatistics:
    """What a data set has for one task.

    Attributes:
        task: as recipes call it.
        categories: of all splits.
        splits: by name.
    """

    task: str
    categories: tuple[Category, ...]
    splits: dict[str, SplitStatistics]


@dataclass
class Report:
    """What `check` found.

    Attributes:
        source: what was checked.
        format: as recipes call it.
        task: as recipes call it.
        categories: of all splits; empty where no split could be opened.
        splits: by name.
        problems: all that were kept.
        counts: of all problems, by sort.
        seconds: that reading took.
        workers: processes that read.
        examples: images for the contact sheet.
        wrong: the problems of a picture and its annotations, by the picture's path.
        channels: of the pictures, as `model.channels` has them; None where they are read as RGB.
        others: further tasks that the data set has annotations of its own for.
    """

    source: str
    format: str = ""
    task: str = ""
    categories: tuple[Category, ...] = ()
    splits: dict[str, SplitStatistics] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    seconds: float = 0.0
    workers: int = 1
    examples: list[Example] = field(default_factory=list)
    wrong: dict[str, list[Problem]] = field(default_factory=dict)
    channels: int | None = None
    others: list[TaskStatistics] = field(default_factory=list)

    def add(self, problems: Iterable[Problem], picture: str | None = None) -> None:
        """Keep problems, up to `MAX_PER_KIND` that are alike; where they are no picture's, that of their file."""
        for problem in problems:
            self.counts[problem.kind] += 1
            if self.counts[problem.kind] <= MAX_PER_KIND:
                self.problems.append(problem)
                self.wrong.setdefault(picture or problem.where, []).append(problem)

    @property
    def errors(self) -> int:
        """How many problems are errors."""
        return sum(count for (severity, _), count in self.counts.items() if severity == "error")

    @property
    def warnings(self) -> int:
        """How many problems are warnings."""
        return sum(self.counts.values()) - self.errors

    @property
    def sorts(self) -> list[Sort]:
        """Problems that are alike together: errors first, then the most frequent."""
        groups: dict[tuple[str, str], list[Problem]] = {}
        for problem in self.problems:
            groups.setdefault(problem.kind, []).append(problem)
        sorts = [Sort(problems, self.counts[key]) for key, problems in groups.items()]
        return sorted(sorts, key=lambda sort: (sort.severity, -sort.count))

    @property
    def tasks(self) -> list[TaskStatistics]:
        """All that were looked at."""
        return [TaskStatistics(self.task, self.categories, self.splits), *self.others]

    @property
    def images(self) -> int:
        """That were read; of a split the most that one task has."""
        names = {name: None for part in self.tasks for name in part.splits}
        return sum(max(part.splits[name].read for part in self.tasks if name in part.splits) for name in names)

    def to_json(self) -> dict[str, Any]:
        """Everything, as values that `json.dumps` takes."""
        return {
            "source": self.source,
            "format": self.format,
            "task": self.task,
            "errors": self.errors,
            "warnings": self.warnings,
            "splits": {name: split.to_json(self.categories) for name, split in self.splits.items()},
            "other_tasks": {
                part.task: {name: split.to_json(part.categories) for name, split in part.splits.items()}
                for part in self.others
            },
            "problems": [problem.to_json() for problem in self.problems],
            "images": self.images,
            "seconds": round(self.seconds, 3),
            "workers": self.workers,
        }

    def verdict(self) -> str:
        """One line."""
        speed = f"{self.images} images in {self.seconds:.1f} s ({self.images / max(self.seconds, 1e-9):.0f} per second"
        speed += f", {self.workers} processes)" if self.workers > 1 else ")"
        return f"{_count(self.errors, 'error')}, {_count(self.warnings, 'warning')}; {speed}"

    def recipe_lines(self) -> str:
        """Mean and standard deviation of the training pictures (or those of the first split), as a recipe has them."""
        split = self.splits.get("train") or next(iter(self.splits.values()), None)
        measured = split.pixels_measured if split is not None else None
        if measured is None:
            return ""
        channels = "" if self.channels is None else f"  channels: {self.channels}\n"
        return f"model:\n{channels}  pixel_mean: {list(measured.mean)}\n  pixel_std: {list(measured.std)}"


def split_table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table with one row per split, of each task where there are several."""
    head = ["split", "images", "size", "objects", "per image", "S/M/L", "crowds", "empty"]
    return [*head, "background" if report.task == "instance" else "void"], [
        [
            f"{name}, {part.task}" if report.others else name,
            f"{split.read} of {split.images}" if split.read < split.images else str(split.images),
            _sizes(split),
            str(split.objects),
            _per_image(split.objects_per_image),
            "/".join(map(str, split.areas)),
            str(split.crowds),
            str(len(split.empty)),
            f"{100 * split.void_share:.1f} %",
        ]
        for part in report.tasks
        for name, split in part.splits.items()
    ]


def class_table(part: TaskStatistics) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table with one row per class: in each split its images, objects and percent of the pixels.

    Objects are left out where every image has one of a class at most, as in semantic data sets.
    """
    splits = part.splits
    several = any(count.objects > count.images for split in splits.values() for count in split.classes)
    head = ["id", "class", "kind"]
    for name in splits:
        head += [f"{name} images", *(["objects"] if several else []), "% pixels"]
    rows = []
    for label, category in enumerate(part.categories):
        row = [str(category.id), category.name, "thing" if category.is_thing else "stuff"]
        for split in splits.values():
            count = split.classes[label]
            objects = [str(count.objects)] if several else []
            row += [str(count.images), *objects, f"{100 * count.pixels / max(split.pixels, 1):.2f}"]
        rows.append(row)
    return head, rows


def terminal_tables(report: Report) -> list[tuple[list[str], list[list[str]]]]:
    """The tables for a terminal: splits, and the classes that occur, of each task."""
    tables = [split_table(report)] if report.splits else []
    for part in report.tasks if report.splits else []:
        head, rows = class_table(part)
        splits = part.splits.values()
        occurring = [row for label, row in enumerate(rows) if any(split.classes[label].images for split in splits)]
        head[1] += f", {part.task}" if report.others else ""
        tables.append((head, occurring))
    return tables


def problem_lines(sorts: Iterable[Sort]) -> str:
    """Each sort of problem with its number, its first case, and what to do."""
    lines = []
    for sort in sorts:
        first = sort.problems[0]
        lines.append(f"{sort.severity} {sort.count}x  {first!s}")
        if first.remedy:
            lines.append(f"    what to do: {first.remedy}")
    return "\n".join(lines)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _sizes(split: SplitStatistics) -> str:
    if not split.sizes:
        return "–"
    if len(split.sizes) == 1:
        height, width = next(iter(split.sizes))
        return f"{height}x{width}"
    heights, widths = zip(*split.sizes, strict=True)
    return f"{min(heights)}..{max(heights)} x {min(widths)}..{max(widths)}"


def _per_image(numbers: Sequence[int]) -> str:
    return f"{sum(numbers) / len(numbers):.1f}, max {max(numbers)}" if numbers else "–"
