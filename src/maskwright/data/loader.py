"""Data loaders: the order of the training samples, their random transforms, and batching.

Unusual: the samples of a step depend only on (seed, step, batch size), and the transforms of a sample only on
(seed, epoch, index) and the scale of the step. So the number of workers has no effect, a run can start at any step
without replaying the previous ones, and N processes together see what a single process would see.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import signal
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from maskwright.config.schema import CopyPasteConfig
from maskwright.data.copy_paste import paste_objects
from maskwright.data.formats.base import AnnotatedImages
from maskwright.data.images import warn
from maskwright.data.transforms import Augment, scale_augment
from maskwright.errors import MaskwrightError, RecipeError
from maskwright.structures.annotations import Batch, Target

Item = TypeVar("Item")

_ORDER, _AUGMENT, _PASTE = 0, 1, 2  # independent random streams of one seed


class SampleRequest(NamedTuple):
    """Index of a training sample.

    Attributes:
        epoch: from 0.
        index: of the image; plus n times the number of images for its n-th repetition in the epoch, so that each has
            other transforms.
        scale: of the transforms, relative to the recipe's `augment`.
    """

    epoch: int
    index: int
    scale: float = 1.0


class Sample(NamedTuple):
    """A training sample.

    Attributes:
        image: (C, H, W) uint8 or float32.
        target: at the size of the image.
        key: (epoch, index).
        path: of the image file.
        min_size: (height, width) to which a batch with this sample is padded at least.
    """

    image: torch.Tensor
    target: Target
    key: tuple[int, int]
    path: str
    min_size: tuple[int, int] = (1, 1)


class EvaluationSample(NamedTuple):
    """An image and its annotated objects, both at the size of the file.

    Attributes:
        image: (H, W, C) uint8 or float32.
        target: the objects of the evaluated task, crowds included.
        path: of the image file.
    """

    image: torch.Tensor
    target: Target
    path: str


class TrainingDataset(Dataset):
    """Randomly transformed samples. Crowds are dropped, because they are never trained on."""

    def __init__(self, annotated: AnnotatedImages, augment: Augment, seed: int):
        self.annotated, self.augment, self.seed = annotated, augment, seed

    def __getitem__(self, index: SampleRequest) -> Sample:
        """Return a sample; raises DatasetError or ImageError for damaged files."""
        epoch, position, scale = index
        number = position % len(self.annotated)
        augment = self.augment if scale == 1 else Augment(scale_augment(self.augment.config, scale))
        image, target = self._transform(number, augment, self._generator(_AUGMENT, epoch, position))
        if augment.config.copy_paste is not None:
            generator = self._generator(_PASTE, epoch, position)
            image, target = self._paste(image, target, augment, augment.config.copy_paste, generator)
        path = str(self.annotated.file(number))
        return Sample(image, target, (epoch, position), path, augment.config.crop_size)

    def _transform(self, number: int, augment: Augment, generator: np.random.Generator) -> tuple[torch.Tensor, Target]:
        """Read an image and its objects, and transform both."""
        target = self.annotated.target(number)
        crop = augment.sample_crop(target, generator)
        image = self.annotated.image(number)
        self.annotated.compare_sizes(number, image, target)
        return augment.apply(image, target, crop, generator)

    def _paste(
        self,
        image: torch.Tensor,
        target: Target,
        augment: Augment,
        config: CopyPasteConfig,
        generator: np.random.Generator,
    ) -> tuple[torch.Tensor, Target]:
        """Paste objects of a random image, with the configured probability."""
        if generator.random() >= config.probability:
            return image, target
        source, objects = self._transform(int(generator.integers(len(self.annotated))), augment, generator)
        return paste_objects(image, target, source, objects, self.annotated.categories, config, generator)

    def _generator(self, stream: int, epoch: int, position: int) -> np.random.Generator:
        return np.random.default_rng([stream, self.seed % 2**64, epoch, position])


class EvaluationDataset(Dataset):
    """Unchanged images with all annotated objects, crowds included."""

    def __init__(self, annotated: AnnotatedImages):
        self.annotated = replace(annotated, task="panoptic")

    def __getitem__(self, index: int) -> EvaluationSample:
        """Return a sample; raises DatasetError or ImageError for damaged files."""
        image, target = self.annotated.sample(index)
        return EvaluationSample(torch.from_numpy(image), target, str(self.annotated.file(index)))


class TrainingSampler(Sampler):
    """The endless order of the training samples of one process: one list of requests per micro-batch.

    The permutations of all epochs are concatenated, and each step takes the next `batch_size` samples. These are split
    evenly and in order over the processes, then over the micro-batches of gradient accumulation.

    With repeat factors, an image with factor 1.6 occurs once or twice in an epoch, 1.6 times on average. Differs from
    detectron2's RepeatFactorTrainingSampler: it rounds the factors independently of each other, here all epochs have
    the same length.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        accumulation_steps: int = 1,
        scale_of_step: Callable[[int], float] = lambda step: 1.0,
        repeat_factors: np.ndarray | None = None,
    ):
        """Define the order for `length` images and `batch_size` samples per step, over all processes.

        `repeat_factors`, (length,) float64 >= 1, are how often each image is drawn per epoch; None is once.

        Raises:
            RecipeError: the batch cannot be split evenly.
        """
        if batch_size % (world_size * accumulation_steps):
            raise RecipeError(
                f"{batch_size} is not a multiple of {world_size * accumulation_steps} "
                f"({world_size} processes x train.gradient_accumulation_steps {accumulation_steps})",
                where="train.batch_size",
                remedy="change one of them",
            )
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.start_step, self.accumulation_steps = start_step, accumulation_steps
        self.scale_of_step = scale_of_step
        self.repeat_factors = repeat_factors
        self.epoch_length = length if repeat_factors is None else epoch_length(repeat_factors)

    def __iter__(self) -> Iterator[list[SampleRequest]]:
        """Yield the micro-batches from `start_step` on, endlessly."""
        per_process = self.batch_size // self.world_size
        per_micro_batch = per_process // self.accumulation_steps
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in itertools.count(self.start_step):
            requests, scale = [], self.scale_of_step(step)
            start = step * self.batch_size + self.rank * per_process
            for position in range(start, start + per_process):
                if position // self.epoch_length != epoch:
                    epoch = position // self.epoch_length
                    order = self._order(np.random.default_rng([_ORDER, self.seed % 2**64, epoch]))
                requests.append(SampleRequest(epoch, int(order[position % self.epoch_length]), scale))
            for first in range(0, per_process, per_micro_batch):
                yield requests[first : first + per_micro_batch]

    def _order(self, generator: np.random.Generator) -> np.ndarray:
        """Return the indices of an epoch, see `SampleRequest`.

        Factors are rounded by systematic sampling: laid end to end in random order on a scale, each image gets as many
        samples as there are marks, one unit apart from a random start, on its part.
        """
        order = generator.permutation(self.length)
        if self.repeat_factors is None:
            return order
        ends = np.cumsum(self.repeat_factors[order])
        marks = np.floor(ends * (self.epoch_length / ends[-1]) + generator.random()).astype(np.int64)
        marks[-1] = self.epoch_length
        counts = np.diff(marks, prepend=0)
        repetitions = np.arange(self.epoch_length) - np.repeat(marks - counts, counts)
        return generator.permutation(np.repeat(order, counts) + self.length * repetitions)


