"""Instance masks packed into bits until it is known which are kept, and in which order.

Only the blocks in which an instance has pixels are held, with one bit per pixel, and each mask is written once, into
zeroed memory. So no second set of whole masks exists, and no mask is processed where it is empty.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from maskwright.inference.blockwise_upsampling import SIDE, BlockMasks, pairs_in_chunks


class BitpackedMasks:
    """N masks: the pixels whose logit is above zero.

    Args:
        bands: the logits of all masks, from top to bottom, with the output rows of each band.
        count: N; the bands of zero masks are not read.
        size: (height, width) of the output.
    """

    def __init__(self, bands: Iterable[tuple[slice, BlockMasks]], count: int, size: tuple[int, int]) -> None:
        self.size, self.count = size, count
        queries, blocks = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        bits, sums = [np.zeros((0, SIDE), np.uint8)], [np.zeros((2, 0), np.float32)]
        for rows, masks in bands if count else ():
            first_block = rows.start // SIDE * masks.blocks[1]
            for chunk_queries, chunk_blocks in pairs_in_chunks(masks.upper_bound() > 0):
                queries.append(chunk_queries.numpy())
                blocks.append(chunk_blocks.numpy() + first_block)
                chunk_bits, chunk_sums = _bits_and_sums(masks, chunk_blocks, chunk_queries)
                bits.append(chunk_bits.numpy())
                sums.append(chunk_sums.numpy())
        numbers = np.concatenate(queries)
        order = np.argsort(numbers, kind="stable")  # the blocks of a mask stay in ascending order
        self.blocks, self.bits = np.concatenate(blocks)[order], np.concatenate(bits)[order]
        self.first = np.searchsorted(numbers[order], np.arange(count + 1))
        self.sums = np.stack([np.bincount(numbers, part, count) for part in np.concatenate(sums, 1)])

    def quality(self) -> np.ndarray:
        """Return (N,) float32, the mean probability inside each mask; 0 for an empty mask."""
        return (self.sums[0] / (self.sums[1] + 1e-6)).astype(np.float32)

    def unpack(self, numbers: np.ndarray) -> np.ndarray:
        """Return the masks (n, H, W) bool with the given numbers (n,), which may repeat."""
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


def _bits_and_sums(masks: BlockMasks, blocks: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Return the pixels inside the masks of P pairs of a block and a query.

    Returns:
        (P, SIDE) uint8, one byte for each row of a block with its first pixel in the highest bit; and (2, P), the sum
        of the probabilities of these pixels, and their number.
    """
    logits = masks.logits(blocks, queries)
    inside = masks.clip_(logits.sign().relu_(), blocks)  # ones and zeros; floats take a third of the time of bools
    probabilities = logits.sigmoid_().mul_(inside)
    sums = torch.stack([probabilities.sum((1, 2)), inside.sum((1, 2))])
    columns = inside.unbind(2)
    bits = columns[0].clone()
    for column in columns[1:]:
        bits.mul_(2).add_(column)
    return bits.to(torch.uint8), sums
