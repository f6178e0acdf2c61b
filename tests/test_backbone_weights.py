"""Backbone weights in all published layouts, compared to the programs that wrote them."""

import json
import pickle
import re
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.models.swin_transformer import checkpoint_filter_fn
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter

from maskwright.checkpoints.backbone import load_backbone_weights
from maskwright.checkpoints.checkpoint import save_checkpoint
from maskwright.checkpoints.key_maps.backbones import BACKBONE_KEY_MAPS
from maskwright.checkpoints.key_maps.key_map import State
from maskwright.checkpoints.key_maps.translate import find_key_map, translate
from maskwright.config.schema import ModelConfig
from maskwright.errors import CheckpointError
from maskwright.models import build_model
from maskwright.models.segmenter import Segmenter
from maskwright.structures.annotations import Category
from tests.test_checkpoint import SWIN, packed, to_detectron2
from tests.test_checkpoint import build as whole_model

DEPTHS = [1, 2, 1, 1]
SMALL_SWIN = {"embed_dim": 24, "depths": [2, 2, 2, 1], "num_heads": [1, 2, 3, 4]}
MEAN, STD = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
IMAGES = torch.randint(0, 256, (1, 3, 128, 128), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
OUR_SWIN = {"backbone": SWIN, "backbone_options": SMALL_SWIN, "window_size": 4}
RESNET = {"backbone": "resnet50", "backbone_options": {"layers": DEPTHS}}
X_RESNET = {"backbone": "resnext50_32x4d", "backbone_options": {"layers": DEPTHS}}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder, and no network."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv("MASKWRIGHT_CACHE", str(folder))
    create = timm.create_model

    def offline(name: str, pretrained: bool = False, **options: object) -> nn.Module:
        if pretrained:
            raise ConnectionError("no network here")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    return folder


def build(**changes: object) -> Segmenter:
    config = ModelConfig(family="semantic_fpn", width=32, **changes)
    torch.manual_seed(1)
    return build_model(config, (Category(0, "all", False, (0, 0, 0)),)).eval()


def swin(window: int = 4, **changes: object) -> Segmenter:
    return build(**OUR_SWIN | {"window_size": window}, **changes)


def shaken(network: nn.Module) -> nn.Module:
    """The network in evaluation mode, with norms that do something."""
    torch.manual_seed(2)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return network.eval()


def resnet(**options: object) -> torchvision.models.ResNet:
    block = torchvision.models.resnet.Bottleneck if options else torchvision.models.resnet.BasicBlock
    return shaken(torchvision.models.ResNet(block, DEPTHS, num_classes=7, **options))


def features(network: torchvision.models.ResNet, pixels: torch.Tensor) -> list[torch.Tensor]:
    layers = {f"layer{stage}": stage for stage in (1, 2, 3, 4)}
    with torch.inference_mode():
        return list(IntermediateLayerGetter(network, layers)(pixels).values())


def our_features(model: Segmenter) -> list[torch.Tensor]:
    """Of IMAGES, as the model sees them."""
    with torch.inference_mode():
        return list(model.backbone(model.normalize(IMAGES, None)).features.values())


def normalized(mean: torch.Tensor = MEAN, std: torch.Tensor = STD) -> torch.Tensor:
    return (IMAGES.float() - mean[:, None, None]) / std[:, None, None]


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected) == 4
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.std() > 1e-3
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-5 * theirs.abs().max().item())


def refuse(**changes: object) -> str:
    with torch.device("meta"):  # numbers take time, and none are needed
        model = build(**changes)
    with pytest.raises(CheckpointError) as error:
        load_backbone_weights(model)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("model.backbone_weights: ")
    return message


# ResNets


