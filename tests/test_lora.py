"""LoRA and frozen models: adapters learn, files are small, and merging them with their base changes no bit."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn
from torch.nn.utils import parametrize

import maskwright.training.train as train_module
from maskwright.checkpoints.checkpoint import make_checkpoint, save_checkpoint
from maskwright.checkpoints.convert import convert
from maskwright.checkpoints.load import load_model, read_checkpoint
from maskwright.checkpoints.sources import weight_digest
from maskwright.cli import app
from maskwright.config.recipe import load_recipe
from maskwright.config.schema import LoraConfig
from maskwright.data.build import open_dataset
from maskwright.errors import CheckpointError, RecipeError, TrainingError
from maskwright.inference.predictor import Predictor
from maskwright.models import build_model
from maskwright.models.lora import LowRank, adapters_of, add_adapters
from maskwright.runtime.device import create_accelerator
from maskwright.training.adapter_check import AdapterCheck
from maskwright.training.optimizer import build_optimizer
from maskwright.training.setup import prepare_model
from maskwright.training.train import train
from tests import tiny
from tests.in_process import train_until
from tests.processes import start_ranks, wait
from tests.run_files import assert_same_run, losses

SWIN = {
    "model__backbone": "swin_tiny_patch4_window7_224",
    "model__backbone_options": {"depths": [1, 1, 2, 1], "embed_dim": 24, "num_heads": [1, 1, 2, 2]},
}
WHOLE_CROPS = {  # no padding, however divided
    "train__augment": {"resize": "large_scale_jitter", "scale_range": [1.0, 1.5], "crop_size": [64, 64]},
    "train__learning_rate": 1e-4,
}
HEAD = ("masked_decoder.class_head.", "masked_decoder.mask_head.", "masked_decoder.query_")


pytestmark = pytest.mark.usefixtures("quick_report")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data, a base, and the finished LoRA run `run` of four steps."""
    place = tmp_path_factory.mktemp("lora")
    tiny.write_panoptic(place / "data")
    save_base(place, "base.safetensors", **SWIN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("maskwright.training.report.curves", lambda log, file: file.write_text("curves"))
        patch.setattr("maskwright.training.report.report", lambda run, file, **content: file.write_text("report"))
        train(lora_recipe(place), place / "run")
    return place


def save_base(place, name, **changes):
    recipe = tiny.recipe(place / "data", **changes)
    torch.manual_seed(7)
    model = build_model(recipe.model, open_dataset(recipe, "train").categories)
    save_checkpoint(place / name, make_checkpoint(model, recipe, {}))


def lora_recipe(place, base="base.safetensors", **changes):
    defaults = {"train__steps": 4, "train__lora": {"rank": 4}, "train__initial_weights": str(place / base)}
    return tiny.recipe(place / "data", **SWIN | defaults | changes)


def model_of(place, **changes):
    recipe = tiny.recipe(place / "data", **SWIN | changes)
    torch.manual_seed(0)
    return build_model(recipe.model, open_dataset(recipe, "train").categories)


def file_header(path):
    with safetensors.safe_open(path, "pt") as file:
        return file.metadata()


def test_adapters_of_all_groups_get_gradients_and_the_rest_stays_frozen(place):
    recipe = lora_recipe(place, train__lora={"targets": ["attention", "feedforward", "convolution"]})
    model = model_of(place)
    prepare_model(model, recipe, create_accelerator("fp32"))
    for adapter in adapters_of(model).values():
        nn.init.normal_(adapter.up)  # from zero, `down` has no gradient in the first step
    output = model(torch.rand(2, 3, 64, 64) * 255, intermediate=True)
    masks = torch.einsum("bqc,bchw->bqhw", output.final.mask_embeddings, output.final.mask_features)
    (masks.square().mean() + output.final.class_logits.square().mean()).backward()
    adapters = adapters_of(model)
    assert {"backbone.stages.0.blocks.0.attn.qkv.weight", "masked_decoder.layers.1.feedforward.expand.weight"} <= set(
        adapters
    )
    assert {"pixel_decoder.layers.0.attention.offsets.weight", "pixel_decoder.smooth.conv.weight"} <= set(adapters)
    assert all(p.grad is not None and p.grad.any() for adapter in adapters.values() for p in adapter.parameters())
    trained = {name for name, p in model.named_parameters() if p.requires_grad and ".parametrizations." not in name}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith(HEAD)}


