"""Parameter groups and learning rates, as in the original's `build_optimizer` and detectron2's schedules."""

import pytest
import torch
from torch import nn

from maskwright.config.recipe import load_recipe
from maskwright.config.schema import ModelConfig, TrainConfig
from maskwright.models import build_model
from maskwright.structures.annotations import Category
from maskwright.training.optimizer import (
    build_optimizer,
    describe_schedule,
    learning_rate_advice,
    learning_rate_factor,
    set_learning_rate,
)

SMALL_SWIN = {"embed_dim": 24, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 3, 4]}


def config(**changes: object) -> TrainConfig:
    augment = {"resize": "short_side", "crop_size": [64, 64], "scale_range": [0.5, 2.0]}
    return TrainConfig(**({"steps": 1000, "augment": augment} | changes))


def tiny(backbone: str = "resnet18", **changes: object) -> nn.Module:
    sizes = {"num_queries": 5, "hidden_dim": 32, "pixel_decoder_layers": 1, "masked_decoder_layers": 2}
    model_config = ModelConfig(backbone=backbone, **sizes, **changes)
    return build_model(model_config, [Category(1, "thing", True, (0, 0, 0))])


def settings(model: nn.Module, train: TrainConfig) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay by parameter name."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, train, fused=False)
    return {names[p]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}


def semask_fpn() -> nn.Module:
    swin = {"backbone": "swin_tiny_patch4_window7_224", "backbone_options": SMALL_SWIN}
    model_config = ModelConfig(family="semantic_fpn", hidden_dim=32, semantic_attention=["window"] * 4, **swin)
    return build_model(model_config, [Category(1, "thing", True, (0, 0, 0))])


MODELS = pytest.mark.parametrize(
    ("backbone", "changes"),
    [
        ("resnet18", {}),
        ("resnet18", {"backbone_norm": "batch"}),
        ("swin_tiny_patch4_window7_224", {"backbone_options": SMALL_SWIN}),
        ("convnext_atto", {}),
        ("mobilenetv3_small_050", {"backbone_norm": "sync"}),
    ],
)


@MODELS
def test_each_trainable_parameter_is_in_exactly_one_group(backbone, changes):
    model = tiny(backbone, **changes)
    optimizer = build_optimizer(model, config(), fused=False)
    grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {parameter for parameter in model.parameters() if parameter.requires_grad}


def test_semask_fpn_has_no_weight_decay_exactly_where_its_published_names_have_norm():
    train = config(backbone_lr_multiplier=1.0, weight_decay=0.05, decay_batch_norms=True)
    found = settings(semask_fpn(), train)
    assert {rate for rate, _ in found.values()} == {1e-4}
    spared = {name for name, (_, decay) in found.items() if decay == 0}
    published = {
        name
        for name in found
        if "relative_position_bias_table" in name or ("norm" in name and not name.startswith("decoder."))
    }  # norms of the decoder are called "bn" there
    assert spared == published
    assert {"backbone.semantic_layers.0.gamma", "decoder.levels.0.0.norm.weight"} <= found.keys() - spared
    usual = settings(semask_fpn(), config())
    assert {name for name, (_, decay) in usual.items() if decay == 0} == {name for name in found if "norm" in name} | {
        name for name in found if "table" in name
    }


@MODELS
def test_the_backbone_has_its_own_learning_rate(backbone, changes):
    train = config(learning_rate=2e-4, backbone_lr_multiplier=0.25)
    for name, (rate, _) in settings(tiny(backbone, **changes), train).items():
        assert rate == pytest.approx(5e-5 if name.startswith("backbone.") else 2e-4)


@MODELS
def test_all_but_norms_embeddings_and_position_tables_have_weight_decay(backbone, changes):
    model = tiny(backbone, **changes)
    for name, (_, decay) in settings(model, config(weight_decay=0.05)).items():
        owner = model.get_submodule(name.rpartition(".")[0])
        is_norm = "Norm" in type(owner).__name__
        is_table = isinstance(owner, nn.Embedding) or name.endswith("relative_position_bias_table")
        assert decay == (0.0 if is_norm or is_table else 0.05), name


