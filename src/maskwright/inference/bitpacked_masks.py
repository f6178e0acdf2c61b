"""Masks of instances as bits, until it is known which are kept and in which order.

Only those blocks of pixels are held in which an object has any, at an eighth of what their pixels take, and each mask
is then written once, into memory that the system clears. So neither is a second set of whole masks ever made, nor is
one looked at where it has nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from maskwright.inference.mask_upsampling import SIDE, BlockMasks, pieces


class BitBlocks:
    """The pixels of N objects that have a logit above zero.

    Args:
        bands: the logits of all objects, from top to bottom, and the output rows of each band.
        count: N; for none the bands are not looked at.
        size: (height, width) of the output.
    """

    def __init__(self, bands: Iterable[tuple[slice, BlockMasks]], count: int, size: tuple[int, int]) -> None:
        self.size, self.count = size, count
        objects, blocks = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        bits, sums = [np.zeros((0, SIDE), np.uint8)], [np.zeros((2, 0), np.float32)]
        for rows, band in bands if count else ():
            first = rows.start // SIDE * band.blocks[1]
            for some, places in pieces(band.largest() > 0):
                objects.append(some.cpu().numpy())
                blocks.append(places.cpu().numpy() + first)
                for parts, part in zip((bits, sums), _bits_and_sums(band, places, some), strict=True):
                    parts.append(part.cpu().numpy())
        numbers = np.concatenate(objects)
        order = np.argsort(numbers, kind="stable")  # the blocks of an object go on ascending
        self.blocks, self.bits = np.concatenate(blocks)[order], np.concatenate(bits)[order]
        self.first = np.searchsorted(numbers[order], np.arange(count + 1))
        self.sums = np.stack([np.bincount(numbers, part, count) for part in np.concatenate(sums, 1)])

    def quality(self) -> np.ndarray:
        """(N,) float32 mean probability inside each mask; 0 for an empty one."""
        return (self.sums[0] / (self.sums[1] + 1e-6)).astype(np.float32)

    def masks(self, numbers: np.ndarray) -> np.ndarray:
        """(n, H, W) bool: the masks of n of the objects, each as often as its number is asked for."""
        height, width = self.size
        masks = np.zeros((len(numbers), height, width), dtype=bool)
        for number in np.unique(numbers):
            part = slice(self.first[number], self.first[number + 1])
            if part.start == part.stop:
                continue
            rows, columns = np.divmod(self.blocks[part], -(-width // SIDE))
            top, left = rows[0], columns.min()
            bits = np.zeros((rows[-1] + 1 - top, SIDE, columns.max() + 1 - left), dtype=np.uint8)
            bits[rows - top, :, columns - left] = self.bits[part]
            top, left = top * SIDE, left * SIDE
            inside = np.unpackbits(bits.reshape(-1, bits.shape[2]), axis=1)[: height - top, : width - left]
            for place in np.flatnonzero(numbers == number):
                masks[place, top : top + len(inside), left : left + inside.shape[1]] = inside
        return masks


def _bits_and_sums(band: BlockMasks, blocks: Tensor, objects: Tensor) -> tuple[Tensor, Tensor]:
    """Of P pairs the pixels inside the mask.

    Returns:
        (P, SIDE) uint8, a row of a block each, with its first pixel in the highest bit; and (2, P) the sum of their
        probabilities, and how many they are.
    """
    logits = band.middle(blocks, objects)
    inside = band.clip_(logits.sign().relu_(), blocks)  # ones and zeros; floats take a third of the time of bools
    probabilities = logits.sigmoid_().mul_(inside)
    sums = torch.stack([probabilities.sum((1, 2)), inside.sum((1, 2))])
    columns = inside.unbind(2)
    bits = columns[0].clone()
    for column in columns[1:]:
        bits.mul_(2).add_(column)
    return bits.to(torch.uint8), sums