def test_targets_are_patterns_and_groups(place):
    model = model_of(place)
    line = add_adapters(
        model, LoraConfig(targets=("backbone.stages.3.*", "masked_decoder.layers.*.self_attention.value"))
    )
    names = set(adapters_of(model))
    assert "on 7 weights (backbone 5, masked_decoder 2); with the head, 0.0" in line
    assert {name for name in names if name.startswith("masked")} == {
        f"masked_decoder.layers.{layer}.self_attention.value.weight" for layer in (0, 1)
    }
    assert not [name for name in names if name.startswith("backbone") and not name.startswith("backbone.stages.3.")]


def test_target_without_a_weight_names_the_nearest(place):
    for target, nearest in (
        ("atention", "nearest: attention"),
        ("masked_decoder.layers.*.cros_attention.key", "masked_decoder.layers.*.cross_attention.key"),
        ("masked_decoder.class_head", "matches no weight that is neither frozen nor in the head"),
    ):
        with pytest.raises(RecipeError) as error:
            add_adapters(model_of(place), LoraConfig(targets=("attention", target)))
        assert nearest in str(error.value)
        assert str(error.value).startswith(f"train.lora.targets: '{target}' matches no weight")


def test_frozen_stages_get_no_adapters(place):
    recipe = lora_recipe(place, train__frozen_stages=3)
    model = model_of(place)
    prepare_model(model, recipe, create_accelerator("fp32"))
    backbone = {name for name in adapters_of(model) if name.startswith("backbone")}
    assert backbone
    assert all(name.startswith("backbone.stages.3.") for name in backbone)


def test_packed_projection_of_torchs_attention_is_adapted():
    model = nn.Module()
    model.attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.rand(1, 3, 8)
    before = model.attention(x, x, x)[0]
    add_adapters(model, LoraConfig(targets=("attention",)))
    assert set(adapters_of(model)) == {"attention.in_proj_weight", "attention.out_proj.weight"}
    assert torch.equal(model.attention(x, x, x)[0], before)
    for adapter in adapters_of(model).values():
        nn.init.normal_(adapter.up)
    model.attention(x, x, x)[0].sum().backward()
    assert all(p.grad.any() for adapter in adapters_of(model).values() for p in adapter.parameters())


def test_adapted_weight_keeps_its_precision_under_autocast():
    layer = nn.Linear(8, 8)
    adapter = LowRank(layer.weight, rank=2, alpha=3.0)
    nn.init.normal_(adapter.up)
    expected = layer.weight + 1.5 * adapter.up @ adapter.down
    parametrize.register_parametrization(layer, "weight", adapter)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer.weight, expected, rtol=1e-6, atol=1e-6)


def test_adapters_take_the_whole_learning_rate_and_muon_leaves_them_to_adamw(place):
    recipe = lora_recipe(place, train__optimizer="muon", train__backbone_lr_multiplier=0.1, train__layer_decay=0.5)
    model = model_of(place)
    prepare_model(model, recipe, create_accelerator("fp32"))
    optimizer = build_optimizer(model, recipe.train, fused=False)
    adapters = {p for adapter in adapters_of(model).values() for p in adapter.parameters()}
    groups = [group for group in optimizer.param_groups if adapters & set(group["params"])]
    assert {group["initial_lr"] for group in groups} == {recipe.train.learning_rate}
    assert not any(group["orthogonal"] for group in groups)
    assert sum(len(adapters & set(group["params"])) for group in groups) == len(adapters)


def test_run_writes_small_files_that_give_the_model_that_was_scored(place, tmp_path, monkeypatch):
    scored = []
    real = train_module.evaluate
    monkeypatch.setattr(train_module, "evaluate", lambda model, *a, **b: scored.append(model) or real(model, *a, **b))
    train(lora_recipe(place, train__ema_decay=0.5, model__backbone_norm="batch"), tmp_path / "run")
    loaded = load_model(tmp_path / "run/last.safetensors").state_dict()
    expected = scored[-1].state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], expected[key]) for key in loaded)
    base = load_model(place / "base.safetensors").state_dict()
    changed = {key for key in base if not torch.equal(base[key], loaded[key])}
    assert {"masked_decoder.class_head.weight", "backbone.stages.0.blocks.0.attn.qkv.weight"} <= changed
    assert "backbone.patch_embed.proj.weight" not in changed
    assert (tmp_path / "run/best.safetensors").stat().st_size < (place / "base.safetensors").stat().st_size / 8