def to_detectron2_resnet(state: State) -> State:
    """As `tools/convert-torchvision-to-d2.py` of the original renames them."""
    theirs = {}
    for key, tensor in state.items():
        name = key if "layer" in key else f"stem.{key}"
        name = re.sub(r"layer(\d)", lambda found: f"res{int(found[1]) + 1}", name)
        name = re.sub(r"bn(\d)", r"conv\1.norm", name)
        theirs[name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")] = tensor
    return theirs


def to_caffe2(state: State, parts: dict[str, str]) -> State:
    """As Caffe2 names them; `parts` has its names of the parts of a batch norm."""
    theirs = {"fc1000_w": state["fc.weight"], "fc1000_b": state["fc.bias"]}
    for key, tensor in state.items():
        if key.startswith("fc.") or key.endswith("num_batches_tracked"):
            continue
        module, part = key.rsplit(".", 1)
        if found := re.fullmatch(r"layer(\d)\.(\d)\.(.*)", module):
            branch = {"1": "2a", "2": "2b", "3": "2c"}.get(found[3][-1], "") if "downsample" not in found[3] else "1"
            name, norm = (
                f"res{int(found[1]) + 1}_{found[2]}_branch{branch}",
                found[3][:2] == "bn" or found[3][-2:] == ".1",
            )
        else:
            name, norm = ("res_conv1", True) if module == "bn1" else ("conv1", False)
        theirs[f"{name}_bn_{parts[part]}" if norm else f"{name}_w"] = tensor
    return theirs


UNFOLDED = {"weight": "gamma", "bias": "beta", "running_mean": "running_mean", "running_var": "running_var"}
SHORT = {"weight": "s", "bias": "b", "running_mean": "rm", "running_var": "riv"}


def folded(network: nn.Module) -> State:
    """The state of a network whose norms are scale and shift alone."""
    state = network.state_dict()
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            scale = module.weight / (module.running_var + module.eps).sqrt()
            state |= {f"{name}.weight": scale, f"{name}.bias": module.bias - module.running_mean * scale}
            del state[f"{name}.running_mean"], state[f"{name}.running_var"]
    return {key: value.detach() for key, value in state.items()}


def write_pickle(path: Path, state: State, **extras: object) -> None:
    path.write_bytes(pickle.dumps({"model": {key: value.numpy() for key, value in state.items()}, **extras}))


@pytest.mark.parametrize(
    ("backbone", "options", "norm"),
    [
        ("resnet18", {}, "frozen"),
        ("resnet50", {"groups": 1}, "sync"),
        ("wide_resnet50_2", {"width_per_group": 128}, "frozen"),
        ("resnext50_32x4d", {"groups": 32, "width_per_group": 4}, "batch"),
    ],
)
def test_resnets_of_torchvision_give_the_same_features(tmp_path, backbone, options, norm):
    theirs = resnet(**options)
    torch.save(theirs.state_dict(), tmp_path / "net.pth")
    model = build(
        backbone=backbone,
        backbone_options={"layers": DEPTHS},
        backbone_norm=norm,
        backbone_weights=str(tmp_path / "net.pth"),
    )
    assert load_backbone_weights(model) == [f"model.backbone_weights: {tmp_path}/net.pth"]
    assert_equal(our_features(model), features(theirs, normalized()))


def test_a_torchvision_resnet_that_detectron2_has_converted_gives_the_same_features(tmp_path):
    theirs = resnet(groups=1)
    write_pickle(tmp_path / "R-50.pkl", to_detectron2_resnet(theirs.state_dict()), __author__="torchvision")
    model = build(**RESNET, backbone_weights=str(tmp_path / "R-50.pkl"))
    (line,) = load_backbone_weights(model)
    assert line.endswith("R-50.pkl (detectron2 ResNet)")
    assert_equal(our_features(model), features(theirs, normalized()))


@pytest.mark.parametrize("parts", [UNFOLDED, SHORT], ids=["detectron2", "caffe2"])
def test_a_caffe2_resnet_on_bgr_gives_the_same_features_from_rgb(tmp_path, parts):
    theirs = resnet(groups=32, width_per_group=4)
    write_pickle(tmp_path / "X-50.pkl", to_caffe2(theirs.state_dict(), parts))
    model = build(**X_RESNET, backbone_norm="batch", backbone_weights=str(tmp_path / "X-50.pkl"))
    _, line = load_backbone_weights(model)
    assert line == "first convolution: converted from BGR (divided by [57.375, 57.12, 58.395]) to the recipe's RGB"
    assert_equal(our_features(model), features(theirs, normalized().flip(1)))


@pytest.mark.parametrize("std", [(58.395, 57.12, 57.375), (1.0, 2.0, 3.0)])
def test_folded_norms_of_detectron_on_unscaled_bgr_give_the_same_features_from_any_scale(tmp_path, std):
    theirs = resnet(groups=32, width_per_group=4)
    theirs.conv1.weight.data /= 57  # as is learned from pixels of that size
    plain = {key: value.numpy() for key, value in to_caffe2(folded(theirs), SHORT).items()}
    (tmp_path / "X.pkl").write_bytes(pickle.dumps(plain | {"conv1_w_momentum": plain["conv1_w"]}))
    model = build(**X_RESNET, pixel_std=std, backbone_weights=str(tmp_path / "X.pkl"))
    _, norms, convolution = load_backbone_weights(model)
    assert norms.startswith("batch norms: the statistics are folded")
    assert convolution.startswith("first convolution: converted from BGR (divided by [1.0, 1.0, 1.0])")
    assert_equal(our_features(model), features(theirs, normalized(std=torch.ones(3)).flip(1)))


@pytest.mark.parametrize("norm", ["batch", "sync"])
def test_folded_norms_cannot_be_trained(tmp_path, norm):
    write_pickle(tmp_path / "X.pkl", to_caffe2(folded(resnet(groups=32, width_per_group=4)), SHORT))
    message = refuse(**X_RESNET, backbone_norm=norm, backbone_weights=str(tmp_path / "X.pkl"))
    assert f"model.backbone_norm={norm}; use model.backbone_norm=frozen" in message


@pytest.mark.parametrize("fold", [False, True])
def test_msra_resnet_is_refused_because_of_its_strides(tmp_path, fold):
    network = resnet(groups=1)
    theirs = to_caffe2(folded(network), SHORT) if fold else to_caffe2(network.state_dict(), UNFOLDED)
    write_pickle(tmp_path / "R-50.pkl", theirs | {"conv1_b": torch.zeros(64)})
    message = refuse(**RESNET, backbone_weights=str(tmp_path / "R-50.pkl"))
    assert "an MSRA ResNet, whose stages have their stride in the first 1x1 convolution" in message
    assert "use torchvision/R-50.pkl" in message


def test_detectron2_detector_is_refused_because_its_channel_order_is_unknown(tmp_path):
    state = to_detectron2_resnet(resnet(groups=1).state_dict())
    write_pickle(tmp_path / "rcnn.pkl", {f"backbone.bottom_up.{key}": value for key, value in state.items()})
    message = refuse(**RESNET, backbone_weights=str(tmp_path / "rcnn.pkl"))
    assert "does not record whether its images are RGB or BGR" in message


# Swin


def timm_swin(window: int = 4, **options: object) -> nn.Module:
    torch.manual_seed(0)
    network = timm.create_model(SWIN, img_size=32 * window, window_size=window, num_classes=7, **(SMALL_SWIN | options))
    return shaken(network)


def to_official(state: State) -> State:
    """timm's names as those of microsoft/Swin-Transformer, with its buffers."""
    theirs = {}
    for key, tensor in state.items():
        key = re.sub(r"layers\.(\d)\.downsample", lambda found: f"layers.{int(found[1]) - 1}.downsample", key)
        theirs[key.replace("head.fc.", "head.")] = tensor
        if key.endswith("relative_position_bias_table"):
            theirs[key.replace("bias_table", "index")] = torch.zeros(16, 16, dtype=torch.int64)
    return theirs | {"layers.0.blocks.1.attn_mask": torch.zeros(64, 16, 16)}


def stage_outputs(network: nn.Module) -> list[torch.Tensor]:
    """Of a timm Swin, before any norm behind a stage; NCHW."""
    x, outputs = network.patch_embed(normalized()), []
    for stage in network.layers:
        x = stage(x)
        outputs.append(x.permute(0, 3, 1, 2))
    return outputs


def our_stage_outputs(model: Segmenter) -> list[torch.Tensor]:
    for norm in model.backbone.norms:
        norm.forward = lambda x: x
    return our_features(model)


def save_official(path: Path, state: State) -> None:
    torch.save({"model": to_official(state), "epoch": 300}, path)


def save_converted(path: Path, state: State) -> None:
    """As `tools/convert-pretrained-swin-model-to-d2.py` of the original writes it."""
    content = {"model": to_official(state), "__author__": "third_party", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content))