def epoch_length(repeat_factors: np.ndarray) -> int:
    """Return the number of samples of an epoch with repeat factors (N,) >= 1: at least N."""
    return int(np.ceil(repeat_factors.sum() - 1e-6))


class TrainingLoader:
    """Endless training steps; each is the list of this process's micro-batches."""

    def __init__(self, dataset: TrainingDataset, sampler: TrainingSampler, workers: int):
        self.accumulation_steps = sampler.accumulation_steps
        self._loader = _create_loader(dataset, workers, sampler, _pack_or_error)

    def __iter__(self) -> Iterator[list[Batch]]:
        """Yield the steps from the sampler's `start_step` on."""
        batches = map(_unpack, map(_raise_error, self._loader))
        while True:
            yield [next(batches) for _ in range(self.accumulation_steps)]


class EvaluationLoader:
    """The images of one process, each once, in order. Can be iterated several times.

    Attributes:
        annotated: the split.
        categories: the classes of the labels.
    """

    def __init__(self, dataset: EvaluationDataset, count: int, workers: int, rank: int, world_size: int):
        """Split the first `count` images: process r gets the images r, r + world_size, r + 2 world_size, ..."""
        self.annotated, self.categories = dataset.annotated, dataset.annotated.categories
        self._indices = range(rank, count, world_size)
        self._loader = _create_loader(dataset, workers, [[index] for index in self._indices], _only_item)

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[EvaluationSample]:
        """Yield the images with their targets."""
        return map(_raise_error, self._loader)


def collate(samples: Sequence[Sample], min_size: tuple[int, int], size_divisor: int = 32) -> Batch:
    """Stack samples, padded right and bottom to `min_size` or the largest sample, in multiples of `size_divisor`.

    Training pads every sample to the crop size, as the reference does. Padding influences the network, so this also
    makes the losses of a sample independent of the other samples in its batch.

    Args:
        samples: at least one.
        min_size: (height, width) in pixels to which images and id maps are padded at least.
        size_divisor: in pixels.
    """
    return _unpack(_pack(samples, min_size, size_divisor))


