"""The result of a check: statistics and problems, as JSON and as tables for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from maskwright.config.schema import DataConfig
from maskwright.data.check.previews import Preview
from maskwright.data.check.statistics import SplitStatistics
from maskwright.data.problems import MAX_PER_KIND, Problem
from maskwright.errors import printable
from maskwright.structures.annotations import Category

_MAX_LINE = 300  # letters

Table = tuple[list[str], list[list[str]]]  # header and rows


@dataclass(frozen=True)
class ProblemGroup:
    """Problems of one kind.

    Attributes:
        problems: those that were kept, at least one.
        count: number of all, including those that were not kept.
    """

    problems: Sequence[Problem]
    count: int

    @property
    def severity(self) -> str:
        """The severity of all of them."""
        return self.problems[0].severity


@dataclass
class TaskStatistics:
    """Statistics of a dataset's annotations for one task.

    Attributes:
        task: name of the task in recipes.
        categories: the classes of all splits.
        splits: statistics by split name.
    """

    task: str
    categories: tuple[Category, ...] = ()
    splits: dict[str, SplitStatistics] = field(default_factory=dict)


@dataclass
class Report:
    """The result of a check.

    Attributes:
        source: the recipe or dataset that was checked.
        format: name of the format in recipes; empty if it was not detected.
        tasks: the tasks that the dataset has its own annotations for; the first uses most of them.
        problems: all problems that were kept.
        counts: number of all problems by kind.
        seconds: duration of reading.
        workers: number of processes that read.
        previews: images for the contact sheet.
        problems_by_image: problems of an image and its annotations, by the image's path.
        channels: channels of the images, as in `model.channels`; None if they are read as RGB.
        configs: the `data` section of each task; one may have failed to open, which is an error then.
        is_detected: whether the format was detected, not stated in a recipe.
        notes: what was guessed to detect the format, or is not used.
    """

    source: str
    format: str = ""
    tasks: list[TaskStatistics] = field(default_factory=lambda: [TaskStatistics("")])
    problems: list[Problem] = field(default_factory=list)
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    seconds: float = 0.0
    workers: int = 1
    previews: list[Preview] = field(default_factory=list)
    problems_by_image: dict[str, list[Problem]] = field(default_factory=dict)
    channels: int | None = None
    configs: list[DataConfig] = field(default_factory=list)
    is_detected: bool = False
    notes: tuple[str, ...] = ()

    def add(self, problems: Iterable[Problem], image: str | None = None) -> None:
        """Add problems of an image, or of the files they name; up to `MAX_PER_KIND` of a kind are kept."""
        for problem in problems:
            self.counts[problem.kind] += 1
            if self.counts[problem.kind] <= MAX_PER_KIND:
                self.problems.append(problem)
                self.problems_by_image.setdefault(image or problem.where, []).append(problem)

    @property
    def splits(self) -> dict[str, SplitStatistics]:
        """Statistics of the first task by split name; empty if no split could be opened."""
        return self.tasks[0].splits

    @property
    def categories(self) -> tuple[Category, ...]:
        """The classes of the first task."""
        return self.tasks[0].categories

    @property
    def errors(self) -> int:
        """Number of errors."""
        return sum(count for (severity, _), count in self.counts.items() if severity == "error")

    @property
    def warnings(self) -> int:
        """Number of warnings."""
        return sum(self.counts.values()) - self.errors

    @property
    def problem_groups(self) -> list[ProblemGroup]:
        """Problems by kind: errors first, then the most frequent."""
        by_kind: dict[tuple[str, str], list[Problem]] = {}
        for problem in self.problems:
            by_kind.setdefault(problem.kind, []).append(problem)
        groups = [ProblemGroup(problems, self.counts[kind]) for kind, problems in by_kind.items()]
        return sorted(groups, key=lambda group: (group.severity, -group.count))

    @property
    def images(self) -> int:
        """Number of images that were read; of each split, the maximum over the tasks."""
        read: Counter[str] = Counter()
        for task in self.tasks:
            for name, split in task.splits.items():
                read[name] = max(read[name], split.read)
        return read.total()

    def to_json(self) -> dict[str, Any]:
        """Return everything as values that `json.dumps` accepts."""
        by_task = {
            task.task: {name: split.to_json(task.categories) for name, split in task.splits.items()}
            for task in self.tasks
        }
        first = self.tasks[0].task
        return {
            "source": self.source,
            "format": self.format,
            "task": first,
            "notes": self.notes,
            "errors": self.errors,
            "warnings": self.warnings,
            "splits": by_task.pop(first),
            "other_tasks": by_task,
            "problems": [problem.to_json() for problem in self.problems],
            "images": self.images,
            "seconds": round(self.seconds, 3),
            "workers": self.workers,
        }

    def summary(self) -> str:
        """Return one line."""
        rate = f"{self.images / max(self.seconds, 1e-9):.0f} per second"
        rate += f", {self.workers} processes" if self.workers > 1 else ""
        problems = f"{_plural(self.errors, 'error')}, {_plural(self.warnings, 'warning')}"
        return f"{problems}; {self.images} images in {self.seconds:.1f} s ({rate})"

    def layout_lines(self) -> str:
        """Return how a dataset whose format was detected is read, and the notes; empty for a recipe."""
        if not self.format or not self.is_detected:
            return ""
        lines = [f"format: {self.format}"]
        for name in ("train", "val", "test"):
            files = getattr(self.configs[0], name)
            stated = files.model_dump(exclude_defaults=True) if files is not None else {}
            if stated:
                lines.append(f"{name}: " + ", ".join(f"{key} {value}" for key, value in stated.items()))
        return "\n".join(printable(line, _MAX_LINE) for line in [*lines, *self.notes])

    def recipe_lines(self) -> str:
        """Return mean and standard deviation of the training images (or of the first split), as in a recipe."""
        split = self.splits.get("train") or next(iter(self.splits.values()), None)
        measured = split.pixel_statistics if split is not None else None
        if measured is None:
            return ""
        channels = "" if self.channels is None else f"  channels: {self.channels}\n"
        return f"model:\n{channels}  pixel_mean: {list(measured.mean)}\n  pixel_std: {list(measured.std)}"


def split_table(report: Report) -> Table:
    """Return a table with one row per split and task."""
    void = "background" if report.tasks[0].task == "instance" else "void"
    header = ["split", "images", "size", "objects", "per image", "S/M/L", "crowds", "empty", void]
    rows = [
        [
            f"{name}, {task.task}" if len(report.tasks) > 1 else name,
            f"{split.read} of {split.images}" if split.read < split.images else str(split.images),
            _sizes(split),
            str(split.objects),
            _per_image(split.objects_per_image),
            "/".join(map(str, split.areas)),
            str(split.crowds),
            str(len(split.empty)),
            f"{100 * split.void_share:.1f} %",
        ]
        for task in report.tasks
        for name, split in task.splits.items()
    ]
    return header, rows


def class_table(task: TaskStatistics) -> Table:
    """Return a table with one row per class: images, objects and percentage of pixels in each split.

    Objects are omitted if every image has at most one of each class, as in semantic datasets.
    """
    splits = task.splits
    has_instances = any(count.objects > count.images for split in splits.values() for count in split.classes)
    header = ["id", "class", "kind"]
    for name in splits:
        header += [f"{name} images", *(["objects"] if has_instances else []), "% pixels"]
    rows = []
    for label, category in enumerate(task.categories):
        row = [str(category.id), category.name, "thing" if category.is_thing else "stuff"]
        for split in splits.values():
            count = split.classes[label]
            objects = [str(count.objects)] if has_instances else []
            row += [str(count.images), *objects, f"{100 * count.pixels / max(split.pixels, 1):.2f}"]
        rows.append(row)
    return header, rows


def terminal_tables(report: Report) -> list[Table]:
    """Return the tables for a terminal: splits, and the classes of each task that occur."""
    if not report.splits:
        return []
    tables = [split_table(report)]
    for task in report.tasks:
        header, rows = class_table(task)
        header[1] += f", {task.task}" if len(report.tasks) > 1 else ""
        splits = task.splits.values()
        tables.append((header, [row for i, row in enumerate(rows) if any(split.classes[i].images for split in splits)]))
    return tables


def problem_lines(groups: Iterable[ProblemGroup]) -> str:
    """Return the count, the first problem and the remedy of each group."""
    lines = []
    for group in groups:
        first = group.problems[0]
        lines.append(f"{group.severity} {group.count}x  {first}")
        if first.remedy:
            lines.append(f"    what to do: {first.remedy}")
    return "\n".join(lines)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _sizes(split: SplitStatistics) -> str:
    if not split.sizes:
        return "–"
    if len(split.sizes) == 1:
        height, width = next(iter(split.sizes))
        return f"{height}x{width}"
    heights, widths = zip(*split.sizes, strict=True)
    return f"{min(heights)}..{max(heights)} x {min(widths)}..{max(widths)}"


def _per_image(counts: Sequence[int]) -> str:
    return f"{sum(counts) / len(counts):.1f}, max {max(counts)}" if counts else "–"