@torch.inference_mode()
@pytest.mark.parametrize(("name", "save"), [("swin.pth", save_official), ("swin.pkl", save_converted)])
def test_the_official_swin_gives_the_features_of_timm(tmp_path, name, save):
    theirs = timm_swin()
    save(tmp_path / name, theirs.state_dict())
    model = swin(backbone_weights=str(tmp_path / name))
    norms = [norm.weight.clone() for norm in model.backbone.norms]
    line, new = load_backbone_weights(model)
    assert line.endswith(f"{name} (official Swin)")
    assert new == "not in the weights, so initialized as in a new model: backbone.norms"
    assert all(torch.equal(norm.weight, old) for norm, old in zip(model.backbone.norms, norms, strict=True))
    assert_equal(our_stage_outputs(model), stage_outputs(theirs))


@pytest.mark.parametrize("name", sorted({name.partition(".")[0] for name in timm.list_pretrained("swin_*_patch4_*")}))
def test_every_published_swin_is_placed_where_timm_places_it(name):
    """Names and shapes of all sizes, without numbers; the judge is timm's own converter."""
    with torch.device("meta"):
        judge, ours = timm.create_model(name), build(backbone=name).backbone.state_dict()
    official = to_official(judge.state_dict())
    placed = checkpoint_filter_fn({"model": official}, judge)
    key_map = next(each.key_map for each in BACKBONE_KEY_MAPS if find_key_map(official, [each.key_map]))
    found = translate(official, key_map).state
    assert found.keys() == {f"backbone.{key}" for key in ours if not key.startswith("norms.")}
    for key, tensor in found.items():
        assert tensor is placed[re.sub(r"^backbone\.(stages)?", lambda match: "layers" if match[1] else "", key)]
        assert tensor.shape == ours[key.removeprefix("backbone.")].shape


