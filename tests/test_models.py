"""Models: building, refused settings, the contract of a forward pass, norms, gradients and state."""

import copy
import io

import pytest
import timm
import torch
from timm.layers import FrozenBatchNormAct2d
from torch import Tensor, nn

from maskwright.config.schema import ModelConfig
from maskwright.errors import RecipeError
from maskwright.models import build_model, pixel_decoder, segmenter
from maskwright.models.backbones.base import FrozenBatchNorm
from maskwright.models.backbones.build import build_backbone
from maskwright.models.layers import sine_positions
from maskwright.structures.annotations import Category, Target
from maskwright.structures.predictions import ModelOutput
from maskwright.training.losses.criterion import Criterion
from maskwright.training.losses.point_sampling import RandomPoints

SMALL_SWIN = {"embed_dim": 24, "depths": [2, 1, 2, 1], "num_heads": [1, 2, 3, 4]}


def categories(count: int) -> tuple[Category, ...]:
    return tuple(Category(number, f"class {number}", True, (0, 0, 0)) for number in range(count))


def tiny(backbone: str = "resnet18", num_classes: int = 3, **changes: object) -> nn.Module:
    sizes = {
        "num_queries": 5,
        "hidden_dim": 32,
        "num_heads": 4,
        "deformable_points": 2,
        "pixel_decoder_layers": 1,
        "pixel_decoder_feedforward_dim": 48,
        "masked_decoder_layers": 3,
        "masked_decoder_feedforward_dim": 48,
    }
    torch.manual_seed(0)
    return build_model(ModelConfig(backbone=backbone, **(sizes | changes)), categories(num_classes))


def images_of(count: int = 1, height: int = 64, width: int = 96) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def tensors(output: ModelOutput) -> list[Tensor]:
    return [t for p in (*output.intermediate, output.final) for t in (p.class_logits, p.mask_embeddings)] + [
        output.final.mask_features
    ]


def assert_same(first: ModelOutput, second: ModelOutput, **tolerance: float) -> None:
    for ours, theirs in zip(tensors(first), tensors(second), strict=True):
        torch.testing.assert_close(ours, theirs, **(tolerance or {"rtol": 0, "atol": 0}))


# Building


@pytest.mark.parametrize(
    ("backbone", "queries", "millions"),
    [
        ("resnet50", 100, 44),
        ("swin_tiny_patch4_window7_224", 100, 47),
        ("swin_small_patch4_window7_224", 100, 69),
        ("swin_base_patch4_window12_384", 100, 107),
        ("swin_large_patch4_window12_384", 200, 216),
    ],
)
def test_models_have_as_many_parameters_as_in_the_paper(backbone, queries, millions):
    with torch.device("meta"):
        model = build_model(ModelConfig(backbone=backbone, num_queries=queries), categories(133))
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == millions


@pytest.mark.parametrize(
    ("backbone", "channels"),
    [
        ("resnet18", [64, 128, 256, 512]),
        ("resnet50", [256, 512, 1024, 2048]),
        ("resnet101", [256, 512, 1024, 2048]),
        ("swin_tiny_patch4_window7_224", [96, 192, 384, 768]),
        ("swinv2_tiny_window8_256", [96, 192, 384, 768]),
        ("convnext_tiny", [96, 192, 384, 768]),
        ("mobilenetv3_large_100", [24, 40, 112, 960]),
        ("efficientnet_b0", [24, 40, 112, 320]),
        ("densenet121", [256, 512, 1024, 1024]),
        ("resnet50.a1_in1k", [256, 512, 1024, 2048]),
    ],
)
def test_any_timm_network_with_the_four_strides_is_a_backbone(backbone, channels):
    with torch.device("meta"):
        model = tiny(backbone)
    assert model.backbone.channels == dict(zip((4, 8, 16, 32), channels, strict=True))


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ("mixer_s16_224", "all features of 'mixer_s16_224' have stride 16; its blocks are 0 to 7; use a hierarchical"),
        ("resnet5", "timm has no model 'resnet5'; nearest: resnet50,"),
        ("swin_tiny", "nearest: "),
    ],
)
def test_unsuitable_and_unknown_backbones_are_refused_in_one_line(backbone, message):
    with pytest.raises(RecipeError) as error:
        tiny(backbone)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("backbone", ["resnet18", "swin_tiny_patch4_window7_224"])
