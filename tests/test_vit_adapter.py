"""The ViT-Adapter: features of the original's modules, sizes, positions, training, freezing and refusals."""

import re

import numpy as np
import pytest
import torch
import transformers

from maskwright.checkpoints.backbone import load_backbone_weights
from maskwright.config.schema import ModelConfig, TrainConfig
from maskwright.errors import RecipeError
from maskwright.models import build_model
from maskwright.models.backbones.build import build_backbone
from maskwright.models.blocks import backbone_depths, find_blocks, freeze_stages, recompute_blocks
from maskwright.structures.annotations import Category
from maskwright.training.optimizer import build_optimizer
from tests.parity import vit_adapter as original
from tests.parity.weights import fill

SIZES = {"embed_dim": 48, "depth": 4, "num_heads": 3}
DINOV2 = "vit_small_patch14_dinov2"
AUGMENT = {"resize": "short_side", "crop_size": (64, 64), "scale_range": (1.0, 1.0)}
CATEGORIES = (Category(0, "all", False, (0, 0, 0)),)

# Our names of the adapter's weights, and those of the original.
NAMES = (
    (r"^network\.", "vit."),
    (r"^neck\.", ""),
    (r"^spatial_prior\.stem", "spm.stem"),
    (r"^spatial_prior\.stages\.(\d)", lambda match: f"spm.conv{int(match[1]) + 2}"),
    (r"^spatial_prior\.projections\.(\d)", lambda match: f"spm.fc{int(match[1]) + 1}"),
    (r"^level_embedding", "level_embed"),
    (r"^injectors\.(\d)", r"interactions.\1.injector"),
    (r"^extractors\.(\d)\.0", r"interactions.\1.extractor"),
    (r"^extractors\.(\d)\.(\d)", lambda match: f"interactions.{match[1]}.extra_extractors.{int(match[2]) - 1}"),
    (r"^upscale", "up"),
    (r"^norms\.(\d)", lambda match: f"norm{int(match[1]) + 1}"),
    (r"\.value_norm", ".feat_norm"),
    (r"\.attention\.offsets", ".attn.sampling_offsets"),
    (r"\.attention\.weights", ".attn.attention_weights"),
    (r"\.attention\.value", ".attn.value_proj"),
    (r"\.attention\.output", ".attn.output_proj"),
    (r"\.feedforward_norm", ".ffn_norm"),
    (r"\.feedforward\.expand", ".ffn.fc1"),
    (r"\.feedforward\.depthwise", ".ffn.dwconv.dwconv"),
    (r"\.feedforward\.reduce", ".ffn.fc2"),
)


def build(name=DINOV2, options=SIZES, drop_path=0.0, **changes):
    torch.manual_seed(0)
    arguments = {"norm": "frozen", "window": None, "vit_pyramid": "adapter"} | changes
    return build_backbone(name, options=options, drop_path=drop_path, **arguments)


def model_with_adapter(**changes):
    config = {"family": "semantic_fpn", "hidden_dim": 32, "backbone": DINOV2, "backbone_options": SIZES}
    torch.manual_seed(0)
    return build_model(ModelConfig(**config | {"vit_pyramid": "adapter"} | changes), CATEGORIES)


