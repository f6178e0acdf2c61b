"""Semantic FPN: the decoder against a plain formula, and prediction."""

import pytest
import torch
import torch.nn.functional as F

from maskwright.config.schema import EvaluateConfig, ModelConfig
from maskwright.errors import MaskwrightError
from maskwright.inference.mask_upsampling import CropPrediction
from maskwright.inference.predictor import Predictor
from maskwright.inference.segment import segment
from maskwright.models import build_model
from maskwright.structures.annotations import Category
from maskwright.structures.predictions import PixelPrediction

CLASSES = tuple(Category(number, f"class {number}", True, (0, 0, 0)) for number in range(5))
SWIN = {
    "backbone": "swin_tiny_patch4_window7_224",
    "backbone_options": {"embed_dim": 24, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8]},
}


def tiny(**changes):
    torch.manual_seed(0)
    model = build_model(ModelConfig(**{"family": "semantic_fpn", "hidden_dim": 32, **SWIN, **changes}), CLASSES).eval()
    model.evaluate_config = EvaluateConfig(task="semantic")
    return model


@torch.no_grad()
def test_the_decoder_upsamples_each_level_in_steps_and_adds_all():
    model = tiny()
    for buffer in model.decoder.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    sizes = {4: (15, 19), 8: (8, 10), 16: (4, 5), 32: (2, 3)}
    features = {stride: torch.randn(2, model.backbone.channels[stride], *size) for stride, size in sizes.items()}
    total = 0
    for index, (level, x) in enumerate(zip(model.decoder.levels, features.values(), strict=True)):
        for block in level:
            norm = block.norm
            x = F.conv2d(x, block.conv.weight, padding=1)
            x = (x - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + norm.eps).sqrt()
            x = (x * norm.weight[:, None, None] + norm.bias[:, None, None]).relu()
            if index:
                x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        total = total + F.interpolate(x, sizes[4], mode="bilinear", align_corners=False)
    classifier = model.decoder.classifier
    expected = torch.einsum("kc,bchw->bkhw", classifier.weight[:, :, 0, 0], total) + classifier.bias[:, None, None]
    torch.testing.assert_close(model.decoder(features), expected, rtol=1e-4, atol=1e-5)
    assert [len(level) for level in model.decoder.levels] == [1, 1, 2, 3]


def test_a_swin_takes_images_of_any_size_without_padding():
    model = tiny()
    assert model.size_divisor == 1
    result = Predictor(model, device="cpu")(torch.randint(0, 256, (3, 61, 83), dtype=torch.uint8))
    assert result.size == (61, 83)
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 61, 83)).final.class_logits.shape == (1, 5, 16, 21)


def test_images_for_other_backbones_are_padded():
    model = tiny(backbone="test_resnet", backbone_options={})
    assert model.size_divisor == 32
    result = Predictor(model, device="cpu")(torch.randint(0, 256, (3, 61, 83), dtype=torch.uint8))
    assert result.size == (61, 83)


@torch.no_grad()
def test_the_label_is_the_largest_logit_after_two_resizes(monkeypatch):
    logits = torch.randn(1, 5, 8, 12, generator=torch.Generator().manual_seed(1))
    resized = F.interpolate(logits, (32, 48), mode="bilinear", align_corners=False)[:, :, :30, :41]
    expected = F.interpolate(resized, (45, 67), mode="bilinear", align_corners=False)[0].argmax(0)
    for group_values in (16_000_000, 45 * 67 * 2, 1):  # all classes, two, and one at a time
        monkeypatch.setattr("maskwright.inference.mask_upsampling.SCORE_VALUES", group_values)
        result = segment(
            [CropPrediction(PixelPrediction(logits), (32, 48), (30, 41))],
            "semantic",
            output_size=(45, 67),
            categories=CLASSES,
            config=EvaluateConfig(task="semantic"),
        )
        assert (torch.from_numpy(result.label_map) == expected).all()
        assert result.labels.tolist() == sorted(set(expected.flatten().tolist()))


@pytest.mark.parametrize("task", ["instance", "panoptic"])
def test_tasks_that_need_masks_are_refused_in_one_line(task):
    predictor = Predictor(tiny(), device="cpu")
    with pytest.raises(MaskwrightError, match=f"cannot do task {task}; use task semantic$") as error:
        predictor(torch.zeros(3, 32, 32, dtype=torch.uint8), task=task)
    assert "\n" not in str(error.value)


def test_one_image_of_a_batch():
    prediction = PixelPrediction(torch.arange(24.0).view(2, 3, 2, 2))
    assert prediction.image(1).class_logits.flatten().tolist() == list(range(12, 24))
