"""SeMask: semantic layers against the formula, their place in a Swin, training and prediction."""

import json

import pytest
import torch
import torch.nn.functional as F

from maskwright.checkpoints.checkpoint import make_checkpoint, save_checkpoint
from maskwright.checkpoints.load import load_model
from maskwright.config.recipe import dump_recipe, load_recipe, parse_recipe
from maskwright.config.schema import ModelConfig
from maskwright.data.build import open_dataset
from maskwright.errors import RecipeError
from maskwright.inference.predictor import Predictor
from maskwright.models import build_model
from maskwright.models.backbones.semask import SemanticLayer, fuse
from maskwright.structures.annotations import Category, Target
from maskwright.training.losses.criterion import Criterion
from maskwright.training.losses.point_sampling import RandomPoints
from maskwright.training.train import train
from tests import tiny as tiny_data
from tests.in_process import run_command

CLASSES = tuple(Category(number, f"class {number}", True, (0, 0, 0)) for number in range(5))
SWIN = {
    "backbone": "swin_tiny_patch4_window7_224",
    "backbone_options": {"embed_dim": 24, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8]},
    "semantic_attention": ("window", "window", "global", "global"),
}
FAMILIES = {
    "semantic_fpn": {"family": "semantic_fpn", "hidden_dim": 32},
    "mask2former": {
        "num_queries": 6,
        "hidden_dim": 32,
        "pixel_decoder_layers": 1,
        "pixel_decoder_feedforward_dim": 16,
        "masked_decoder_layers": 2,
        "masked_decoder_feedforward_dim": 16,
    },
}


def tiny(family: str = "semantic_fpn", **changes):
    torch.manual_seed(0)
    return build_model(ModelConfig(**{**FAMILIES[family], **SWIN, **changes}), CLASSES)


def random_layer(window: int | None, dim: int = 8) -> SemanticLayer:
    torch.manual_seed(1)
    layer = SemanticLayer(dim=dim, num_classes=5, window=window).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer


