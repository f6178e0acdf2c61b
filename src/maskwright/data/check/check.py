"""`maskwright check`: the dataset doctor. Every file is opened, whatever is wrong with the others.

`check` looks at a whole data set; `check_before_training` at a few files of one, in a few seconds. What is wrong with
single entries and files is found by the readers themselves (`data.formats`), which here skip what they would refuse in
training; this package adds what only shows in all files together.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from maskwright.config.recipe import Recipe, load_recipe
from maskwright.config.schema import DataConfig
from maskwright.data.check.duplicates import duplicates
from maskwright.data.check.examine import Examination, Picture, examine
from maskwright.data.check.previews import Example, illustrate
from maskwright.data.check.process_pool import cores, spread
from maskwright.data.check.report import Report, TaskStatistics
from maskwright.data.check.sanity import judge
from maskwright.data.check.statistics import ClassCount, SplitStatistics
from maskwright.data.formats.base import AnnotatedImages
from maskwright.data.formats.detect import detect_format
from maskwright.data.formats.dispatch import open_annotations
from maskwright.data.images.multichannel import count_channels
from maskwright.data.problems import Problem, ProblemCollector
from maskwright.errors import DatasetError

SPLITS = ("train", "val", "test")
EXAMPLES_PER_SORT = 3  # pictures shown of problems that are alike
MOST_EXAMPLES_OF_PROBLEMS = 60
SAMPLED_BEFORE_TRAINING = 64  # images of each split
SECONDS_BEFORE_TRAINING = 2.0  # for each split

View = tuple[int, int]  # number of the task, and index of the image in its split
Piece = tuple[str, tuple[View, ...]]  # split, and one picture as each task has it
Opened = dict[str, AnnotatedImages]  # splits by name


def check(
    source: str | Path,
    overrides: Sequence[str] = (),
    *,
    sample: int | None = None,
    examples: int = 16,
    workers: int | None = None,
    on_image: Callable[[int, int], object] | None = None,
) -> Report:
    """Look at every file of a data set.

    Args:
        source: a recipe (name or YAML file), a folder, or a COCO json; the latter two are recognised by their layout,
            and looked at for every task that they have annotations of their own for.
        overrides: "key.path=value" each, for a recipe.
        sample: images of each split, evenly spread; None is all.
        examples: pictures of each split to be shown, besides those with problems.
        workers: processes; None is one per core.
        on_image: called with (1, images in all) after each image.

    Returns:
        What was found. Nothing about the data set raises.

    Raises:
        RecipeError: there is neither a data set nor a recipe of this name, or the recipe is wrong.
    """
    report, reader = Report(str(source)), ProblemCollector()
    recipe, configs = None, []
    if _is_data(source) and not overrides:
        with reader.skipping():
            configs = detect_format(source)
    else:
        recipe = load_recipe(source, tuple(overrides))
        configs = [recipe.data]
    if configs:
        report.format, report.task = configs[0].format, configs[0].task
    tasks = []
    for config in configs:
        opened = dict(_opened(config, recipe.model.channels if recipe else None, reader))
        if recipe is None:
            opened = _with_channels(opened)
        _compare_categories(opened, reader)
        if opened:
            tasks.append(opened)
    report.add(dict.fromkeys(reader.drain()))
    if not tasks:
        return report
    statistics = [_statistics(opened) for opened in tasks]
    first = next(iter(tasks[0].values()))
    report.task, report.channels = first.task, first.channels
    report.categories, report.splits, report.others = first.categories, statistics[0].splits, statistics[1:]
    every = _joined(tasks)
    pieces = [part[i] for part in every.values() for i in _spread(len(part), sample)]
    report.workers = min(cores() if workers is None else workers, max(len(pieces) // 16, 1))
    started = time.perf_counter()
    pictures, wrong = _examine_all(report, tasks, reader, pieces, on_image)
    report.seconds = time.perf_counter() - started
    report.add(duplicates(pictures))
    report.add(_judged(report.tasks, recipe.model.num_queries if recipe else None))
    report.problems.sort(key=lambda problem: (problem.severity, problem.where))
    shown = [
        *sorted(wrong),
        *(piece for part in every.values() for piece in _of(part, examples, wrong)),
    ]
    report.examples = list(
        spread(partial(_illustrate, tasks), shown, report.workers, lambda piece: Example(piece[0], "", None, ()))
    )
    return report


def check_before_training(recipe: Recipe, opened: dict[str, AnnotatedImages]) -> None:
    """Look at a sample of files for a few seconds.

    Args:
        recipe: what is to be trained.
        opened: its splits by name, whose annotations have been found in order.

    Raises:
        DatasetError: training with these files would fail or be nonsense; says how often, and names the first.
    """
    report = Report(recipe.name, recipe.data.format, recipe.data.task)
    for name, images in opened.items():
        split = report.splits[name] = _no_statistics(images)
        deadline = time.perf_counter() + SECONDS_BEFORE_TRAINING
        for index in _far_apart(_spread(len(images), SAMPLED_BEFORE_TRAINING)):
            found = examine(images, index)
            split.add(found)
            report.add(found.problems)
            if time.perf_counter() > deadline:
                break
    train = report.splits["train"]
    if train.read and not train.objects and not report.errors:
        found = f"data.train: none of the {train.read} images that were looked at has an object to train on"
        report.add([Problem("error", "", (), found, "annotate some, or correct data.categories")])
    if report.errors:
        first = report.sorts[0].problems[0]
        more = f" (and {report.errors - 1} more errors in {report.images} images)" if report.errors > 1 else ""
        raise DatasetError(
            f"{first.found}{more}",
            where=first.where,
            remedy=f"{first.remedy or 'correct the data set'}; `maskwright check` lists all problems, "
            "train.check_data=false skips this check",
        )


def _is_data(source: str | Path) -> bool:
    place = Path(source).expanduser()
    return place.is_dir() or (place.is_file() and place.suffix.lower() not in (".yaml", ".yml"))


def _opened(
    config: DataConfig, channels: int | None, problems: ProblemCollector
) -> Iterator[tuple[str, AnnotatedImages]]:
    for name in SPLITS:
        if getattr(config, name) is not None:
            with problems.skipping(f"data.{name}"):
                yield name, open_annotations(config, name, problems, channels)


def _with_channels(opened: dict[str, AnnotatedImages]) -> dict[str, AnnotatedImages]:
    """Splits whose pictures are read with as many channels as the first of them has, where that is not RGB."""
    first = next((images for images in opened.values() if len(images)), None)
    channels = count_channels(first.file(0)) if first is not None else None
    return {name: replace(images, channels=channels) for name, images in opened.items()}


def _joined(tasks: Sequence[Opened]) -> dict[str, list[Piece]]:
    """The pictures of each split, each once, with the tasks that it is annotated for."""
    views: dict[str, dict[str, list[View]]] = {}
    for number, opened in enumerate(tasks):
        for name, images in opened.items():
            found = views.setdefault(name, {})
            for index in range(len(images)):
                key = str(images.file(index)) if len(tasks) > 1 else str(index)  # a list may name a picture twice
                found.setdefault(key, []).append((number, index))
    return {name: [(name, tuple(places)) for places in found.values()] for name, found in views.items()}


def _judged(parts: Sequence[TaskStatistics], queries: int | None) -> Iterator[Problem]:
    """What `judge` says of all tasks; classes that the first has shown to be absent are not told again."""
    told: set[str] = set()
    for part in parts:
        for problem in judge(part.splits, part.categories, queries):
            if not problem.items or not told.issuperset(problem.items):
                yield problem._replace(found=f"{part.task}: {problem.found}") if len(parts) > 1 else problem
            told.update(problem.items)


def _statistics(opened: Opened) -> TaskStatistics:
    first = next(iter(opened.values()))
    return TaskStatistics(
        first.task, first.categories, {name: _no_statistics(images) for name, images in opened.items()}
    )


def _compare_categories(opened: dict[str, AnnotatedImages], problems: ProblemCollector) -> None:
    """Splits whose classes are not those of the first are told, and left out."""
    lists = {name: [(category.id, category.name) for category in images.categories] for name, images in opened.items()}
    first = next(iter(lists), "")
    for name, own in lists.items():
        expected = lists[first]
        if own != expected:
            odd = next((pair for pair in [*own, *expected] if (pair in own) != (pair in expected)), "their order")
            found = f"has other classes than data.{first} ({len(own)} and {len(expected)}), such as {odd}"
            remedy = "use one list of classes, data.categories, for all splits"
            problems.error(DatasetError(found, where=f"data.{name}", remedy=remedy))
            del opened[name]


def _examine_all(
    report: Report,
    tasks: Sequence[Opened],
    reader: ProblemCollector,
    pieces: list[Piece],
    on_image: Callable[[int, int], object] | None,
) -> tuple[dict[str, dict[str, Picture]], list[Piece]]:
    """Fill statistics and problems; gives the pictures that could be read, and images that show what is wrong."""
    pictures: dict[str, dict[str, Picture]] = {name: {} for opened in tasks for name in opened}
    statistics = report.tasks
    shown: list[Piece] = []
    times: Counter[tuple[str, str]] = Counter()
    work = partial(_examine, tasks, reader)
    for (name, views), found in spread(work, pieces, report.workers, partial(_ended, tasks)):
        for (number, _), objects in zip(views, [found.objects, *found.others], strict=True):
            statistics[number].splits[name].add(replace(found, objects=objects))
        report.add(found.problems, found.path)
        if found.picture is not None:
            pictures[name][found.path] = found.picture
        sorts = {problem.kind for problem in found.problems}
        if len(shown) < MOST_EXAMPLES_OF_PROBLEMS and any(times[sort] < EXAMPLES_PER_SORT for sort in sorts):
            shown.append((name, views))
        times.update(sorts)
        if on_image is not None:
            on_image(1, len(pieces))
    return pictures, shown


def _examine(tasks: Sequence[Opened], reader: ProblemCollector, piece: Piece) -> tuple[Piece, Examination]:
    name, views = piece
    first, *others = ((tasks[number][name], index) for number, index in views)
    return piece, examine(*first, reader, others)


def _ended(tasks: Sequence[Opened], piece: Piece) -> tuple[Piece, Examination]:
    name, views = piece
    number, index = views[0]
    path = str(tasks[number][name].file(index))
    found = "reading the picture or its annotations ended the process (out of memory, or a decoder that crashed)"
    problem = Problem("error", path, (), found, "export both files again")
    return piece, Examination(path, problems=[problem], others=[None] * (len(views) - 1))


def _illustrate(tasks: Sequence[Opened], piece: Piece) -> Example:
    name, views = piece
    number, index = views[0]
    example = illustrate(name, tasks[number][name], index)
    return example._replace(labels=()) if number else example  # labels are those of the first task


def _no_statistics(images: AnnotatedImages) -> SplitStatistics:
    return SplitStatistics(len(images), classes=[ClassCount() for _ in images.categories])


def _spread(count: int, wanted: int | None) -> list[int]:
    """At most `wanted` of the numbers below `count`, evenly spread."""
    wanted = count if wanted is None else min(count, wanted)
    return [i * count // wanted for i in range(wanted)]


def _far_apart(numbers: list[int]) -> list[int]:
    """The same numbers in an order in which each beginning is evenly spread."""
    bits = max(len(numbers) - 1, 1).bit_length()
    order = sorted(range(len(numbers)), key=lambda i: f"{i:0{bits}b}"[::-1])
    return [numbers[i] for i in order]


def _of(pieces: Sequence[Piece], wanted: int, without: list[Piece]) -> list[Piece]:
    return [pieces[i] for i in _spread(len(pieces), wanted) if pieces[i] not in without]
