"""Blocks of a resized mask: their pixels are those of `interpolate`, and none is outside its bounds."""

import pytest
import torch
import torch.nn.functional as F

from maskwright.inference import blockwise_upsampling
from maskwright.inference.blockwise_upsampling import SIDE, BlockMasks, make_axis, mask_bands

# coarse cells, padded, inner and output pixels of one dimension
LENGTHS = {
    "upsampled by four": (16, 64, 64, 64),
    "padding cropped": (16, 64, 51, 51),
    "enlarged": (16, 64, 61, 131),
    "made smaller": (24, 96, 90, 37),
    "much smaller than the map": (40, 160, 160, 9),
    "one pixel": (8, 32, 1, 1),
}


def whole(maps: torch.Tensor, rows: tuple, columns: tuple, flipped: bool, at_input: bool) -> torch.Tensor:
    """(N, H, W): by interpolation of everything; at the network's input if `at_input`."""
    padded = F.interpolate(maps[None], (rows[1], columns[1]), mode="bilinear", align_corners=False)[0]
    inner = padded[:, : rows[2], : columns[2]]
    inner = inner.flip(-1) if flipped else inner
    if at_input:
        return inner
    return F.interpolate(inner[None], (rows[3], columns[3]), mode="bilinear", align_corners=False)[0]


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("columns", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("rows", LENGTHS.values(), ids=LENGTHS.keys())
def test_pixels_are_those_of_interpolation_and_keep_within_the_bounds(rows, columns, flipped):
    maps = torch.randn(3, rows[0], columns[0], generator=torch.Generator().manual_seed(0)) * 10
    expected = whole(maps, rows, columns, flipped, at_input=False)
    masks = BlockMasks([maps], make_axis(*rows, False, False), [make_axis(*columns, flipped, False)])
    values = masks.all_logits(masks.every_block())
    lowest, highest = values.amin(2).T, values.amax(2).T
    assert (lowest >= masks.lower_bound() - 1e-4).all()
    assert (highest <= masks.upper_bound() + 1e-4).all()
    torch.testing.assert_close(masks.join(values.unflatten(2, (SIDE, SIDE))), expected, rtol=0, atol=2e-4)
    blocks, queries = torch.ones(len(values), 3).nonzero().T
    torch.testing.assert_close(masks.logits(blocks, queries).flatten(1), values.flatten(0, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_values_changed_at_the_input_are_resized_to_the_output(lengths):
    maps = torch.randn(2, lengths[0], lengths[0], generator=torch.Generator().manual_seed(1))
    inner = whole(maps, lengths, lengths, False, at_input=True).sigmoid()
    expected = F.interpolate(inner[None], (lengths[3], lengths[3]), mode="bilinear", align_corners=False)[0]
    place = make_axis(*lengths, False, True)
    masks = BlockMasks([maps], place, [place])
    blocks = masks.every_block()
    found = masks.join(masks.to_output(blocks, masks.all_logits(blocks).sigmoid()))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("at_once", [1, 40, 1024], ids="{} columns of a product".format)
def test_bands_are_the_whole(monkeypatch, at_once):
    monkeypatch.setattr(blockwise_upsampling, "COLUMNS", at_once)
    place = make_axis(16, 64, 61, 61, False, False)
    embeddings, features = torch.randn(2, 3), torch.randn(3, 16, 16)
    maps = torch.einsum("nc,chw->nhw", embeddings, features)
    masks = BlockMasks([maps], place, [place])
    every = masks.all_logits(masks.every_block()).unflatten(2, (SIDE, SIDE))
    parts, rows, areas = [], [], []
    for part, band in mask_bands([embeddings], [features], place, [place], 1):
        parts.append(band.join(band.all_logits(band.every_block()).unflatten(2, (SIDE, SIDE))))
        rows += range(61)[part]
        areas.append(band.areas().sum().item())
    assert len(parts) == 8
    torch.testing.assert_close(torch.cat(parts, 1), masks.join(every), rtol=0, atol=1e-5)
    assert rows == list(range(61))
    assert areas == [8 * 61] * 7 + [5 * 61]
