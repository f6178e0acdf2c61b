"""From annotated images to batches: which sample comes when, what is random about it, and how a batch is put together.

Unusual here: what a step holds depends only on (seed, step, batch size), and how a sample is changed only on (seed,
epoch, index) and the step's size. So the number of workers does not matter, a run can start at any step without
replaying the ones before, and N processes see together what one process would have seen.
"""

from __future__ import annotations

import atexit
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

from maskwright.data.formats.base import AnnotatedImages
from maskwright.data.transforms import Augment, resized
from maskwright.errors import MaskwrightError, RecipeError
from maskwright.structures.annotations import Batch, Target

Received = TypeVar("Received")

_ORDER, _AUGMENT = 0, 1  # streams of random numbers that must differ for one seed


class Wanted(NamedTuple):
    """Which sample is asked for.

    Attributes:
        epoch: from 0.
        index: of the image.
        size: height and width relative to what the recipe's `augment` says.
    """

    epoch: int
    index: int
    size: float = 1.0


class Sample(NamedTuple):
    """One image ready for a batch.

    Attributes:
        image: (3, H, W) uint8 RGB.
        target: of the image's size.
        key: (epoch, index).
        path: the image file.
        crop: (height, width) that it is padded to.
    """

    image: torch.Tensor
    target: Target
    key: tuple[int, int]
    path: str
    crop: tuple[int, int] = (1, 1)


class EvaluationSample(NamedTuple):
    """One image and what there is to be found in it, both at the file's size.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        target: with the objects of the evaluated task, crowds included.
        path: the image file.
    """

    image: torch.Tensor
    target: Target
    path: str


class TrainingSamples(Dataset):
    """Changed samples; crowds are dropped, since they are never trained on."""

    def __init__(self, annotated: AnnotatedImages, augment: Augment, seed: int):
        self.annotated, self.augment, self.seed = annotated, augment, seed

    def __getitem__(self, index: Wanted) -> Sample:
        """The sample; raises DatasetError or ImageError for broken files."""
        epoch, number, size = index
        augment = self.augment if size == 1 else Augment(resized(self.augment.config, size))
        generator = np.random.default_rng([_AUGMENT, self.seed % 2**64, epoch, number])
        target = self.annotated.target(number)
        window = augment.choose(target, generator)
        image = self.annotated.image(number)
        self.annotated.compare_sizes(number, image, target)
        changed = augment.apply(image, target, window, generator)
        return Sample(*changed, (epoch, number), str(self.annotated.file(number)), augment.config.crop_size)


class EvaluationSamples(Dataset):
    """Images as they are in their files with all annotated objects, crowds included, asked for by index."""

    def __init__(self, annotated: AnnotatedImages):
        self.annotated = replace(annotated, task="panoptic")

    def __getitem__(self, index: int) -> EvaluationSample:
        """The sample; raises DatasetError or ImageError for broken files."""
        image, target = self.annotated.sample(index)
        return EvaluationSample(torch.from_numpy(image), target, str(self.annotated.file(index)))


class SampleStream(Sampler):
    """The endless order of training samples of one process: one list of `Wanted` per accumulated part.

    All epochs' permutations stand one behind the other, and step s holds the next `batch_size` of them. That whole
    batch is divided evenly and in order over processes, then over accumulated parts.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
        accumulate: int = 1,
        size_at: Callable[[int], float] = lambda step: 1.0,
    ):
        """Set the order; `length` images, `batch_size` per step over all processes and parts, of a size at each step.

        Raises:
            RecipeError: the batch cannot be divided evenly.
        """
        if batch_size % (world * accumulate):
            raise RecipeError(
                f"train.batch_size is {batch_size}, expected a multiple of {world * accumulate} "
                f"({world} processes x train.gradient_accumulation_steps {accumulate}); change one of them"
            )
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world, self.start_step, self.accumulate = rank, world, start_step, accumulate
        self.size_at = size_at

    def __iter__(self) -> Iterator[list[Wanted]]:
        """The parts from `start_step` on, without end."""
        share = self.batch_size // self.world
        part = share // self.accumulate
        position = self.start_step * self.batch_size + self.rank * share
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in itertools.count(self.start_step):
            wanted, size = [], self.size_at(step)
            for place in range(position, position + share):
                if place // self.length != epoch:
                    epoch = place // self.length
                    order = np.random.default_rng([_ORDER, self.seed % 2**64, epoch]).permutation(self.length)
                wanted.append(Wanted(epoch, int(order[place % self.length]), size))
            yield from (wanted[start : start + part] for start in range(0, share, part))
            position += self.batch_size


class TrainingBatches:
    """Endless steps; each is the list of this process's `accumulate` batches."""

    def __init__(self, samples: TrainingSamples, stream: SampleStream, workers: int):
        self.accumulate = stream.accumulate
        self._loader = _loader(samples, workers, stream, _pack_or_error)

    def __iter__(self) -> Iterator[list[Batch]]:
        """The steps from the stream's `start_step` on."""
        batches = map(_unpack, map(_received, self._loader))
        while True:
            yield [next(batches) for _ in range(self.accumulate)]


class EvaluationImages:
    """Every image of this process's share once, in order; can be gone through again and again.

    Attributes:
        annotated: the split.
        categories: what the targets' labels mean.
    """

    def __init__(self, samples: EvaluationSamples, count: int, workers: int, rank: int, world: int):
        """Divide the first `count` images: process r takes the images r, r + world, r + 2 world, ..."""
        self.annotated, self.categories = samples.annotated, samples.annotated.categories
        self._share = range(rank, count, world)
        self._loader = _loader(samples, workers, [[index] for index in self._share], _alone)

    def __len__(self) -> int:
        return len(self._share)

    def __iter__(self) -> Iterator[EvaluationSample]:
        """The images."""
        return map(_received, self._loader)