def test_backbone_options_that_timm_does_not_know_are_refused_in_one_line(backbone):
    with pytest.raises(RecipeError, match="wings") as error:
        tiny(backbone, backbone_options={"wings": 2})
    assert "\n" not in str(error.value)


def test_a_swin_without_four_stages_is_refused():
    with pytest.raises(RecipeError, match=r"depths.*do not suit 'swin_tiny_patch4_window7_224'"):
        tiny("swin_tiny_patch4_window7_224", backbone_options={"depths": [2, 2, 2]})


def test_a_window_is_refused_for_networks_without_windows():
    with pytest.raises(RecipeError, match=r"model\.window_size: 'resnet18' has no windows; only Swin backbones have"):
        tiny(window_size=7)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_queries": 1, "num_classes": 1, "masked_decoder_layers": 1},
        {"hidden_dim": 96, "num_heads": 3, "mask_dim": 17, "deformable_points": 1},
        {"pixel_decoder_layers": 2, "masked_decoder_layers": 4, "num_queries": 33, "num_classes": 200},
        {"backbone": "resnet34", "backbone_options": {"layers": [1, 2, 1, 1]}, "backbone_norm": "batch"},
        {
            "backbone": "swin_tiny_patch4_window7_224",
            "backbone_options": SMALL_SWIN,
            "window_size": 3,
            "drop_path_rate": 0.2,
        },
        {"backbone": "convnext_atto"},
        {"backbone": "mobilenetv3_small_050"},
    ],
)
def test_unusual_sizes_build_and_run(changes):
    model = tiny(**changes).eval()
    queries, classes = changes.get("num_queries", 5), changes.get("num_classes", 3)
    with torch.inference_mode():
        output = model(images_of(2), intermediate=True)
    assert len(output.intermediate) == changes.get("masked_decoder_layers", 3)
    for prediction in (*output.intermediate, output.final):
        assert prediction.class_logits.shape == (2, queries, classes + 1)
        assert prediction.mask_logits().shape == (2, queries, 16, 24)
        assert prediction.mask_features is output.final.mask_features
    assert all(tensor.isfinite().all() for tensor in tensors(output))


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
@pytest.mark.parametrize(("changes", "rate"), [({}, 0.0), ({"drop_path_rate": 0.3}, 0.3)])
def test_stochastic_depth_has_the_rate_of_the_recipe(name, changes, rate):
    layers = tiny(name, backbone_options=SMALL_SWIN, **changes).modules()
    rates = [layer.drop_prob for layer in layers if hasattr(layer, "drop_prob")]  # none where the rate is 0
    assert max(rates, default=0.0) == pytest.approx(rate)


def test_features_of_channels_last_networks_are_permuted_even_if_height_equals_channels():
    options = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1], "strict_img_size": False}
    model = tiny("swinv2_tiny_window8_256", backbone_options=options).eval()
    with torch.inference_mode():
        features = model.backbone(torch.rand(1, 3, 64, 32)).features
    assert {stride: tuple(f.shape) for stride, f in features.items()} == {
        4: (1, 16, 16, 8),
        8: (1, 32, 8, 4),
        16: (1, 64, 4, 2),
        32: (1, 128, 2, 1),
    }


# Forward


@pytest.mark.parametrize("size", [(64, 100), (33, 64), (1, 1)])
def test_sizes_that_are_not_a_multiple_of_32_are_refused_with_the_size_to_pad_to(size):
    with pytest.raises(ValueError, match="pad them right and bottom to") as error:
        tiny()(torch.zeros(1, 3, *size))
    assert f"{-(-size[0] // 32) * 32}x{-(-size[1] // 32) * 32}" in str(error.value)


def test_the_smallest_image_has_one_cell_on_the_coarsest_level():
    with torch.inference_mode():
        output = tiny(hidden_dim=64).eval()(images_of(1, 32, 32))
    assert output.final.mask_logits().shape == (1, 5, 8, 8)


