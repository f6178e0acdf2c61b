"""`maskwright check`: examine a dataset. Every file is opened, whatever is wrong with the others.

`check` examines a whole dataset; `check_before_training` a few files of one, in a few seconds. Problems of single
entries and files are found by the readers (`data.formats`), which skip here what they refuse in training. This package
adds problems that only show in all files together.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from maskwright.config.recipe import Recipe, change_data, load_recipe, recipe_names
from maskwright.config.schema import DataConfig
from maskwright.data.check.duplicates import find_duplicates
from maskwright.data.check.examine import ExaminedImage, PixelContent, collecting_errors, examine_image
from maskwright.data.check.previews import Preview, render_preview, render_sample
from maskwright.data.check.report import Report, TaskStatistics
from maskwright.data.check.sanity import check_statistics
from maskwright.data.check.statistics import ClassCount, SplitStatistics
from maskwright.data.formats.base import AnnotatedImages
from maskwright.data.formats.detect import detect_layout
from maskwright.data.formats.dispatch import open_annotations
from maskwright.data.images.multichannel import count_channels
from maskwright.data.loader import SampleRequest, TrainingDataset
from maskwright.data.problems import Problem, ProblemCollector
from maskwright.data.transforms import Augment
from maskwright.errors import DatasetError, MaskwrightError, RecipeError
from maskwright.runtime.process_pool import available_cores, map_unordered

SPLITS = ("train", "val", "test")
_MORE_DETAILED = {"semantic": ("panoptic", "instance"), "instance": ("panoptic",), "panoptic": ()}
PREVIEWS_PER_KIND = 3  # images shown for problems of one kind
MAX_PROBLEM_PREVIEWS = 60
SAMPLES_BEFORE_TRAINING = 64  # images of each split
SECONDS_BEFORE_TRAINING = 2.0  # for each split

OpenSplits = dict[str, AnnotatedImages]  # by split name


class ImageRef(NamedTuple):
    """One image of a split and its annotations for each task.

    Attributes:
        split: name of the split.
        places: (index of the task, index of the image in its split), at least one.
    """

    split: str
    places: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Examiner:
    """What worker processes need to examine images.

    Attributes:
        tasks: the open splits of each task.
        reader_problems: the collector that they were opened with.
    """

    tasks: Sequence[OpenSplits]
    reader_problems: ProblemCollector

    def examine(self, image: ImageRef) -> tuple[ImageRef, ExaminedImage]:
        first, *others = ((self.tasks[task][image.split], index) for task, index in image.places)
        return image, examine_image(*first, self.reader_problems, others)

    def examination_crashed(self, image: ImageRef) -> tuple[ImageRef, ExaminedImage]:
        found = "reading the image or its annotations killed the process (out of memory, or a decoder that crashed)"
        problem = Problem("error", self._path(image), (), found, "export both files again")
        return image, ExaminedImage(problem.where, problems=[problem], other_objects=[None] * (len(image.places) - 1))

    def preview(self, image: ImageRef) -> Preview:
        task, index = image.places[0]
        preview = render_preview(image.split, self.tasks[task][image.split], index)
        return preview._replace(labels=()) if task else preview  # the sheet filters by labels of the first task

    def preview_crashed(self, image: ImageRef) -> Preview:
        return Preview(image.split, self._path(image))

    def _path(self, image: ImageRef) -> str:
        task, index = image.places[0]
        return str(self.tasks[task][image.split].file(index))


def check(
    source: str | Path,
    overrides: Sequence[str] = (),
    *,
    task: str | None = None,
    sample: int | None = None,
    previews: int = 16,
    workers: int | None = None,
    on_image: Callable[[int, int], object] | None = None,
) -> Report:
    """Examine every file of a dataset.

    Args:
        source: a recipe (name or YAML file), a folder, or a COCO JSON. The format of the latter two is detected, and
            they are checked for every task that they have their own annotations for.
        overrides: "key.path=value" each; for a folder or JSON, keys of `data` only.
        task: the only task to check a folder or JSON for; None is all.
        sample: images of each split, evenly spaced; None is all.
        previews: images of each split in the contact sheet, besides those with problems; for a recipe, also half as
            many training samples with its augmentation.
        workers: number of processes; None is one per core.
        on_image: called with (1, total images) after each image.

    Returns:
        The problems and statistics. Problems of the dataset are never raised.

    Raises:
        RecipeError: there is neither a dataset nor a recipe of this name, or the recipe is wrong; or a task is given
            for a recipe, which has its own.
        DatasetError: the dataset has no annotations for the task.
    """
    report, reader_problems = Report(str(source)), ProblemCollector()
    recipe = None
    configs: list[DataConfig] = []
    if is_data_set(source, overrides):
        with collecting_errors(reader_problems, str(source)):
            detection = detect_layout(source)
            configs, report.notes, report.is_detected = list(detection.configs), detection.notes, True
        if configs and task is not None:
            configs = [_section_for_task(configs, task)]
        configs = [change_data(config, overrides, str(source)) for config in configs]
    elif task is not None:
        raise RecipeError("--task is for a folder or JSON", where=str(source), remedy=f"set data.task={task}")
    else:
        recipe = load_recipe(source, tuple(overrides))
        configs = [recipe.data]
    report.configs = list(configs)
    if configs:
        report.format, report.tasks = configs[0].format, [TaskStatistics(configs[0].task)]
    tasks = _open_tasks(configs, recipe, reader_problems)
    report.add(dict.fromkeys(reader_problems.drain()))
    if not tasks:
        _require_images(report)
        return report
    report.tasks = [_no_task_statistics(opened) for opened in tasks]
    report.channels = next(iter(tasks[0].values())).channels
    images = _join_tasks(tasks)
    sampled = [refs[i] for refs in images.values() for i in _evenly_spaced(len(refs), sample)]
    report.workers = min(available_cores() if workers is None else workers, max(len(sampled) // 16, 1))
    examiner = _Examiner(tasks, reader_problems)
    started = time.perf_counter()
    pixels, with_problems = _examine_images(report, examiner, sampled, on_image)
    report.seconds = time.perf_counter() - started
    report.add(find_duplicates(pixels))
    _require_images(report)
    report.add(_check_all_statistics(report.tasks, recipe.model.num_queries if recipe else None))
    report.problems.sort(key=lambda problem: (problem.severity, problem.where))
    shown = sorted(with_problems)
    for refs in images.values():
        shown += [refs[i] for i in _evenly_spaced(len(refs), previews) if refs[i] not in with_problems]
    report.previews = list(map_unordered(examiner.preview, shown, report.workers, examiner.preview_crashed))
    if recipe is not None and "train" in tasks[0]:
        report.previews += _preview_samples(recipe, tasks[0]["train"], previews // 2)
    return report


def check_before_training(recipe: Recipe, opened: OpenSplits) -> None:
    """Examine a sample of files for a few seconds.

    Args:
        recipe: the recipe to train.
        opened: its splits by name, which opened without an error.

    Raises:
        DatasetError: training with these files would fail or learn nonsense; has the first error and their number.
    """
    splits = {name: _no_statistics(images) for name, images in opened.items()}
    report = Report(recipe.name, recipe.data.format, [TaskStatistics(recipe.data.task, splits=splits)])
    for name, images in opened.items():
        deadline = time.perf_counter() + SECONDS_BEFORE_TRAINING
        for index in _spread_out(_evenly_spaced(len(images), SAMPLES_BEFORE_TRAINING)):
            examined = examine_image(images, index)
            splits[name].add(examined)
            report.add(examined.problems)
            if time.perf_counter() > deadline:
                break
    train = splits["train"]
    if train.read and not train.objects and not report.errors:
        found = f"none of the {train.read} images that were examined has an object to train on"
        report.add([Problem("error", "data.train", (), found, "annotate some, or correct data.categories")])
    if report.errors:
        first = report.problem_groups[0].problems[0]
        more = f" (and {report.errors - 1} more errors in {report.images} images)" if report.errors > 1 else ""
        raise DatasetError(
            f"{first.found}{more}",
            where=first.where,
            remedy=f"{first.remedy or 'correct the dataset'}; `maskwright check` lists all problems, "
            "train.check_data=false skips this check",
        )


def _preview_samples(recipe: Recipe, train: AnnotatedImages, count: int) -> list[Preview]:
    """Render samples as they are trained on; those that cannot be read are omitted."""
    samples = TrainingDataset(train, Augment(recipe.train.augment), recipe.train.seed)
    rendered = []
    for index in _evenly_spaced(len(train), count):
        with contextlib.suppress(MaskwrightError):  # examine_image reports it
            sample = samples[SampleRequest(0, index)]
            rendered.append(render_sample(sample.image, sample.target, sample.path, train))
    return rendered


def _require_images(report: Report) -> None:
    """Add an error if nothing was read and no other error says why."""
    if not report.images and not report.errors:
        found = "no image was read: the dataset has no splits, or they are empty"
        report.add([Problem("error", report.source, (), found, "name images and annotations of at least one split")])


def is_data_set(source: str | Path, overrides: Sequence[str] = ()) -> bool:
    """Return whether `check` takes the source for a dataset, and not for a recipe.

    With overrides, a built-in recipe takes precedence over a folder with its name.
    """
    if overrides and str(source) in recipe_names():
        return False
    path = Path(source).expanduser()
    return path.is_dir() or (path.is_file() and path.suffix.lower() not in (".yaml", ".yml"))


def _section_for_task(configs: Sequence[DataConfig], task: str) -> DataConfig:
    """Return the `data` section for a task, from its own annotations or from those for a more detailed task.

    Raises:
        DatasetError: there are none.
    """
    sections = {config.task: config for config in configs}
    usable = [name for name in (task, *_MORE_DETAILED[task]) if name in sections]
    if not usable:
        raise DatasetError(
            f"has no annotations for the task {task}",
            where=configs[0].root,
            remedy=f"choose --task {' or '.join(sorted(sections))}",
        )
    return sections[usable[0]].model_copy(update={"task": task})


def _open_tasks(configs: Sequence[DataConfig], recipe: Recipe | None, problems: ProblemCollector) -> list[OpenSplits]:
    """Open the splits of each task; those that cannot be opened are reported and dropped."""
    tasks = []
    for config in configs:
        opened: OpenSplits = {}
        for name in SPLITS:
            if getattr(config, name) is not None:
                with collecting_errors(problems, f"data.{name}"):
                    opened[name] = open_annotations(
                        config, name, problems, recipe.model.channels if recipe is not None else None
                    )
        if recipe is None:
            opened = _with_channels_of_files(opened)
        _drop_splits_of_other_classes(opened, problems)
        if opened:
            tasks.append(opened)
    return tasks


def _with_channels_of_files(opened: OpenSplits) -> OpenSplits:
    """Read all splits with the number of channels of the first image, unless it is RGB."""
    first = next((images for images in opened.values() if len(images)), None)
    channels = None
    if first is not None:
        with contextlib.suppress(MaskwrightError):  # reported when the image is read
            channels = count_channels(first.file(0))
    return {name: replace(images, channels=channels) for name, images in opened.items()}


def _drop_splits_of_other_classes(opened: OpenSplits, problems: ProblemCollector) -> None:
    """Report and drop splits whose classes are not those of the first."""
    classes = {
        name: [(category.id, category.name) for category in images.categories] for name, images in opened.items()
    }
    first = next(iter(classes), "")
    for name, own in classes.items():
        expected = classes[first]
        if own != expected:
            example = next((entry for entry in [*own, *expected] if (entry in own) != (entry in expected)), "the order")
            found = f"has other classes than data.{first} ({len(own)} and {len(expected)}), such as {example}"
            remedy = "use one list of classes, data.categories, for all splits"
            problems.error(DatasetError(found, where=f"data.{name}", remedy=remedy))
            del opened[name]


def _join_tasks(tasks: Sequence[OpenSplits]) -> dict[str, list[ImageRef]]:
    """Return the images of each split, each once, with the tasks that it is annotated for."""
    places: dict[str, dict[str, list[tuple[int, int]]]] = {}
    for task, opened in enumerate(tasks):
        for name, images in opened.items():
            by_image = places.setdefault(name, {})
            for index in range(len(images)):
                key = str(images.file(index)) if len(tasks) > 1 else str(index)  # a list may name an image twice
                by_image.setdefault(key, []).append((task, index))
    return {name: [ImageRef(name, tuple(found)) for found in by_image.values()] for name, by_image in places.items()}


def _examine_images(
    report: Report, examiner: _Examiner, images: list[ImageRef], on_image: Callable[[int, int], object] | None
) -> tuple[dict[str, dict[str, PixelContent]], list[ImageRef]]:
    """Add statistics and problems to the report; return readable images by split and path, and images with problems."""
    pixels: dict[str, dict[str, PixelContent]] = {name: {} for opened in examiner.tasks for name in opened}
    with_problems: list[ImageRef] = []
    shown: Counter[tuple[str, str]] = Counter()  # images with a problem of each kind
    results = map_unordered(examiner.examine, images, report.workers, examiner.examination_crashed)
    for image, examined in results:
        objects_of_tasks = [examined.objects, *examined.other_objects]
        for (task, _), objects in zip(image.places, objects_of_tasks, strict=True):
            report.tasks[task].splits[image.split].add(replace(examined, objects=objects))
        report.add(examined.problems, examined.path)
        if examined.pixels is not None:
            pixels[image.split][examined.path] = examined.pixels
        kinds = {problem.kind for problem in examined.problems}
        if len(with_problems) < MAX_PROBLEM_PREVIEWS and any(shown[kind] < PREVIEWS_PER_KIND for kind in kinds):
            with_problems.append(image)
        shown.update(kinds)
        if on_image is not None:
            on_image(1, len(images))
    return pixels, with_problems


def _check_all_statistics(tasks: Sequence[TaskStatistics], num_queries: int | None) -> Iterator[Problem]:
    """Check the statistics of all tasks; classes missing in the first task are not reported again."""
    reported: set[str] = set()
    for task in tasks:
        for problem in check_statistics(task.splits, task.categories, num_queries):
            if not problem.items or not reported.issuperset(problem.items):
                yield problem._replace(found=f"{task.task}: {problem.found}") if len(tasks) > 1 else problem
            reported.update(problem.items)


def _no_task_statistics(opened: OpenSplits) -> TaskStatistics:
    first = next(iter(opened.values()))
    splits = {name: _no_statistics(images) for name, images in opened.items()}
    return TaskStatistics(first.task, first.categories, splits)


def _no_statistics(images: AnnotatedImages) -> SplitStatistics:
    return SplitStatistics(len(images), classes=[ClassCount() for _ in images.categories])


def _evenly_spaced(count: int, samples: int | None) -> list[int]:
    """Return at most `samples` of the numbers below `count`, evenly spaced."""
    samples = count if samples is None else min(count, samples)
    return [i * count // samples for i in range(samples)]


def _spread_out(values: list[int]) -> list[int]:
    """Reorder values so that each prefix is spread over all of them (bit-reversal permutation)."""
    bits = max(len(values) - 1, 1).bit_length()
    order = sorted(range(len(values)), key=lambda i: f"{i:0{bits}b}"[::-1])
    return [values[i] for i in order]