@torch.inference_mode()
def test_semantic_layers_keep_their_start_when_the_swin_around_them_is_filled(tmp_path):
    theirs = timm_swin()
    save_official(tmp_path / "swin.pth", theirs.state_dict())
    model = swin(backbone_weights=str(tmp_path / "swin.pth"), semantic_attention=["window"] * 4)
    before = {key: value.clone() for key, value in model.backbone.semantic_layers.state_dict().items()}
    load_backbone_weights(model)
    assert all(torch.equal(value, before[key]) for key, value in model.backbone.semantic_layers.state_dict().items())
    assert torch.equal(model.backbone.patch_embed.proj.weight, theirs.patch_embed.proj.weight)


def test_swin_of_torchvision_gives_its_features(tmp_path):
    torch.manual_seed(0)
    theirs = shaken(torchvision.models.SwinTransformer([4, 4], 24, [2, 2, 2, 1], [1, 2, 3, 4], [4, 4], num_classes=7))
    torch.save(theirs.state_dict(), tmp_path / "swin_t.pth")
    model = swin(backbone_weights=str(tmp_path / "swin_t.pth"))
    load_backbone_weights(model)
    x, expected = normalized(), []
    for number, layer in enumerate(theirs.features):
        x = layer(x)
        if number % 2:
            expected.append(x.permute(0, 3, 1, 2))
    assert_equal(our_stage_outputs(model), expected)