def test_position_embeddings_of_a_transformer_have_no_weight_decay():
    model = tiny()
    model.backbone.register_parameter("pos_embed", nn.Parameter(torch.zeros(1, 4, 8)))
    assert settings(model, config(weight_decay=0.05))["backbone.pos_embed"][1] == 0.0


def test_the_groups_of_named_parameters_are_those_of_the_original():
    model = tiny("swin_tiny_patch4_window7_224", backbone_options=SMALL_SWIN)
    found = settings(model, config())
    expected = {
        "backbone.patch_embed.proj.weight": (1e-5, 0.05),
        "backbone.patch_embed.proj.bias": (1e-5, 0.05),
        "backbone.patch_embed.norm.weight": (1e-5, 0.0),
        "backbone.stages.0.blocks.0.attn.relative_position_bias_table": (1e-5, 0.0),
        "backbone.stages.0.blocks.0.attn.qkv.bias": (1e-5, 0.05),
        "backbone.stages.0.blocks.0.norm1.bias": (1e-5, 0.0),
        "backbone.norms.3.weight": (1e-5, 0.0),
        "pixel_decoder.input_projections.0.conv.bias": (1e-4, 0.05),
        "pixel_decoder.input_projections.0.norm.weight": (1e-4, 0.0),
        "pixel_decoder.level_embedding": (1e-4, 0.05),  # a plain parameter in the original, too
        "pixel_decoder.layers.0.attention.offsets.bias": (1e-4, 0.05),
        "pixel_decoder.layers.0.attention_norm.bias": (1e-4, 0.0),
        "masked_decoder.query_features.weight": (1e-4, 0.0),
        "masked_decoder.query_positions.weight": (1e-4, 0.0),
        "masked_decoder.level_embedding.weight": (1e-4, 0.0),
        "masked_decoder.layers.0.cross_attention.query.weight": (1e-4, 0.05),
        "masked_decoder.norm.weight": (1e-4, 0.0),
        "masked_decoder.class_head.weight": (1e-4, 0.05),
    }
    assert {name: found[name][0] for name in expected} == pytest.approx({name: e[0] for name, e in expected.items()})
    assert {name: found[name][1] for name in expected} == {name: decay for name, (_, decay) in expected.items()}


def test_frozen_parameters_are_in_no_group():
    model = tiny()
    model.pixel_decoder.requires_grad_(False)
    assert not [name for name in settings(model, config()) if name.startswith("pixel_decoder.")]


def test_a_step_with_zero_gradients_decays_weights_but_not_embeddings():
    model = tiny()
    optimizer = build_optimizer(model, config(learning_rate=0.1, weight_decay=0.5), fused=False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    head, table = "masked_decoder.class_head.weight", "masked_decoder.query_features.weight"
    after = dict(model.named_parameters())
    torch.testing.assert_close(after[head], before[head] * (1 - 0.1 * 0.5))
    assert torch.equal(after[table], before[table])


@pytest.mark.parametrize(
    ("step", "factor"), [(0, 1.0), (500, 0.5358867), (900, 0.1258925), (999, 0.001995262), (1000, 0.0)]
)
def test_poly_decay(step, factor):
    assert learning_rate_factor(step, config()) == pytest.approx(factor, rel=1e-5)


def test_the_power_of_poly_decay():
    assert learning_rate_factor(250, config(poly_power=1.0)) == pytest.approx(0.75)
    assert learning_rate_factor(500, config(poly_power=2.0)) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("step", "factor"), [(0, 1.0), (899, 1.0), (900, 0.1), (949, 0.1), (950, 0.01), (999, 0.01), (1000, 0.01)]
)
def test_step_decay(step, factor):
    assert learning_rate_factor(step, config(schedule="step")) == pytest.approx(factor)