@pytest.mark.parametrize("backbone", ["resnet18", "swin_tiny_patch4_window7_224"])
def test_an_image_gives_the_same_alone_and_in_a_batch(backbone):
    options = SMALL_SWIN if backbone.startswith("swin") else {}
    model, images = tiny(backbone, backbone_options=options).eval(), images_of(3)
    with torch.inference_mode():
        together = model(images, intermediate=True)
        for index in range(3):
            alone = model(images[index : index + 1], intermediate=True)
            part = ModelOutput(together.final.image(index), [p.image(index) for p in together.intermediate])
            assert_same(part, alone, rtol=1e-4, atol=1e-4)  # convolutions of other sizes round differently


def test_pixels_in_the_padding_do_not_matter():
    model, images = tiny().eval(), images_of(2)
    padding = torch.zeros(2, 64, 96, dtype=torch.bool)
    padding[0, 40:] = padding[1, :, 70:] = True
    with torch.inference_mode():
        expected = model(images, padding, intermediate=True)
        changed = model(torch.where(padding[:, None], 255 - images, images), padding, intermediate=True)
        unpadded = model(images, intermediate=True)
    assert_same(changed, expected)
    assert not torch.equal(unpadded.final.class_logits, expected.final.class_logits)


def test_padding_is_zero_after_normalization():
    model, images = tiny().eval(), images_of().float()
    padding = torch.zeros(1, 64, 96, dtype=torch.bool)
    padding[:, :, 80:] = True
    images[:, :, :, 80:] = model.pixel_mean
    with torch.inference_mode():
        assert_same(model(images, padding), model(images))


def test_uint8_and_float_images_give_the_same():
    model = tiny().eval()
    with torch.inference_mode():
        assert_same(model(images_of()), model(images_of().float()))


def test_only_the_final_prediction_is_returned_without_intermediate():
    model = tiny().eval()
    with torch.inference_mode():
        short, whole = model(images_of()), model(images_of(), intermediate=True)
    assert short.intermediate == []
    assert_same(short, ModelOutput(whole.final))


def test_a_model_can_train_after_it_has_predicted_in_inference_mode():
    model = tiny("swin_tiny_patch4_window7_224", backbone_options=SMALL_SWIN)
    images = images_of(1, 96, 128)  # a size that no other test caches positions and window masks for
    with torch.inference_mode():
        model(images)
    model.train()(images).final.mask_logits().sum().backward()
    assert model.pixel_decoder.level_embedding.grad is not None


# Norms, gradients, state


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenetv3_small_050"])
def test_frozen_norms_have_no_parameters_and_do_not_change_in_training(backbone):
    model = tiny(backbone).train()
    norms = [m for m in model.backbone.modules() if isinstance(m, FrozenBatchNorm | FrozenBatchNormAct2d)]
    assert norms
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    assert not any(parameter is not None for norm in norms for parameter in norm.parameters())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model(images_of(2))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_folding_frozen_norms_into_convolutions_changes_nothing():
    backbone = build_backbone("resnet26d", options={}, norm="frozen", window=None, drop_path=0.0).eval()
    plain = timm.create_model("resnet26d", features_only=True, out_indices=(1, 2, 3, 4)).eval()
    for norm in plain.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for value in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
                value.uniform_(0.5, 1.5)
    state = {key: value for key, value in plain.state_dict().items() if "num_batches" not in key}
    backbone.network.load_state_dict(state)
    ours, theirs = backbone(images_of().float()).features, plain(images_of().float())
    for one, other in zip(ours.values(), theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=1e-5 * other.abs().max().item())


@pytest.mark.parametrize("norm", ["batch", "sync"])
def test_trained_norms_change_in_training_and_not_in_evaluation(norm):
    model = tiny(backbone_norm=norm)
    assert all(parameter.requires_grad for parameter in model.parameters())
    before = model.backbone.network.bn1.running_mean.clone()
    model.eval()(images_of(2))
    assert torch.equal(model.backbone.network.bn1.running_mean, before)
    model.train()(images_of(2))
    assert not torch.equal(model.backbone.network.bn1.running_mean, before)