@torch.inference_mode()
def test_swin_of_openmmlab_gives_the_features_of_timm(tmp_path):
    """Their merging gathers neighbors with `unfold`, which the judge here does itself."""
    theirs, state = timm_swin(), {}
    for key, tensor in to_official(timm_swin().state_dict()).items():
        key = re.sub(r"^layers\.", "stages.", key).replace("patch_embed.proj", "patch_embed.projection")
        key = (
            key.replace(".attn.", ".attn.w_msa.")
            .replace("mlp.fc1", "ffn.layers.0.0")
            .replace("mlp.fc2", "ffn.layers.1")
        )
        if ".downsample." in key:  # (h, w) neighbors: slowest first and column by column, to fastest and row by row
            tensor = tensor.unflatten(-1, (2, 2, -1)).movedim(-1, -3).transpose(-1, -2).flatten(-3)
        if not key.startswith("norm."):
            state[key] = tensor
    torch.save({"state_dict": state}, tmp_path / "swin.pth")
    model = swin(backbone_weights=str(tmp_path / "swin.pth"))
    load_backbone_weights(model)
    assert_equal(our_stage_outputs(model), stage_outputs(theirs))


@pytest.fixture
def transformers():
    module = pytest.importorskip("transformers")
    module.logging.set_verbosity_error()
    module.logging.disable_progress_bar()
    torch.manual_seed(0)
    return module


STAGES = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
THEIR_SWIN = {"image_size": 128, "embed_dim": 24, "depths": [2, 2, 2, 1], "num_heads": [1, 2, 3, 4], "window_size": 4}


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["swin", "resnet"])
@pytest.mark.parametrize("place", ["folder", "folder/model.safetensors"])
def test_backbones_of_transformers_give_their_features(tmp_path, kind, place, transformers):
    if kind == "resnet":
        config = transformers.ResNetConfig(hidden_sizes=[256, 512, 1024, 2048], depths=DEPTHS, **STAGES)
        theirs, ours = shaken(transformers.ResNetBackbone(config)), RESNET
    else:
        theirs, ours = shaken(transformers.SwinBackbone(transformers.SwinConfig(**THEIR_SWIN, **STAGES))), OUR_SWIN
    theirs.save_pretrained(tmp_path / "folder")
    model = build(**ours, backbone_weights=str(tmp_path / place))
    load_backbone_weights(model)
    assert_equal(our_features(model), list(theirs(normalized()).feature_maps))


@torch.inference_mode()
def test_a_classifier_of_transformers_is_its_backbone_and_tells_its_pixels(tmp_path, transformers):
    theirs = shaken(transformers.SwinForImageClassification(transformers.SwinConfig(**THEIR_SWIN)))
    theirs.save_pretrained(tmp_path)
    processor = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    model = swin(backbone_weights=str(tmp_path))
    *_, mean, std = load_backbone_weights(model)
    assert [re.findall(r"with (\w+) (\[.*?\])", line) for line in (mean, std)] == [
        [("pixel_mean", "[127.5, 127.5, 127.5]")],
        [("pixel_std", "[127.5, 127.5, 127.5]")],
    ]
    last = theirs(normalized(), output_hidden_states=True).reshaped_hidden_states[-1]
    torch.testing.assert_close(our_stage_outputs(model)[-1], last, rtol=2e-4, atol=1e-5)


def test_a_resnet_of_transformers_with_early_strides_is_refused(tmp_path, transformers):
    config = transformers.ResNetConfig(depths=DEPTHS, downsample_in_bottleneck=True)
    transformers.ResNetModel(config).save_pretrained(tmp_path)
    assert "downsample_in_bottleneck is True, but only" in refuse(**RESNET, backbone_weights=str(tmp_path))


def test_a_model_on_the_hub_is_read_like_its_folder(tmp_path, monkeypatch):
    import huggingface_hub

    theirs = timm_swin()
    safetensors.torch.save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architecture": "swin_tiny"}')
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(tmp_path))
    model = swin(backbone_weights="somebody/swin")
    load_backbone_weights(model)
    assert_equal(our_stage_outputs(model), [output.detach() for output in stage_outputs(theirs)])