def test_milestones_of_coco_are_at_the_steps_of_the_original():
    coco = config(schedule="step", steps=368750, milestones=[0.888889, 0.962963])
    assert learning_rate_factor(327777, coco) == 1.0
    assert learning_rate_factor(327778, coco) == pytest.approx(0.1)
    assert learning_rate_factor(355091, coco) == pytest.approx(0.1)
    assert learning_rate_factor(355093, coco) == pytest.approx(0.01)


@pytest.mark.parametrize(("step", "factor"), [(0, 0.2), (5, 0.6), (9, 0.92), (10, 1.0), (11, 1.0)])
def test_warm_up_is_linear_and_ends_at_the_full_learning_rate(step, factor):
    train = config(schedule="step", warmup_steps=10, warmup_factor=0.2)
    assert learning_rate_factor(step, train) == pytest.approx(factor)


def test_warm_up_multiplies_the_decay():
    train = config(warmup_steps=100, warmup_factor=0.0)
    assert learning_rate_factor(0, train) == 0.0
    assert learning_rate_factor(50, train) == pytest.approx(0.5 * 0.95**0.9)


@pytest.mark.parametrize(
    ("step", "first", "second"),
    [(0, 0, 0), (50, 0.5, 0), (100, 1, 0), (200, (1 - 100 / 900) ** 0.9, 0.5), (300, (1 - 200 / 900) ** 0.9, 1),
     (650, (1 - 550 / 900) ** 0.9, 0.5**0.9)],
)  # fmt: skip
def test_a_two_stage_warm_up_is_that_of_eomt(step, first, second):
    train = config(learning_rate=1.0, warmup_steps=100, backbone_warmup_steps=200, backbone_lr_multiplier=1.0)
    model = tiny()
    optimizer = build_optimizer(model, train, fused=False)
    set_learning_rate(optimizer, step, train)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == pytest.approx(second if name.startswith("backbone") else first)


def test_everything_is_decayed_if_the_recipe_says_so():
    groups = build_optimizer(tiny(), config(decay_norms_and_embeddings=True), fused=False).param_groups
    assert {group["weight_decay"] for group in groups} == {0.05}


def test_setting_the_learning_rate_scales_every_group_and_returns_the_largest():
    train = config(learning_rate=1e-3, poly_power=1.0)
    optimizer = build_optimizer(tiny(), train, fused=False)
    for step, factor in ((500, 0.5), (750, 0.25)):
        assert set_learning_rate(optimizer, step, train) == pytest.approx(1e-3 * factor)
        rates = {round(group["lr"] / factor, 9) for group in optimizer.param_groups}
        assert rates == {1e-3, 1e-4}


def test_schedule_is_described_with_micro_batches_and_epochs():
    assert describe_schedule(config(steps=1500, batch_size=8, gradient_accumulation_steps=2), 367, 2).startswith(
        "8 images per step (2 processes x 2 micro-batches x 2) x 1500 steps = 32.7 epochs of 367 images"
    )
    assert describe_schedule(config(steps=1500, batch_size=8), 367).startswith("8 images per step x 1500 steps")


def test_a_smaller_batch_than_the_learning_rate_was_tuned_for_is_advised_on():
    whole = load_recipe("coco-instance-r50")
    fewer = load_recipe("coco-instance-r50", ["train.batch_size=2"])
    assert (whole.train.base_batch_size, fewer.train.base_batch_size) == (None, 16)
    advice = learning_rate_advice(fewer.train)
    assert "train.learning_rate=1.25e-05 train.steps=2950000" in advice
    assert "train.batch_size=16 train.gradient_accumulation_steps=8" in advice
    for overrides in (
        [],
        ["train.batch_size=32"],
        ["train.batch_size=16", "train.gradient_accumulation_steps=8"],
        ["train.batch_size=2", "train.learning_rate=1e-5"],
    ):
        assert learning_rate_advice(load_recipe("coco-instance-r50", overrides).train) is None