def plain_semantic_layer(layer: SemanticLayer, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the class map (h, w, K) and cells (h, w, C) of one image (h, w, C), window by window."""
    h, w, dim = x.shape
    side_y, side_x = (layer.window or h), (layer.window or w)
    normed = F.layer_norm(x, (dim,), layer.norm.weight, layer.norm.bias, layer.norm.eps)
    semantic_map, result = torch.zeros(h, w, 5), torch.zeros(h, w, dim)
    for top in range(0, h, side_y):
        for left in range(0, w, side_x):
            cells = torch.zeros(side_y, side_x, dim)  # padding is zero and attended to
            part = normed[top : top + side_y, left : left + side_x]
            inside = part.shape[:2]
            cells[: inside[0], : inside[1]] = part
            cells = cells.reshape(-1, dim)
            query = cells @ layer.query.weight.t() + layer.query.bias
            key = cells @ layer.key.weight.t() + layer.key.bias
            value = cells @ layer.value.weight.t() + layer.value.bias
            scores = query @ key.t()
            attention = (scores - scores.amax(-1, keepdim=True)).exp()
            attention = attention / attention.sum(-1, keepdim=True)
            added = attention @ value @ layer.output.weight.t() + layer.output.bias
            out = (layer.gamma * added + cells).view(side_y, side_x, dim)
            semantic_map[top : top + side_y, left : left + side_x] = query.view(side_y, side_x, 5)[
                : inside[0], : inside[1]
            ]
            result[top : top + side_y, left : left + side_x] = out[: inside[0], : inside[1]]
    return semantic_map, result


@pytest.mark.parametrize("window", [4, 7, None])
@torch.no_grad()
def test_a_semantic_layer_equals_the_formula_of_the_paper(window):
    layer = random_layer(window)
    x = torch.randn(2, 9, 13, 8)
    semantic_map, cells = layer(x)
    assert semantic_map.shape == (2, 5, 9, 13)
    for image in range(2):
        expected_map, expected = plain_semantic_layer(layer, x[image])
        torch.testing.assert_close(semantic_map[image].permute(1, 2, 0), expected_map, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(cells[image], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_new_semantic_layer_is_a_layer_norm_and_not_the_identity():
    layer = SemanticLayer(dim=8, num_classes=5, window=4).eval()
    x = torch.randn(1, 6, 7, 8)
    torch.testing.assert_close(layer(x)[1], F.layer_norm(x, (8,)))


def test_dropout_applies_to_the_attention_output_in_training_only():
    layer, x = random_layer(4), torch.randn(1, 8, 8, 8)
    assert torch.equal(layer(x)[1], layer(x)[1])
    layer.train()
    torch.manual_seed(0)
    semantic_map, cells = layer(x)
    other_map, other = layer(x)
    assert torch.equal(semantic_map, other_map)
    assert not torch.equal(cells, other)
    left_alone = (cells == layer.norm(x)).float().mean().item()
    assert left_alone == pytest.approx(0.1, abs=0.06)


@pytest.mark.parametrize("align_corners", [False, True])
def test_maps_are_fused_by_upsampling_in_steps_of_two(align_corners):
    maps = [torch.randn(2, 3, *size) for size in ((15, 19), (8, 10), (4, 5), (2, 3))]
    expected = maps[0].clone()
    for number, coarse in enumerate(maps[1:], 1):
        for _ in range(number):
            coarse = F.interpolate(
                coarse, size=(2 * coarse.shape[2], 2 * coarse.shape[3]), mode="bilinear", align_corners=align_corners
            )
        expected += F.interpolate(coarse, size=(15, 19), mode="bilinear", align_corners=align_corners)
    torch.testing.assert_close(fuse(maps, align_corners=align_corners), expected)
    assert torch.equal(fuse(maps[:1], align_corners=align_corners), maps[0])


@torch.no_grad()
def test_the_output_of_a_semantic_layer_goes_to_the_next_stage_and_to_the_decoder():
    model = tiny().eval()
    backbone, images = model.backbone, torch.rand(1, 3, 64, 96)
    before = backbone(images)
    backbone.semantic_layers[1].gamma.fill_(1.0)
    after = backbone(images)
    assert torch.equal(before.features[4], after.features[4])
    assert all(not torch.equal(before.features[stride], after.features[stride]) for stride in (8, 16, 32))
    assert torch.equal(before.semantic_maps[1], after.semantic_maps[1])
    assert not torch.equal(before.semantic_maps[2], after.semantic_maps[2])


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "size", "fused"), [("semantic_fpn", (45, 70), (12, 18)), ("mask2former", (64, 96), (64, 96))]
)
def test_semantic_maps_are_always_returned_and_fused_only_for_losses(family, size, fused):
    model, images = tiny(family).eval(), torch.rand(2, 3, *size) * 255
    quick, whole = model(images), model(images, intermediate=True)
    rows, columns = -(-size[0] // 4), -(-size[1] // 4)
    sizes = [(2, 5, -(-rows // 2**level), -(-columns // 2**level)) for level in range(4)]
    assert [tuple(semantic_map.shape) for semantic_map in quick.semantic_maps] == sizes
    assert quick.semantic_logits is None
    assert whole.semantic_logits.shape == (2, 5, *fused)
    plain = tiny(family, semantic_attention=None).eval()(images, intermediate=True)
    assert plain.semantic_maps == ()
    assert plain.semantic_logits is None


@torch.no_grad()
def test_mask2former_fuses_and_upsamples_semantic_maps_with_aligned_corners():
    model, images = tiny("mask2former").eval(), torch.rand(1, 3, 64, 96) * 255
    output = model(images, intermediate=True)
    fused = fuse(output.semantic_maps, align_corners=True)
    expected = F.interpolate(fused, scale_factor=4, mode="bilinear", align_corners=True)
    torch.testing.assert_close(output.semantic_logits, expected)
    # Aligned corners keep the corner's value.
    torch.testing.assert_close(output.semantic_logits[..., 0, 0], fused[..., 0, 0])


def gradients(family: str, *, steps: int, published_initialization: bool = False) -> dict[str, float]:
    """Return gradient norms after `steps` steps, summed over the semantic layers, per parameter name in a layer."""
    model = tiny(family).train()
    if published_initialization:
        for layer in model.backbone.semantic_layers:
            torch.nn.init.zeros_(layer.output.weight)
    ids = torch.zeros(1, 64, 64, dtype=torch.int32)
    ids[0, :40, :40], ids[0, 44:] = 1, 2
    target = Target(ids, torch.tensor([1, 3]), torch.zeros(2, dtype=torch.bool), 0, (64, 64))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 255
    criterion = Criterion(num_points=64)
    for step in range(steps):
        optimizer.zero_grad()
        output = model(images, intermediate=True)
        losses = criterion(output, [target, target], RandomPoints(0, step, [(0, 0), (0, 1)], "cpu"))
        criterion.total(losses).backward()
        if step < steps - 1:
            optimizer.step()
    norms: dict[str, float] = {}
    for name, parameter in model.backbone.semantic_layers.named_parameters():
        suffix = name.split(".", 1)[1]
        norms[suffix] = norms.get(suffix, 0.0) + parameter.grad.norm().item()
    return norms


@pytest.mark.parametrize("family", FAMILIES)
def test_every_part_of_a_semantic_layer_gets_a_gradient_from_the_second_step_on(family):
    first, second = gradients(family, steps=1), gradients(family, steps=2)
    assert first["gamma"] > 0
    assert first["query.weight"] > 0
    assert first["output.weight"] == 0  # gamma starts at zero
    assert all(second[f"{part}.weight"] > 0 for part in ("query", "key", "value", "output", "norm"))


def test_with_the_published_initialization_for_mask2former_the_attention_never_gets_a_gradient():
    for steps in (1, 3):
        norms = gradients("mask2former", steps=steps, published_initialization=True)
        assert all(norms[name] == 0 for name in ("gamma", "output.weight", "value.weight", "key.weight"))
        assert norms["query.weight"] > 0


def test_scope_and_window_come_from_the_recipe():
    layers = tiny().backbone.semantic_layers
    assert [layer.window for layer in layers] == [7, 7, None, None]
    layers = tiny(semantic_attention=("window",) * 4, semantic_window_size=3, window_size=5).backbone.semantic_layers
    assert [layer.window for layer in layers] == [3] * 4
    assert [layer.window for layer in tiny(window_size=5).backbone.semantic_layers] == [5, 5, None, None]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.semantic_attention=[window, global]", "2 entries, expected one for each of 4 stages"),
        ("model.semantic_attention=[window, window, window, local]", "'window' or 'global'"),
        ("model.backbone=resnet18", "semantic_attention is for Swin backbones, and 'resnet18' is not a Swin"),
        ("model.semantic_attention=null", "semantic_window_size is for semantic layers; set semantic_attention"),
        ("data.task=panoptic", "semantic_fpn is for task semantic, but data.task is panoptic"),
        ("evaluate.task=instance", "evaluate.task is instance; set both to semantic"),
    ],
)
def test_contradictory_recipes_are_refused_in_one_line(change, message):
    base = ["model.semantic_attention=[window, window, global, global]", "model.semantic_window_size=7"]
    with pytest.raises(RecipeError, match=message.replace("[", r"\[")) as error:
        load_recipe("camvid-semask-fpn", [*base, change])
    assert "\n" not in str(error.value)


# Through the commands


def recipe_for(folder, family, **changes):
    values = tiny_data.values(folder, "semantic", train__steps=4, **changes)
    small = {key: value for key, value in SWIN.items() if key != "backbone"}
    values["model"] |= {"backbone": SWIN["backbone"], **small, **FAMILIES[family]}
    values["model"]["num_heads"] = 4
    return parse_recipe(values, "tiny")


@pytest.mark.parametrize(
    ("family", "terms"),
    [("semantic_fpn", ["pixel", "semantic"]), ("mask2former", ["class", "mask", "dice", "semantic"])],
)
def test_the_training_loop_trains_evaluates_and_reports_it(family, terms, tmp_path):
    recipe = recipe_for(tiny_data.write_labels(tmp_path / "data"), family)
    train(recipe, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert len(steps) == 4
    for row in steps:
        found = {key.removeprefix("loss_"): value for key, value in row.items() if key.startswith("loss_")}
        assert list(found) == terms
        assert row["loss"] == pytest.approx(sum(found.values()), rel=1e-5)
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert report.count("semantic map of stage 4</figcaption>") == 4
    model = load_model(tmp_path / "run" / "best.safetensors")
    assert model.config == recipe.model
    result = Predictor(model, device="cpu")(tmp_path / "data" / "images" / "00.png")
    assert result.label_map.shape == (64, 64)


def test_a_checkpoint_predicts_and_evaluates_through_the_commands_and_refuses_instances(tmp_path, monkeypatch, capsys):
    folder = tiny_data.write_labels(tmp_path / "data")
    recipe = recipe_for(folder, "semantic_fpn")
    model, file = build_model(recipe.model, open_dataset(recipe, "train").categories), tmp_path / "model.safetensors"
    save_checkpoint(file, make_checkpoint(model, recipe, {}))
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    image = str(folder / "images" / "00.png")

    def run(*arguments: str) -> tuple[int, str]:
        code, said, complaints = run_command(monkeypatch, capsys, *arguments, "--device", "cpu")
        return code, said + complaints

    code, said = run("predict", str(file), image, "--output", str(tmp_path / "out"))
    assert code == 0, said
    assert list((tmp_path / "out").glob("00*.png"))
    code, said = run("evaluate", str(file), str(tmp_path / "recipe.yaml"))
    assert code == 0
    assert "mIoU" in said
    for task in ("instance", "panoptic"):
        code, said = run("predict", str(file), image, "--task", task, "--output", str(tmp_path / task))
        assert code == 1
        (line,) = said.strip().splitlines()
        assert f"so it cannot do task {task}; use task semantic" in line