def test_file_names_its_base_and_its_digest(place):
    header = file_header(place / "run/best.safetensors")
    base = json.loads(header["adapter"])["base"]
    assert header["format"] == "maskwright-lora-1"
    assert base["name"] == base["path"] == str(place / "base.safetensors")
    assert base["sha256"] == weight_digest(place / "base.safetensors")
    assert f"with SHA-256 {base['sha256']}" in (place / "run/log.jsonl").read_text()
    tensors = safetensors.torch.load_file(place / "run/best.safetensors")
    assert tensors["backbone.stages.0.blocks.0.attn.qkv.weight.lora_down"].shape == (4, 24)
    assert all(name.startswith(HEAD) or ".lora_" in name for name in tensors)


def test_every_command_takes_it_and_convert_merges_it(place, tmp_path):
    adapter, merged = place / "run/best.safetensors", tmp_path / "merged.safetensors"
    convert(adapter, merged)
    assert file_header(merged)["format"] == "maskwright-1"
    ours, theirs = load_model(adapter).state_dict(), load_model(merged).state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    image = tiny.scene_image(1)
    first, second = (Predictor(path)(image, task="semantic") for path in (adapter, merged))
    assert (first.label_map == second.label_map).all()
    tiny.write_recipe(tmp_path / "recipe.yaml", place / "data", **SWIN)
    for command in (
        ["evaluate", str(adapter), str(tmp_path / "recipe.yaml"), "evaluate.max_images=1"],
        ["predict", str(adapter), str(place / "data/images/00.png"), "--output", str(tmp_path / "out")],
        ["convert", str(adapter), str(tmp_path / "cli.safetensors")],
    ):
        app(command, result_action="return_value", exit_on_error=False)
    converted = load_model(tmp_path / "cli.safetensors").state_dict()
    assert all(torch.equal(ours[key], converted[key]) for key in ours)
    train(lora_recipe(place, base="run/best.safetensors", train__steps=2), tmp_path / "second")
    assert json.loads(file_header(tmp_path / "second/last.safetensors")["adapter"])["base"]["path"] == str(adapter)
    load_model(tmp_path / "second/last.safetensors")


def test_an_exported_adapter_predicts_as_the_adapter_does(place, tmp_path):
    pytest.importorskip("onnxscript", reason="needs the packages of the extra 'export'")
    adapter, exported = place / "run/best.safetensors", tmp_path / "adapter.onnx"
    image = str(place / "data/images/00.png")
    options = ["--size", "64x64", "--check-images", image]
    app(["export", str(adapter), str(exported), *options], result_action="return_value", exit_on_error=False)
    pixels, padding = torch.from_numpy(tiny.scene_image(1)).permute(2, 0, 1)[None], torch.zeros(1, 64, 64).bool()
    with torch.no_grad():
        ours, theirs, base = (
            Predictor(path, device="cpu").model(pixels, padding).final.class_logits
            for path in (adapter, exported, place / "base.safetensors")
        )
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
    assert (base - ours).abs().max() > 1e-3


def test_base_is_found_beside_the_adapter(place, tmp_path):
    shutil.copy(place / "run/best.safetensors", tmp_path / "mine.safetensors")
    shutil.copy(place / "base.safetensors", tmp_path)
    moved = tmp_path / "moved.safetensors"
    (place / "base.safetensors").rename(moved)
    try:
        load_model(tmp_path / "mine.safetensors")
        (tmp_path / "base.safetensors").unlink()
        with pytest.raises(CheckpointError) as error:
            convert(tmp_path / "mine.safetensors", tmp_path / "out.safetensors")
    finally:
        moved.rename(place / "base.safetensors")
    digest = weight_digest(place / "base.safetensors")[:16]
    assert str(error.value) == (
        f"{tmp_path}/mine.safetensors: is an adapter of {place}/base.safetensors with SHA-256 {digest}..., "
        "which is not there; put it there, or beside the adapter as base.safetensors"
    )
    assert not (tmp_path / "out.safetensors").exists()