def test_norms_with_trained_statistics_only_change_those_and_keep_their_scales():
    model = tiny(backbone_norm="statistics").train()
    norms = [module for module in model.backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert not any(parameter.requires_grad for norm in norms for parameter in norm.parameters())
    fixed = {id(parameter) for norm in norms for parameter in norm.parameters()}
    assert all(parameter.requires_grad for parameter in model.parameters() if id(parameter) not in fixed)
    before = norms[0].running_mean.clone()
    model(images_of(2))
    assert not torch.equal(norms[0].running_mean, before)


# DistributedDataParallel without find_unused_parameters waits for a gradient of every parameter.
@pytest.mark.parametrize("objects", [0, 1])
@pytest.mark.parametrize(
    ("backbone", "options"),
    [
        ("resnet18", {}),
        ("swin_tiny_patch4_window7_224", SMALL_SWIN),
        ("convnext_atto", {}),
        ("mobilenetv3_small_050", {}),
        ("efficientnet_b0", {}),
    ],
)
def test_every_parameter_gets_a_gradient_even_from_an_image_without_objects(backbone, options, objects):
    model = tiny(backbone, backbone_options=options).train()
    id_maps = torch.zeros(1, 64, 96, dtype=torch.int32)
    id_maps[0, 10:40, 20:70] = objects
    target = Target(
        id_maps, torch.ones(objects, dtype=torch.int64), torch.zeros(objects, dtype=torch.bool), 1, (64, 96)
    )
    criterion = Criterion(num_points=20)
    output = model(images_of(), intermediate=True)
    criterion.total(criterion(output, [target], RandomPoints(0, 0, [(0, 0)], "cpu"))).backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("backbone", ["resnet18", "swin_tiny_patch4_window7_224", "tf_efficientnet_lite0"])
def test_training_has_the_same_gradients_in_both_memory_formats(backbone, monkeypatch):
    model = tiny(backbone, backbone_options=SMALL_SWIN if backbone.startswith("swin") else {}).train()
    state, outputs, gradients = copy.deepcopy(model.state_dict()), [], []
    for channels_last in (False, True):
        for module in (segmenter, pixel_decoder):
            monkeypatch.setattr(module, "trains_channels_last", lambda x, answer=channels_last: answer)
        model.load_state_dict(state)  # running statistics of norms
        outputs.append(model(images_of(2), intermediate=True))
        features = outputs[-1].final.mask_features
        assert features.is_contiguous(memory_format=torch.channels_last) == channels_last
        loss = sum(tensor.square().sum() for tensor in tensors(outputs[-1]))
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert_same(*outputs, rtol=1e-4, atol=1e-4)
    largest = max(float(gradient.abs().max()) for gradient in gradients[0])
    for plain, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-5 * largest)


@pytest.mark.parametrize("backbone", ["resnet18", "swin_tiny_patch4_window7_224"])
def test_a_copy_computes_the_same_and_shares_nothing(backbone):
    options = SMALL_SWIN if backbone.startswith("swin") else {}
    model = tiny(backbone, backbone_options=options).eval()
    twin = copy.deepcopy(model)
    with torch.inference_mode():
        expected = model(images_of())
        assert_same(twin(images_of()), expected)
        for parameter in twin.parameters():
            parameter.zero_()
        assert_same(model(images_of()), expected)
    assert twin.config == model.config
    assert twin.categories == model.categories


def test_a_state_dict_is_restored_from_a_file():
    model, other, file = tiny().eval(), tiny(), io.BytesIO()
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    with torch.inference_mode():
        assert_same(other.eval()(images_of()), model(images_of()))


def test_pixel_mean_and_deviation_are_not_in_the_state_dict():
    model = tiny(pixel_mean=(1.0, 2.0, 3.0))
    assert not [key for key in model.state_dict() if "pixel_m" in key or "pixel_s" in key]
    assert model.pixel_mean.flatten().tolist() == [1.0, 2.0, 3.0]


def test_sine_positions_start_at_one_and_end_at_a_full_turn():
    positions = sine_positions(3, 4, 32, torch.device("cpu")).view(3, 4, 32)
    turn = torch.tensor(2 * torch.pi)
    assert positions[..., 0].allclose((turn / 3 * torch.arange(1, 4)).sin()[:, None], atol=1e-5)  # y leads
    assert positions[..., 17].allclose((turn / 4 * torch.arange(1, 5)).cos(), atol=1e-5)  # x follows, sine then cosine
    assert positions[:, 0, 0].std() > 0
    assert positions[0, :, :16].std(0).max() == 0