class _PackedBatch(NamedTuple):
    """A batch sent from a worker to the main process, as only three tensors.

    Each tensor that is sent takes a file descriptor. A batch of 16 targets with three tensors each would soon exceed
    the usual limit of 1024.
    """

    images: torch.Tensor
    padding: torch.Tensor
    ids: torch.Tensor  # all id maps, flattened and concatenated
    shapes: list[tuple[int, ...]]  # of the id maps
    labels: list[np.ndarray]
    is_crowd: list[np.ndarray]
    other_fields: list[dict]  # of the targets
    keys: list[tuple[int, int]]
    paths: list[str]


_OTHER_FIELDS = ("image_id", "original_size", "areas", "boxes", "void")


def _pack(samples: Sequence[Sample], min_size: tuple[int, int], size_divisor: int = 32) -> _PackedBatch:
    sizes = [sample.image.shape[1:] for sample in samples]
    height, width = (-(-max(sides) // size_divisor) * size_divisor for sides in zip(*sizes, min_size, strict=True))
    images = torch.zeros(len(samples), len(samples[0].image), height, width, dtype=samples[0].image.dtype)
    padding = torch.ones(len(samples), height, width, dtype=torch.bool)
    for i, (sample, (h, w)) in enumerate(zip(samples, sizes, strict=True)):
        images[i, :, :h, :w] = sample.image
        padding[i, :h, :w] = False
    targets = [sample.target for sample in samples]
    shapes: list[tuple[int, ...]] = [(len(target.id_maps), height, width) for target in targets]
    ids = torch.zeros(sum(int(np.prod(shape)) for shape in shapes), dtype=torch.int32)
    for target, (h, w), padded in zip(targets, sizes, _split(ids, shapes), strict=True):
        padded[:, :h, :w] = target.id_maps
    return _PackedBatch(
        images,
        padding,
        ids,
        shapes,
        [target.labels.numpy() for target in targets],
        [target.is_crowd.numpy() for target in targets],
        [{name: getattr(target, name) for name in _OTHER_FIELDS} for target in targets],
        [sample.key for sample in samples],
        [sample.path for sample in samples],
    )


def _unpack(packed: _PackedBatch) -> Batch:
    targets = [
        Target(id_maps=maps, labels=torch.from_numpy(labels), is_crowd=torch.from_numpy(is_crowd), **others)
        for maps, labels, is_crowd, others in zip(
            _split(packed.ids, packed.shapes), packed.labels, packed.is_crowd, packed.other_fields, strict=True
        )
    ]
    return Batch(packed.images, packed.padding, targets, packed.keys, packed.paths)


def _split(ids: torch.Tensor, shapes: list[tuple[int, ...]]) -> list[torch.Tensor]:
    """Return views of the concatenated id maps."""
    parts = ids.split([int(np.prod(shape)) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


class _ReturnErrors(Dataset):
    """A dataset that returns a user's error in place of a sample.

    An exception raised in a worker would reach the main process with the worker's traceback in its text.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, index) -> Sample | EvaluationSample | MaskwrightError:
        try:
            return self.dataset[index]
        except MaskwrightError as error:
            return error


def _pack_or_error(items: list[Sample | MaskwrightError]) -> _PackedBatch | MaskwrightError:
    samples: list[Sample] = []
    for item in items:
        if isinstance(item, MaskwrightError):
            return item
        samples.append(item)
    return _pack(samples, samples[0].min_size)


def _only_item(items: list[Item]) -> Item:
    (item,) = items
    return item


def _raise_error(item: Item | MaskwrightError) -> Item:
    if isinstance(item, MaskwrightError):
        try:
            raise item
        finally:
            del item  # breaks the cycle of error and frame, which would keep the workers alive until a timeout (10 s)
    return item


def _start_worker(warning_flags, worker: int) -> None:
    """Share the flags of `warn`, and ignore SIGTERM.

    Schedulers send SIGTERM to all processes; the main process ends the workers after saving.
    """
    warn.share_flags(warning_flags)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _end_workers(reference: weakref.ref[DataLoader]) -> None:
    """End the workers at exit: multiprocessing would send SIGTERM, which they ignore, and wait for them."""
    iterator = getattr(reference(), "_iterator", None)
    if iterator is not None:
        iterator._shutdown_workers()


def _create_loader(dataset: Dataset, workers: int, batch_sampler: Iterable, collate_fn: Callable) -> DataLoader:
    """Create a loader that leaves the global random state alone.

    On Linux workers are forked, so that scripts need no main guard. They use numpy, Pillow and one thread of torch, and
    none of these waits for a thread of the parent.
    """
    loader = DataLoader(
        _ReturnErrors(dataset),
        batch_sampler=batch_sampler,
        num_workers=workers,
        collate_fn=collate_fn,
        persistent_workers=workers > 0,
        worker_init_fn=functools.partial(_start_worker, warn.shared_flags() if workers else None),
        generator=torch.Generator(),
        multiprocessing_context="fork" if workers > 0 and sys.platform == "linux" else None,
    )
    if workers:
        atexit.register(_end_workers, weakref.ref(loader))
    return loader
