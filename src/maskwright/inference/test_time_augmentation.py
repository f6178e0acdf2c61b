"""What a model's prediction says about one view of an image, and how several views become one.

A view is the image at some size, flipped or not. Everything is resized bilinearly twice, to the padded input and, after
cropping the padding, to the image's own size, as the original does. Unusual: masks are made by blocks of pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from maskwright.inference.mask_upsampling import SIDE, BlockMasks, axis, bands
from maskwright.structures.predictions import MaskPrediction, PixelPrediction

GROUP_VALUES = 16_000_000  # floats held at once
_SAME_MASK = 0.5  # IoU above which queries of two views mean one object


class View(NamedTuple):
    """A prediction, and which view of the image it is for.

    Attributes:
        prediction: of one picture alone (B = 1).
        padded_size: (height, width) of the network's input.
        input_size: of the picture inside it.
        flipped: whether left and right of the image were exchanged.
    """

    prediction: MaskPrediction | PixelPrediction
    padded_size: tuple[int, int]
    input_size: tuple[int, int]
    flipped: bool = False


class ClassScores(NamedTuple):
    """How well each class fits each place of a view.

    Attributes:
        values: (K, h, w).
        are_logits: whether a softmax over K is still to come, after resizing; else scores that may be averaged as they
            are.
        padded_size: what they are resized to first,
        input_size: then cropped to; both are their own size where they are at the input or the output already.
        flipped: as in `View`.
    """

    values: Tensor
    are_logits: bool
    padded_size: tuple[int, int]
    input_size: tuple[int, int]
    flipped: bool = False

    def at_input(self) -> Tensor:
        """(K, H, W) at the size of the picture that the network saw; a flipped view stays flipped."""
        return _to_input(self.values, self)

    def at_output(self, output_size: tuple[int, int]) -> Iterator[Tensor]:
        """(n, H, W), a few classes at a time; a flipped view stays flipped."""
        few = max(1, GROUP_VALUES // (output_size[0] * output_size[1]))
        return (_resize(_to_input(part, self), output_size) for part in self.values.split(few))


def class_scores(view: View | ClassScores, output_size: tuple[int, int] | None = None) -> ClassScores:
    """The class scores of a view.

    Args:
        view: given back where it is scores already. With masks, the score of a class is the sum over queries of class
            probability times mask probability.
        output_size: where the masks are resized before they are combined; None combines at the network's input, and the
            scores are to be resized. A per-pixel prediction is always resized itself.
    """
    if isinstance(view, ClassScores):
        return view
    prediction = view.prediction
    if isinstance(prediction, PixelPrediction):
        return ClassScores(prediction.class_logits[0].float(), True, *view[1:])
    size = output_size or view.input_size
    objects = Objects([view], size)
    probabilities = objects.probabilities[:, :-1].T
    scores = probabilities.new_zeros(len(probabilities), *size)
    every = torch.arange(probabilities.shape[1], device=scores.device)
    for rows, band in objects.bands(every, GROUP_VALUES):
        inside = band.middle_of_all(band.every_block()).sigmoid_().transpose(0, 1)  # (Q, blocks, SIDE * SIDE)
        fits = probabilities @ inside.flatten(1)  # (K, blocks * SIDE * SIDE)
        scores[:, rows] = band.whole(fits.unflatten(1, (-1, SIDE, SIDE)).transpose(0, 1))
    return ClassScores(scores, False, size, size)


def mean_scores(views: Iterable[ClassScores], output_size: tuple[int, int]) -> Tensor:
    """(K, H, W) at the output size: the mean over at least one view of its scores, or of its class probabilities.

    Original: `test_time_augmentation.py`; mmseg's `aug_test` for logits.
    """
    views = iter(views)
    total = _upright_scores(next(views), output_size)
    count = 1
    for view in views:
        total += _upright_scores(view, output_size)
        count += 1
    return total.div_(count)


def _upright_scores(view: ClassScores, output_size: tuple[int, int]) -> Tensor:
    scores = torch.cat(list(view.at_output(output_size)))
    if view.are_logits:
        for rows in scores.split(max(1, GROUP_VALUES // (len(scores) * output_size[1])), dim=1):
            rows.copy_(rows.softmax(0))
    return scores.flip(-1) if view.flipped else scores


class Objects:
    """What the queries of one view, or of an image and its flip, found; masks are made group by group.

    Queries of two views are assigned to each other one to one, by the IoU of their masks and the agreement of their
    classes. A pair whose masks overlap by more than one half is one object: its class probabilities are the mean, its
    mask the mean of both logits. A query without such a partner keeps its mask, and its class probabilities are
    averaged with "no object", which is what the other view says there.

    Attributes:
        probabilities: (N, K+1).
    """

    def __init__(self, views: Sequence[View], output_size: tuple[int, int]) -> None:
        self.views, self.output_size = views, output_size
        predictions = [view.prediction for view in views if isinstance(view.prediction, MaskPrediction)]
        if len(predictions) < len(views):
            raise ValueError("a per-pixel prediction has no masks, so it gives no objects")
        self.embeddings = [prediction.mask_embeddings[0].float() for prediction in predictions]  # (Q, C) each
        self.features = [prediction.mask_features[0].float() for prediction in predictions]  # (C, h, w) each
        probabilities = [prediction.class_logits[0].float().softmax(-1) for prediction in predictions]
        if len(views) == 1:
            (self.probabilities,) = probabilities
            return
        from scipy.optimize import linear_sum_assignment  # takes 0.3 s to import, and one view needs none of it

        iou = self._overlap()
        rows, columns = linear_sum_assignment((iou + probabilities[0] @ probabilities[1].T).cpu().numpy(), True)
        rows, columns = (torch.from_numpy(numbers).to(iou.device) for numbers in (rows, columns))
        same = iou[rows, columns] > _SAME_MASK
        alone = rows.new_full((int((~same).sum()),), -1)
        self.partners = torch.stack(  # (2, N) queries of each view, -1 for none
            [torch.cat([rows[same], rows[~same], alone]), torch.cat([columns[same], alone, columns[~same]])]
        )
        no_object = torch.eye(probabilities[0].shape[1], device=iou.device)[-1]
        known = [
            torch.where((queries >= 0)[:, None], values[queries], no_object)
            for values, queries in zip(probabilities, self.partners, strict=True)
        ]
        self.probabilities = (known[0] + known[1]) / 2

    def _overlap(self) -> Tensor:
        """(Q, Q) IoU of the masks of two views, of which the second is flipped, at the cells of the first."""
        view, (first, second) = self.views[0], self.features
        cell = view.padded_size[1] / first.shape[2]  # width in pixels
        rows = max(1, round(view.input_size[0] / view.padded_size[0] * first.shape[1]))
        columns = max(1, round(view.input_size[1] / cell))
        place = (view.input_size[1] / cell - 1 - torch.arange(columns, device=first.device)).clamp_min(0)
        left = place.long().clamp_max(second.shape[2] - 2)
        second = torch.lerp(second[:, :rows, left], second[:, :rows, left + 1], place - left)
        inside, other = (
            (embeddings @ features.flatten(1) > 0).float()
            for embeddings, features in zip(self.embeddings, (first[:, :rows, :columns], second), strict=True)
        )
        common = inside @ other.T
        return common / (inside.sum(1)[:, None] + other.sum(1) - common).clamp_min(1)

    def bands(self, objects: Tensor, values: int, *, middle: bool = False) -> Iterator[tuple[slice, BlockMasks]]:
        """Mask logits of some objects at the output size, in horizontal bands, and the output rows of each.

        Args:
            objects: (n,) numbers of them.
            values: about how many pixels the masks of one band have together.
            middle: whether something is done to them at the network's input, before they are resized to the output.
        """
        first, device = self.views[0], objects.device
        height, width = self.output_size
        rows = axis(self.features[0].shape[1], first.padded_size[0], first.input_size[0], height, False, middle, device)
        columns = []
        for view, features in zip(self.views, self.features, strict=True):
            sizes = features.shape[2], view.padded_size[1], view.input_size[1], width
            columns.append(axis(*sizes, view.flipped, middle, device))
        return bands(self._shared(objects), self.features, rows, columns, values)

    def _shared(self, objects: Tensor) -> list[Tensor]:
        """(n, C) for each view: embeddings, of which the masks are summed; zero for an object that a view has not."""
        if len(self.views) == 1:
            return [self.embeddings[0][objects]]
        partners = self.partners[:, objects]  # (2, n)
        shares = (partners >= 0) / (partners >= 0).sum(0)
        return [
            embeddings[queries.clamp_min(0)] * share[:, None]
            for embeddings, queries, share in zip(self.embeddings, partners, shares, strict=True)
        ]


def _to_input(maps: Tensor, view: View | ClassScores) -> Tensor:
    """(N, h, w) resized to the padded input, and the padding cropped."""
    return _resize(maps, view.padded_size)[:, : view.input_size[0], : view.input_size[1]]


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, H, W) to (N, *size), bilinear, align_corners=False."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]