def randomize(module):
    """Give every weight an effect; factors start at zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith(("gamma", "offsets.weight", "attention.weights.weight")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def test_features_are_those_of_the_original_modules():
    """Sums of float32 in another order differ by 2e-5 of features whose largest value is 12."""
    backbone = build("vit_tiny_patch16_224", original.VIT).eval()
    values = {}
    for key, tensor in backbone.state_dict().items():
        if key.endswith("num_batches_tracked"):
            continue
        name = key
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        values[key] = torch.from_numpy(fill({name: tuple(tensor.shape)})[name])
    backbone.load_state_dict(values, strict=False)
    with torch.no_grad():
        features = backbone(original.image()).features
    with np.load(original.FILE) as expected:
        for stride, found in features.items():
            np.testing.assert_allclose(found.numpy(), expected[f"stride_{stride}"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {}),
        (DINOV2, {}),
        ("vit_small_patch14_reg4_dinov2", {"patch_size": 8, "img_size": 64}),
        ("vit_base_patch32_clip_224", {}),
        ("vit_small_patch16_dinov3_qkvb", {}),
        ("vit_base_patch16_rope_mixed_224", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_any_plain_vit_has_four_strides_at_any_size_and_all_weights_are_trained(name, options):
    backbone = build(name, SIZES | options)
    randomize(backbone)
    for height, width in ((32, 64), (96, 160)):
        features = backbone(torch.randn(2, 3, height, width)).features
        assert {stride: tuple(feature.shape) for stride, feature in features.items()} == {
            stride: (2, 48, height // stride, width // stride) for stride in (4, 8, 16, 32)
        }
    sum((feature * torch.randn_like(feature)).sum() for feature in features.values()).backward()
    without = [name for name, p in backbone.named_parameters() if p.grad is None or not p.grad.any()]
    # Only a bias after which a norm subtracts the mean, or in front of a softmax, may have no gradient.
    assert not [name for name in without if name.startswith("network") or not name.endswith("bias")]


def test_the_vit_computes_at_first_what_it_computes_without_the_adapter():
    backbone = build().eval()
    images, seen = torch.randn(1, 3, 64, 64), []
    backbone.blocks[-1].register_forward_hook(lambda _, inputs, output: seen.append(output))
    with torch.no_grad():
        backbone(images)
        tokens, rope, _ = backbone.embed(images)
        for index in range(len(backbone.blocks)):
            tokens = backbone.run_block(index, tokens, rope)
    assert torch.equal(*seen)


def test_padding_at_the_right_does_not_move_what_is_sampled():
    """Without the ViT's attention, which sees the padding, features far from it are the same."""
    adapter = build("vit_tiny_patch16_224", SIZES | {"patch_size": 14}).neck.eval()
    randomize(adapter)
    for module in adapter.modules():
        if hasattr(module, "offsets"):  # so that a query samples at its own place
            torch.nn.init.zeros_(module.offsets.weight)
            torch.nn.init.zeros_(module.offsets.bias)
    height, width, padded = 32, 1024, 1120
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, 3, height, width, generator=generator)
    maps = torch.randn(1, 48, 3, padded // 14, generator=generator)
    outputs = []
    for total in (width, padded):
        columns = -(-total // 14)
        tokens = maps[..., :columns].flatten(2).mT
        canvas = torch.nn.functional.pad(images, (0, total - width))
        with torch.no_grad():
            outputs.append(adapter(canvas, tokens, (3, columns), lambda stage, tokens: tokens))
    for stride in (4, 8, 16, 32):
        far = (width - 576) // stride
        torch.testing.assert_close(*(output[stride][..., :far] for output in outputs), rtol=0, atol=1e-4)


def test_a_frozen_vit_does_not_change_and_the_adapter_is_trained():
    model = model_with_adapter().train()
    freeze_stages(model, 4)
    network, adapter = model.backbone.network, model.backbone.neck
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert all(parameter.requires_grad for parameter in adapter.parameters())
    randomize(adapter)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    model(images).final.class_logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    assert adapter.injectors[0].gamma.grad.any()  # through all blocks of the ViT
    assert adapter.norms[0].num_batches_tracked == 1


def test_layer_decay_counts_the_blocks_of_the_vit_and_the_adapter_has_the_whole_rate():
    model = model_with_adapter()
    names = [f"backbone.network.blocks.{index}.attn.qkv.weight" for index in range(4)]
    assert [backbone_depths(model)[name] for name in names] == [3, 2, 1, 0]
    config = TrainConfig(steps=1, augment=AUGMENT, learning_rate=1.0, layer_decay=0.5, backbone_lr_multiplier=0.5)
    groups = build_optimizer(model, config, fused=False).param_groups
    adapter = {id(parameter) for parameter in model.backbone.neck.parameters()}
    assert {group["lr"] for group in groups for p in group["params"] if id(p) in adapter} == {1.0}


def test_recomputed_injectors_and_extractors_give_the_same_gradients():
    images, gradients = torch.randn(1, 3, 64, 64), []
    for recompute in (False, True):
        backbone = build(drop_path=0.5)
        randomize(backbone)
        if recompute:
            assert recompute_blocks(backbone) == len(find_blocks(backbone)) == 4 + 4 + 6
        torch.manual_seed(0)
        sum(feature.square().sum() for feature in backbone(images).features.values()).backward()
        gradients.append([parameter.grad for parameter in backbone.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_weights_of_transformers_are_loaded_without_the_final_norm(tmp_path):
    sizes = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "image_size": 56}
    transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).save_pretrained(tmp_path)
    weights = str(tmp_path / "model.safetensors")
    model = model_with_adapter(backbone_options=SIZES | {"img_size": 56}, backbone_weights=weights)
    assert "not in the weights, so initialized as in a new model: backbone.neck" in load_backbone_weights(model)


def test_mask2former_has_an_adapter_and_images_of_many_channels():
    model = model_with_adapter(
        family="mask2former", channels=5, pixel_mean=(0.0,) * 5, pixel_std=(1.0,) * 5, num_queries=3
    )
    output = model(torch.randn(1, 5, 64, 64)).final
    assert output.class_logits.shape == (1, 3, 2)


@pytest.mark.parametrize("name", ["resnet50", "swin_tiny_patch4_window7_224", "tf_efficientnet_lite0"])
def test_a_hierarchical_network_is_refused(name):
    with pytest.raises(RecipeError, match=f"vit_pyramid: adapter is for plain ViTs, and '{name}' is not one"):
        build(name, {})


def test_eomt_is_refused():
    with pytest.raises(ValueError, match="eomt has no feature pyramid"):
        ModelConfig(family="eomt", backbone=DINOV2, vit_pyramid="adapter")