# SeMask


def test_a_swin_with_semantic_layers_takes_the_weights_of_a_plain_one(tmp_path):
    save_official(tmp_path / "swin.pth", timm_swin().state_dict())
    path = str(tmp_path / "swin.pth")
    plain, model = swin(backbone_weights=path), swin(backbone_weights=path, semantic_attention=["window"] * 4)
    load_backbone_weights(plain)
    _, line = load_backbone_weights(model)
    assert line == "not in the weights, so initialized as in a new model: backbone.norms, backbone.semantic_layers"
    ours = model.state_dict()
    assert all(torch.equal(value, ours[key]) for key, value in plain.state_dict().items() if ".stages." in key)


# Windows


@pytest.mark.parametrize(("old", "new"), [(4, 6), (7, 4)])
def test_another_window_resizes_position_tables_bicubically_and_says_so(tmp_path, old, new):
    theirs = timm_swin(old)
    save_official(tmp_path / "swin.pth", theirs.state_dict())
    model = swin(new, backbone_weights=str(tmp_path / "swin.pth"))
    _, line, _ = load_backbone_weights(model)
    assert line == f"relative position tables of 7 blocks resized bicubically from window {old} to {new}"
    table = theirs.layers[2].blocks[1].attn.relative_position_bias_table.detach()  # (side * side, heads)
    side, wanted = 2 * old - 1, 2 * new - 1
    grid = table.permute(1, 0).view(1, 3, side, side)
    expected = F.interpolate(grid, size=(wanted, wanted), mode="bicubic").view(3, wanted * wanted).permute(1, 0)
    torch.testing.assert_close(model.backbone.stages[2].blocks[1].attn.relative_position_bias_table.detach(), expected)


# Any network of timm


@pytest.mark.parametrize(
    ("backbone", "norm"),
    [
        ("resnet18", "frozen"),
        ("resnet18", "batch"),
        (SWIN, "frozen"),
        ("convnext_atto", "frozen"),
        ("mobilenetv3_small_050", "frozen"),
        ("densenet121", "frozen"),
        ("coatnext_nano_rw_224", "frozen"),
    ],
)
def test_weights_with_the_names_of_timm_fill_any_backbone(tmp_path, backbone, norm):
    network = timm.create_model(backbone)
    safetensors.torch.save_file(network.state_dict(), tmp_path / "backbone.safetensors")
    model = build(backbone=backbone, backbone_norm=norm, backbone_weights=str(tmp_path / "backbone.safetensors"))
    load_backbone_weights(model)
    loaded = dict(model.backbone.named_parameters())
    known = {(*value.shape, value.double().sum().item()) for value in network.state_dict().values()}
    found = {(*value.shape, value.double().sum().item()) for key, value in loaded.items() if "norms." not in key}
    assert found <= known


@pytest.mark.parametrize("wrap", ["{}", "module.{}"])
def test_prefixes_of_wrappers_are_removed(tmp_path, wrap):
    theirs = resnet()
    state = {wrap.format(key): value for key, value in theirs.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "net.pth")
    model = build(backbone="resnet18", backbone_options={"layers": DEPTHS}, backbone_weights=str(tmp_path / "net.pth"))
    load_backbone_weights(model)
    assert_equal(our_features(model), features(theirs, normalized()))


