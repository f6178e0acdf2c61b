"""Feature-aligned pixel decoders; deformable convolution against nested loops and torchvision."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import deform_conv2d

from maskwright.models import fapn_pixel_decoder
from maskwright.models.fapn_pixel_decoder import AlignedPixelDecoder, FeatureAlignment, deformable_convolution
from maskwright.models.pixel_decoder import PixelDecoder

CHANNELS = {4: 12, 8: 16, 16: 20, 32: 24}
SIZES = {4: (14, 18), 8: (7, 9), 16: (4, 5), 32: (2, 3)}
HIDDEN_DIM = 32


def inputs(channels=8, outputs=6, groups=4, size=(5, 7), spread=2.0):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator) * scale

    features = normal(2, channels, *size)
    offsets = normal(2, groups * 9 * 2, *size, scale=spread)
    modulation = normal(2, groups * 9, *size).sigmoid()
    return features, offsets, modulation, normal(outputs, channels, 3, 3, scale=0.2), normal(outputs)


def by_loops(features, offsets, modulation, weight, bias):
    """Sum one sample at a time."""
    batch, channels, h, w = features.shape
    groups = modulation.shape[1] // 9
    each = channels // groups
    result = bias[None, :, None, None].repeat(batch, 1, h, w).double()

    def pixel(image, channel, y, x):
        return features[image, channel, y, x].item() if 0 <= y < h and 0 <= x < w else 0.0

    for image, row, column, channel, tap in itertools.product(
        range(batch), range(h), range(w), range(channels), range(9)
    ):
        sample = channel // each * 9 + tap
        y = row + tap // 3 - 1 + offsets[image, 2 * sample, row, column].item()
        x = column + tap % 3 - 1 + offsets[image, 2 * sample + 1, row, column].item()
        top, left = math.floor(y), math.floor(x)
        value = sum(
            pixel(image, channel, top + i, left + j) * (1 - abs(y - top - i)) * (1 - abs(x - left - j))
            for i in (0, 1)
            for j in (0, 1)
        )
        value *= modulation[image, sample, row, column].item()
        result[image, :, row, column] += weight[:, channel, tap // 3, tap % 3].double() * value
    return result.float()


def test_deformable_convolution_equals_nested_loops():
    arguments = inputs(channels=4, groups=2, size=(4, 5))
    torch.testing.assert_close(deformable_convolution(*arguments), by_loops(*arguments), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spread", [0.3, 2.0, 50.0])
@pytest.mark.parametrize("chunk", [32768, 10])
def test_deformable_convolution_and_all_its_gradients_equal_torchvisions(spread, chunk, monkeypatch):
    monkeypatch.setattr(fapn_pixel_decoder, "_CHUNK", chunk)
    ours, theirs = ([tensor.clone().requires_grad_() for tensor in inputs(spread=spread)] for _ in range(2))
    features, offsets, modulation, weight, bias = theirs
    expected = deform_conv2d(features, offsets, weight, bias, padding=1, mask=modulation)
    found = deformable_convolution(*ours)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(3))
    found.backward(upstream)
    expected.backward(upstream)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-4)


def test_without_offsets_it_is_a_convolution():
    features, offsets, modulation, weight, bias = inputs()
    found = deformable_convolution(features, torch.zeros_like(offsets), torch.ones_like(modulation), weight, bias)
    torch.testing.assert_close(found, F.conv2d(features, weight, bias, padding=1), rtol=1e-4, atol=1e-5)


def random_weights(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(2)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim == 1 else (2 / parameter[0].numel()) ** 0.5)
    return module.eval()


def plain_alignment(align: FeatureAlignment, fine, coarse, norm):
    """Compute the alignment step by step with torchvision's operator."""
    moved = F.group_norm(F.conv2d(torch.cat([fine, 2 * coarse], 1), align.difference.weight), 32, *norm.parameters())
    places = F.conv2d(moved, align.places.weight, align.places.bias, padding=1)
    offsets, modulation = places[:, :144], places[:, 144:].sigmoid()
    weight, bias = align.sampled.weight, align.sampled.bias
    return deform_conv2d(coarse, offsets, weight, bias, padding=1, mask=modulation).relu() + fine