def test_base_with_another_digest_is_refused(place, tmp_path):
    shutil.copytree(place / "data", tmp_path / "data")
    save_base(tmp_path, "base.safetensors", **SWIN)
    train(lora_recipe(tmp_path, train__steps=2), tmp_path / "run")
    save_base(tmp_path, "base.safetensors", **SWIN, model__num_queries=9)
    with pytest.raises(CheckpointError, match=r"but .*base\.safetensors has SHA-256 \w{16}\.\.\.; put it there, or"):
        load_model(tmp_path / "run/best.safetensors")


def rewrite(source, target, change_header=None, change_tensors=None):
    """Copy an adapter file without its checksum and with changes."""
    tensors, header = safetensors.torch.load_file(source), file_header(source)
    del header["checksum"]
    adapter = json.loads(header["adapter"])
    if change_header:
        change_header(adapter)
    if change_tensors:
        change_tensors(tensors)
    header["adapter"] = json.dumps(adapter)
    safetensors.torch.save_file(tensors, target, header)


QKV = "backbone.stages.0.blocks.0.attn.qkv.weight"


@pytest.mark.parametrize(
    ("change_header", "change_tensors", "message"),
    [
        (lambda adapter: adapter.pop("alpha"), None, "header of this adapter file is damaged: alpha: Field required"),
        (lambda adapter: adapter["base"].update(path=3), None, "damaged: base.*path: Input should be a valid string"),
        (lambda adapter: adapter["base"].update(path="\0"), None, "which is not there"),
        (None, lambda tensors: tensors.pop(f"{QKV}.lora_up"), "qkv.weight does not fit that weight of its base"),
        (None, lambda tensors: tensors.update({f"{QKV}.lora_up": torch.zeros(3, 4)}), "does not fit that weight"),
        (None, lambda tensors: tensors.update({"x.lora_up": torch.zeros(3, 4)}), "adapter of x does not fit"),
        (None, lambda tensors: tensors.update({f"{QKV}.lora_up": torch.full((72, 4), torch.nan)}), "NaN or infinite"),
    ],
)
def test_damaged_file_is_one_line(place, tmp_path, change_header, change_tensors, message):
    rewrite(place / "run/best.safetensors", tmp_path / "bad.safetensors", change_header, change_tensors)
    with pytest.raises(CheckpointError, match=message) as error:
        read_checkpoint(tmp_path / "bad.safetensors")
    assert "\n" not in str(error.value)


def test_changed_byte_is_noticed(place, tmp_path):
    content = bytearray((place / "run/best.safetensors").read_bytes())
    content[-3] ^= 1
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="its content has changed since it was written"):
        read_checkpoint(tmp_path / "bad.safetensors")


def test_run_with_other_classes_and_queries_stores_what_its_base_lacks(place, tmp_path):
    save_base(place, "few.safetensors", **SWIN, model__num_queries=5, model__window_size=4)
    train(lora_recipe(place, base="few.safetensors", train__steps=2), tmp_path / "run")
    model = load_model(tmp_path / "run/best.safetensors")
    assert model.state_dict()["masked_decoder.query_features.weight"].shape[0] == 8
    tensors = safetensors.torch.load_file(tmp_path / "run/best.safetensors")
    assert [name for name in tensors if name.endswith("relative_position_bias_table")]


def test_resumed_run_equals_the_uninterrupted_one_and_does_not_read_its_base(place, tmp_path, monkeypatch):
    changes = {"train__checkpoint_every": 1, "train__ema_decay": 0.5}
    train(lora_recipe(place, **changes), tmp_path / "whole")
    train_until(2, lora_recipe(place, **changes), tmp_path / "stopped", monkeypatch)
    monkeypatch.setattr("maskwright.training.setup.identify_base", None)
    train(lora_recipe(place, **changes), tmp_path / "stopped")
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    assert (
        file_header(tmp_path / "whole/best.safetensors")["adapter"]
        == (file_header(tmp_path / "stopped/best.safetensors")["adapter"])
    )
    with pytest.raises(RecipeError, match=r"holds a run with train\.lora="):
        train(lora_recipe(place, **changes, train__lora={"rank": 5}), tmp_path / "stopped")