@pytest.mark.parametrize(
    ("setting", "backbone", "file"),
    [
        ("timm", "resnet18.tv_in1k", "resnet18-f37072fd.pth"),
        ("timm", "resnet18.tv_in1k", "resnet18.tv_in1k.safetensors"),
        ("resnet18.tv_in1k", "resnet18", "resnet18-f37072fd.pth"),
        ("resnet18-f37072fd.pth", "resnet18", "resnet18-f37072fd.pth"),
        ("resnet18-f37072fd.pth", "resnet18", "resnet18.tv_in1k.safetensors"),
        ("my/own.pth", "resnet18", "my/own.pth"),
    ],
)
def test_a_file_in_the_cache_folder_is_used_without_network(cache, setting, backbone, file):
    theirs = resnet()
    (cache / file).parent.mkdir(exist_ok=True)
    if file.endswith(".pth"):
        torch.save(theirs.state_dict(), cache / file)
    else:
        safetensors.torch.save_file(theirs.state_dict(), cache / file)
    model = build(backbone=backbone, backbone_options={"layers": DEPTHS}, backbone_weights=setting)
    (line,) = load_backbone_weights(model)
    assert line.startswith("model.backbone_weights: ")
    assert line.endswith(str(cache / file))
    assert_equal(our_features(model), features(theirs, normalized()))


@pytest.mark.parametrize(
    ("setting", "backbone", "wanted"),
    [
        (
            "timm",
            "resnet50.tv_in1k",
            "download https://download.pytorch.org/models/resnet50-0676ba61.pth to {}/resnet50-0676ba61.pth",
        ),
        (
            "timm",
            "swin_base_patch4_window12_384.ms_in22k",
            "download https://github.com/SwinTransformer/storage/releases/download/v1.0.0/"
            "swin_base_patch4_window12_384_22k.pth to {}/swin_base_patch4_window12_384_22k.pth",
        ),
        (
            "swin_tiny_patch4_window7_224.pth",
            SWIN,
            "download https://github.com/SwinTransformer/storage/releases/download/v1.0.0/"
            "swin_tiny_patch4_window7_224.pth to {}/swin_tiny_patch4_window7_224.pth",
        ),
        (
            "timm",
            "test_resnet",
            "download https://huggingface.co/timm/test_resnet.r160_in1k/resolve/main/model.safetensors "
            "to {}/test_resnet.r160_in1k.safetensors",
        ),
        (
            "torchvision/R-50.pkl",
            "resnet50",
            "download https://dl.fbaipublicfiles.com/detectron2/ImageNetPretrained/torchvision/R-50.pkl to that path",
        ),
    ],
)
def test_without_network_the_message_says_which_file_to_put_where(cache, setting, backbone, wanted):
    message = refuse(backbone=backbone, backbone_weights=setting)
    assert wanted.format(cache) in message


@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        ("nothing.pth", "no file nothing.pth, neither here nor in "),
        ("swin_tiny_patch4_window7_22k.pth", "nearest known: swin_tiny_patch4_window7_224"),
        ("R-50.pkl", "torchvision/R-50.pkl"),
        ("resnet50.tv", "timm has no weights of 'resnet50.tv'; nearest: resnet50.tv_in1k, "),
    ],
)
def test_error_for_an_unknown_name_lists_similar_names(setting, wanted):
    assert wanted in refuse(backbone="resnet18", backbone_weights=setting)


def test_a_network_that_timm_has_no_weights_of_says_so():
    message = refuse(backbone="resnet33ts", backbone_weights="resnet50_mlp")
    assert "timm has no weights of 'resnet50_mlp'; nearest: resnet" in message


def test_null_changes_nothing():
    model = build(backbone="resnet18")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert load_backbone_weights(model) == []
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# Whole checkpoints


@pytest.mark.parametrize("kind", ["ours", "detectron2"])
def test_the_backbone_of_a_whole_checkpoint_is_taken_with_its_norms(tmp_path, kind):
    whole = whole_model()
    path = tmp_path / "whole.safetensors"
    if kind == "ours":
        save_checkpoint(path, packed(whole))
    else:
        safetensors.torch.save_file(to_detectron2(whole.state_dict()), path)
    model = build(backbone=SWIN, backbone_options=whole.config.backbone_options, backbone_weights=str(path))
    (line,) = load_backbone_weights(model)
    assert line.endswith(f"the backbone of {path}")
    taken = model.backbone.state_dict()
    assert all(torch.equal(value, taken[key]) for key, value in whole.backbone.state_dict().items())