def conv_norm(block, x, relu):
    x = F.group_norm(F.conv2d(x, block.conv.weight, padding=block.conv.padding), 32, *block.norm.parameters())
    return x.relu() if relu else x


@torch.no_grad()
def test_fapn_merges_levels_from_coarse_to_fine_after_aligning_them():
    decoder = random_weights(AlignedPixelDecoder(CHANNELS, hidden_dim=HIDDEN_DIM, mask_dim=40))
    features = {stride: torch.randn(2, CHANNELS[stride], *SIZES[stride]) for stride in CHANNELS}
    levels, mask_features = decoder(features)
    y = conv_norm(decoder.coarsest, features[32], True)
    expected = [y]
    for step, stride in enumerate((16, 8, 4)):
        fine = conv_norm(decoder.laterals[step], features[stride], False)
        coarse = fine + F.interpolate(y, SIZES[stride], mode="nearest")
        smooth = decoder.smooths[step]
        y = conv_norm(smooth, plain_alignment(decoder.alignments[step], fine, coarse, smooth.norm), True)
        expected.append(y)
    for level, other in zip(levels, expected[:3], strict=True):
        torch.testing.assert_close(level, other, rtol=1e-4, atol=1e-4)
    projection = decoder.mask_projection
    expected_masks = F.conv2d(y, projection.weight, projection.bias, padding=1)
    torch.testing.assert_close(mask_features, expected_masks, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_msfapn_aligns_only_in_the_last_step_of_the_deformable_decoder():
    settings = {
        "hidden_dim": HIDDEN_DIM,
        "mask_dim": HIDDEN_DIM,
        "num_heads": 4,
        "num_points": 2,
        "num_layers": 1,
        "feedforward_dim": 16,
    }
    decoder = random_weights(PixelDecoder(CHANNELS, **settings, alignment=FeatureAlignment(HIDDEN_DIM)))
    features = {stride: torch.randn(1, CHANNELS[stride], *SIZES[stride]) for stride in CHANNELS}
    levels, mask_features = decoder(features)
    fine = conv_norm(decoder.lateral, features[4], False)
    coarse = fine + F.interpolate(levels[-1], SIZES[4], mode="bilinear", align_corners=False)
    y = conv_norm(decoder.smooth, plain_alignment(decoder.alignment, fine, coarse, decoder.smooth.norm), True)
    expected = F.conv2d(y, decoder.mask_projection.weight, decoder.mask_projection.bias)
    torch.testing.assert_close(mask_features, expected, rtol=1e-4, atol=1e-4)
    plain = PixelDecoder(CHANNELS, **settings)
    missing, unexpected = plain.load_state_dict(decoder.state_dict(), strict=False)
    assert not missing
    assert all(key.startswith("alignment.") for key in unexpected)
    for level, other in zip(plain.eval()(features)[0], levels, strict=True):
        torch.testing.assert_close(level, other)


def test_an_alignment_starts_as_half_a_convolution_and_computes_in_float32_under_autocast():
    align, norm = FeatureAlignment(HIDDEN_DIM), torch.nn.GroupNorm(32, HIDDEN_DIM)
    fine, coarse = torch.randn(1, HIDDEN_DIM, 6, 6), torch.randn(1, HIDDEN_DIM, 6, 6)
    regular = F.conv2d(coarse, align.sampled.weight, padding=1) / 2  # no offset yet; the modulation is sigmoid(0)
    torch.testing.assert_close(align(fine, coarse, norm), regular.relu() + fine, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        found = align(fine, coarse, norm)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, regular.relu() + fine, rtol=1e-4, atol=1e-5)