def test_recomputed_blocks_give_the_same_bits(place, tmp_path):
    for name, on in (("kept", False), ("recomputed", True)):
        train(lora_recipe(place, train__gradient_checkpointing=on, train__steps=2), tmp_path / name)
    assert_same_run(tmp_path / "kept", tmp_path / "recomputed")


def test_adapter_without_gradient_stops_the_run(place, tmp_path, monkeypatch):
    real = LowRank.forward
    dead = "backbone.stages.1.blocks.0.mlp.fc1.weight"

    def forward(self, weight):
        return weight if weight.shape == (192, 48) else real(self, weight)

    monkeypatch.setattr(LowRank, "forward", forward)
    with pytest.raises(TrainingError) as error:
        train(lora_recipe(place, train__lora={"targets": ["backbone.stages.1.*"]}, train__steps=3), tmp_path / "run")
    assert str(error.value) == (
        f"train.lora: 2 adapter matrices have had no gradient in 3 steps: {dead} (down), {dead} (up); leave these "
        "weights out of train.lora.targets"
    )
    assert not (tmp_path / "run/best.safetensors").exists()


def test_check_waits_for_the_first_step_that_is_not_skipped(place):
    model = model_of(place)
    add_adapters(model, LoraConfig())
    check = AdapterCheck(model)
    for _ in range(9):
        check.after_step(last=False)
    with pytest.raises(TrainingError, match="have had no gradient in 10 steps"):
        check.after_step(last=False)
    check = AdapterCheck(model)
    for adapter in adapters_of(model).values():
        for parameter in adapter.parameters():
            parameter.grad = torch.ones_like(parameter)
    check.after_step(last=False)
    for parameter in model.parameters():
        parameter.grad = None
    for _ in range(20):
        check.after_step(last=True)


@pytest.mark.parametrize("backbone_norm", ["frozen", "batch"])
def test_all_but_head_freezes_weights_and_statistics(place, tmp_path, backbone_norm):
    changes = {"model__backbone": "test_resnet", "model__backbone_options": {}, "model__backbone_norm": backbone_norm}
    save_base(place, "resnet.safetensors", **SWIN | changes)
    recipe = lora_recipe(
        place,
        base="resnet.safetensors",
        train__lora=None,
        train__frozen_stages="all_but_head",
        train__steps=2,
        **changes,
    )
    train(recipe, tmp_path / "run")
    before, after = (
        load_model(p).state_dict() for p in (place / "resnet.safetensors", tmp_path / "run/last.safetensors")
    )
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    assert changed == {key for key in after if key.startswith(HEAD)}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.lora={}"], "lora would freeze random weights; set initial_weights to a checkpoint of a whole model"),
        (["train.frozen_stages=all_but_head"], "frozen_stages all_but_head would freeze random weights"),
        (
            ["train.lora={}", "train.frozen_stages=all_but_head", "train.initial_weights=x"],
            "leaves nothing for lora to adapt",
        ),
        (["train.frozen_stages=5"], "input should be 0, 1, 2, 3, 4 or 'all_but_head'; found 5"),
    ],
)
def test_contradictions_are_refused(overrides, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe("camvid-quick", overrides)


def train_in_two(place):
    train_module.report.curves = lambda log, file: file.write_text("curves")
    train_module.report.report = lambda run, file, **content: file.write_text("report")
    place = Path(place)
    train(lora_recipe(place, **WHOLE_CROPS), place / "two")
    train(lora_recipe(place, train__fsdp=True, **WHOLE_CROPS), place / "sharded")


def test_two_processes_and_shards_learn_the_same(place):
    train(lora_recipe(place, **WHOLE_CROPS), place / "one")
    processes = start_ranks(train_in_two, str(place), world=2, output=place / "out")
    assert wait(*processes) == [0, 0], "\n".join((place / f"out{rank}").read_text() for rank in range(2))
    expected = load_model(place / "one/last.safetensors").state_dict()
    for name in ("two", "sharded"):
        torch.testing.assert_close(losses(place / name), losses(place / "one"), rtol=1e-5, atol=1e-5)
        found = load_model(place / name / "last.safetensors").state_dict()
        for key in found:
            torch.testing.assert_close(found[key], expected[key], rtol=0, atol=2e-4, msg=key)