def collate(samples: Sequence[Sample], crop: tuple[int, int], size_divisor: int = 32) -> Batch:
    """One batch, padded right and bottom to the crop, or further if a sample is larger, in multiples of `size_divisor`.

    The reference pads every training sample to the whole crop. Padding is seen by the network, so this also makes a
    sample's losses independent of what it is batched with.

    Args:
        samples: at least one.
        crop: (height, width) that images are at least padded to, and their id maps with them, with pixels of no object.
        size_divisor: in pixels.
    """
    return _unpack(_pack(samples, crop, size_divisor))


class _Packed(NamedTuple):
    """A batch on its way between processes: three tensors in all.

    Each tensor sent takes a file descriptor; a batch of 16 targets with three tensors each would soon pass the limit
    of 1024 that most systems set.
    """

    images: torch.Tensor
    padding: torch.Tensor
    ids: torch.Tensor  # all id maps one behind the other
    shapes: list[tuple[int, ...]]
    labels: list[np.ndarray]
    is_crowd: list[np.ndarray]
    targets: list[dict]
    keys: list[tuple[int, int]]
    paths: list[str]


def _pack(samples: Sequence[Sample], crop: tuple[int, int], size_divisor: int = 32) -> _Packed:
    sizes = [sample.image.shape[1:] for sample in samples]
    sides = zip(*sizes, crop, strict=True)
    height, width = (-(-max(lengths) // size_divisor) * size_divisor for lengths in sides)
    images = torch.zeros(len(samples), len(samples[0].image), height, width, dtype=samples[0].image.dtype)
    padding = torch.ones(len(samples), height, width, dtype=torch.bool)
    shapes = []
    for i, (sample, (h, w)) in enumerate(zip(samples, sizes, strict=True)):
        images[i, :, :h, :w] = sample.image
        padding[i, :h, :w] = False
        shapes.append((len(sample.target.id_maps), height, width))
    ids = torch.zeros(sum(int(np.prod(shape)) for shape in shapes), dtype=torch.int32)
    for maps, view in zip((sample.target.id_maps for sample in samples), _views(ids, shapes), strict=True):
        view[:, : maps.shape[1], : maps.shape[2]] = maps
    targets = [sample.target for sample in samples]
    rest = ("image_id", "original_size", "areas", "boxes", "void")
    return _Packed(
        images,
        padding,
        ids,
        shapes,
        [target.labels.numpy() for target in targets],
        [target.is_crowd.numpy() for target in targets],
        [{name: getattr(target, name) for name in rest} for target in targets],
        [sample.key for sample in samples],
        [sample.path for sample in samples],
    )


def _unpack(packed: _Packed) -> Batch:
    targets = [
        Target(id_maps=maps, labels=torch.from_numpy(labels), is_crowd=torch.from_numpy(is_crowd), **rest)
        for maps, labels, is_crowd, rest in zip(
            _views(packed.ids, packed.shapes), packed.labels, packed.is_crowd, packed.targets, strict=True
        )
    ]
    return Batch(packed.images, packed.padding, targets, packed.keys, packed.paths)


def _views(ids: torch.Tensor, shapes: list[tuple[int, ...]]) -> list[torch.Tensor]:
    parts = ids.split([int(np.prod(shape)) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


class _Guarded(Dataset):
    """Samples, or the user's error in place of one, so that it crosses from a worker without a foreign traceback."""

    def __init__(self, samples: Dataset):
        self.samples = samples

    def __getitem__(self, index) -> Sample | EvaluationSample | MaskwrightError:
        try:
            return self.samples[index]
        except MaskwrightError as error:
            return error


def _pack_or_error(samples: list[Sample | MaskwrightError]) -> _Packed | MaskwrightError:
    whole: list[Sample] = []
    for sample in samples:
        if isinstance(sample, MaskwrightError):
            return sample
        whole.append(sample)
    return _pack(whole, whole[0].crop)


def _alone(samples: list[Received | MaskwrightError]) -> Received | MaskwrightError:
    (sample,) = samples
    return sample


def _received(item: Received | MaskwrightError) -> Received:
    if isinstance(item, MaskwrightError):
        try:
            raise item
        finally:
            del item  # else error and frame hold each other, and with them the workers, until they time out (10 s)
    return item


def _outlive_sigterm(worker: int) -> None:
    """Schedulers send SIGTERM to all processes of a run: the main one then ends the workers, once it has saved."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _end_workers(reference: weakref.ref[DataLoader]) -> None:
    """At exit multiprocessing sends SIGTERM, which workers outlive, and waits for them: so they are ended before."""
    iterator = getattr(reference(), "_iterator", None)
    if iterator is not None:
        iterator._shutdown_workers()


def _loader(samples: Dataset, workers: int, batch_sampler: Iterable, collate_fn: Callable) -> DataLoader:
    """A loader that draws nothing from the global random state.

    Workers are forked where that is usual, so a script needs no main guard; they use numpy, Pillow and one thread of
    torch, none of which waits for a thread of the parent.
    """
    loader = DataLoader(
        _Guarded(samples),
        batch_sampler=batch_sampler,
        num_workers=workers,
        collate_fn=collate_fn,
        persistent_workers=workers > 0,
        worker_init_fn=_outlive_sigterm,
        generator=torch.Generator(),
        multiprocessing_context="fork" if workers > 0 and sys.platform == "linux" else None,
    )
    if workers:
        atexit.register(_end_workers, weakref.ref(loader))
    return loader