def test_other_normalization_is_reported(tmp_path):
    whole = whole_model(pixel_mean=(127.5, 127.5, 127.5))
    save_checkpoint(tmp_path / "whole.safetensors", packed(whole))
    options = {
        "backbone_options": whole.config.backbone_options,
        "backbone_weights": str(tmp_path / "whole.safetensors"),
    }
    _, line = load_backbone_weights(build(backbone=SWIN, **options))
    assert line == (
        "warning: the backbone was trained with pixel_mean [127.5, 127.5, 127.5], "
        "model.pixel_mean is [123.675, 116.28, 103.53]"
    )
    assert len(load_backbone_weights(build(backbone=SWIN, pixel_mean=(127.5, 127.5, 127.5), **options))) == 1


# What does not fit


@pytest.mark.parametrize(
    ("weights", "options", "wanted"),
    [
        (
            "resnet18",
            {"layers": [1, 2, 3, 1]},
            "depths [1, 2, 3, 1] instead of [1, 2, 1, 1]; ",
        ),
        ("resnet50", {}, "unexpected: backbone.layer1.0.bn3.bias, "),
        (
            "resnet18",
            {"channels": [32, 64, 128, 256]},
            "with another shape: backbone.network.layer1.0.bn1.bias (32,) instead of (64,)",
        ),
        ("resnet18d", {}, "missing: backbone.network.conv1.weight"),
        ("convnext_atto", {}, "missing: backbone.network.bn1.bias"),
    ],
)
def test_weights_of_another_network_of_timm_are_refused(tmp_path, weights, options, wanted):
    options = options if weights == "convnext_atto" else {"layers": DEPTHS} | options
    torch.save(timm.create_model(weights, **options).state_dict(), tmp_path / "net.pth")
    settings = {"backbone_options": {"layers": DEPTHS}, "backbone_weights": str(tmp_path / "net.pth")}
    message = refuse(backbone="resnet18", **settings)
    assert "does not fit 'resnet18'; " in message
    assert wanted in message


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"depths": [2, 2, 6, 2]}, "depths [2, 2, 6, 2] instead of [2, 2, 2, 1]; "),
        (
            {"embed_dim": 48},
            "backbone.patch_embed.proj.weight (48, 3, 4, 4) instead of (24, 3, 4, 4)",
        ),
        ({"num_heads": [3, 6, 12, 24]}, "relative_position_bias_table (49, 3) instead of (49, 1)"),
    ],
)
def test_official_swins_of_another_size_are_refused(tmp_path, options, wanted):
    save_official(tmp_path / "swin.pth", timm_swin(**options).state_dict())
    assert wanted in refuse(**OUR_SWIN, backbone_weights=str(tmp_path / "swin.pth"))


@pytest.mark.parametrize("layout", [to_detectron2_resnet, to_official])
def test_a_part_of_the_weights_is_refused_with_what_is_missing(tmp_path, layout):
    whole = timm_swin().state_dict() if layout is to_official else resnet().state_dict()
    part = {key: value for key, value in whole.items() if not re.search(r"3\.(blocks\.)?0", key)}
    torch.save(layout(part), tmp_path / "part.pth")
    changes = OUR_SWIN if layout is to_official else {"backbone": "resnet18", "backbone_options": {"layers": DEPTHS}}
    message = refuse(**changes, backbone_weights=str(tmp_path / "part.pth"))
    assert re.search(r"missing: backbone\.(stages\.3\.blocks\.0|network\.layer3\.0)\.", message)


def test_entries_that_no_backbone_has_are_refused(tmp_path):
    save_official(tmp_path / "swin.pth", timm_swin().state_dict() | {"absolute_pos_embed": torch.zeros(1, 49, 24)})
    message = refuse(**OUR_SWIN, backbone_weights=str(tmp_path / "swin.pth"))
    assert "1 entries of the official Swin checkpoint are unknown: absolute_pos_embed" in message
