"""ResNets and Swins against timm with the same weights (features, gradients, initialization), plain and CPU paths."""

from types import MethodType

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock, window_partition, window_reverse
from torch import Tensor, nn

from maskwright.errors import RecipeError
from maskwright.models.backbones.base import BackboneOutput, FrozenBatchNorm
from maskwright.models.backbones.build import build_backbone
from maskwright.models.backbones.timm import build_timm_backbone
from maskwright.runtime.device import autocast, has_fast_bfloat16

TINY = "swin_tiny_patch4_window7_224"
SMALL = {"embed_dim": 24, "depths": [2, 2, 3, 1], "num_heads": [1, 2, 3, 4]}
SWINS = [
    pytest.param(TINY, SMALL, None, (2, 3, 100, 147), id="odd sizes"),
    pytest.param(TINY, SMALL, 4, (1, 3, 128, 128), id="windows that fit"),
    pytest.param(TINY, SMALL, None, (1, 3, 9, 300), id="maps smaller than a window"),
    pytest.param(TINY, SMALL, 1, (1, 3, 20, 20), id="windows of one cell"),
    pytest.param(
        TINY,
        SMALL | {"qkv_bias": False, "head_dim": 7, "mlp_ratio": [2.0, 1.0, 1.5, 3.0], "in_chans": 5},
        5,
        (3, 5, 33, 70),
        id="other widths inside",
    ),
    pytest.param("swin_s3_tiny_224", {"depths": [1, 2, 2, 1], "embed_dim": 24}, None, (1, 3, 260, 130), id="s3"),
]


@pytest.fixture
def plain_path(monkeypatch):
    """Run what accelerators run, on a CPU."""
    monkeypatch.setattr("maskwright.models.backbones.swin.uses_cpu_path", lambda x: False)
    monkeypatch.setattr("maskwright.models.backbones.resnet_cpu.uses_cpu_path", lambda x: False)


@pytest.fixture(params=["plain", "cpu"])
def path(request):
    """Run a test with the plain path and with the CPU path."""
    if request.param == "plain":
        request.getfixturevalue("plain_path")


def build(name: str, options: dict, norm: str = "frozen", window: int | None = None, drop_path: float = 0.0):
    options = dict(options)
    channels = options.pop("in_chans", 3)
    return build_backbone(name, options=options, norm=norm, window=window, drop_path=drop_path, channels=channels)


def pad_then_shift(block: SwinTransformerBlock, x: Tensor) -> Tensor:
    """timm's block with the original's order of steps."""
    _, h, w, _ = x.shape
    window, shift = block.window_size[0], block.target_shift_size[0]
    cells = F.pad(block.norm1(x), (0, 0, 0, -w % window, 0, -h % window)).roll((-shift, -shift), (1, 2))
    height, width = cells.shape[1:3]
    mask = None
    if shift:
        region = torch.zeros(1, height, width, 1)
        for row in (-window, -shift):
            region[:, row:] += 3
        for column in (-window, -shift):
            region[:, :, column:] += 1
        regions = window_partition(region, (window, window)).flatten(1)
        mask = (regions[:, None] != regions[:, :, None]) * -100.0
    attended = block.attn(window_partition(cells, (window, window)).flatten(1, 2), mask=mask)
    back = window_reverse(attended.unflatten(1, (window, window)), (window, window), height, width)
    x = x + block.drop_path1(back.roll((shift, shift), (1, 2))[:, :h, :w])
    return x + block.drop_path2(block.mlp(block.norm2(x)))


def timm_swin(name: str, options: dict, window: int | None, drop_path: float = 0.0) -> nn.Module:
    arguments = options | ({"window_size": window} if window else {})
    network = timm.create_model(
        name, num_classes=0, strict_img_size=False, always_partition=True, drop_path_rate=drop_path, **arguments
    )
    for block in network.modules():
        if isinstance(block, SwinTransformerBlock):
            block.forward = MethodType(pad_then_shift, block)
    return network


def timm_features(network: nn.Module, images: Tensor) -> list[Tensor]:
    """Return the output of each stage, layer-normed without scale or shift, NCHW."""
    x = network.patch_embed(F.pad(images, (0, -images.shape[3] % 4, 0, -images.shape[2] % 4)))
    features = []
    for stage in network.layers:
        x = stage(x)
        features.append(F.layer_norm(x, x.shape[-1:]).permute(0, 3, 1, 2))
    return features


def randomize(network: nn.Module) -> None:
    """Give random values to everything that is initialized with zeros or ones."""
    for parameter in network.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    for name, buffer in network.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * max(theirs.abs().max().item(), 1e-6))


def both_swins(name: str, options: dict, window: int | None, drop_path: float = 0.0):
    torch.manual_seed(0)
    ours, theirs = build(name, options, "frozen", window, drop_path), timm_swin(name, options, window, drop_path)
    randomize(theirs)
    state = {key.replace("layers.", "stages."): value for key, value in theirs.state_dict().items()}
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert all(key.startswith("norms.") for key in missing)
    assert set(unexpected) == {"norm.weight", "norm.bias"}
    return ours, theirs


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(("name", "options", "window", "shape"), SWINS)
def test_swins_have_the_features_and_gradients_of_timm_with_the_originals_order_of_steps(name, options, window, shape):
    ours, theirs = both_swins(name, options, window)
    images = torch.randn(shape)
    expected = timm_features(theirs, images)
    with torch.no_grad():
        predicted = ours.eval()(images).features.values()
    trained = ours.train()(images).features.values()
    for prediction, training, feature in zip(predicted, trained, expected, strict=True):
        assert_close(prediction, feature, 1e-5)
        assert_close(training, feature, 1e-5)
    directions = [torch.randn_like(feature) for feature in expected]
    for features in (trained, expected):
        sum((feature * direction).sum() for feature, direction in zip(features, directions, strict=True)).backward()
    parameters = dict(ours.named_parameters())
    for key, parameter in theirs.named_parameters():
        if not key.startswith("norm."):
            assert_close(parameters[key.replace("layers.", "stages.")].grad, parameter.grad, 1e-4)


def test_swins_drop_the_same_paths_as_timm():
    ours, theirs = both_swins(TINY, SMALL, None, drop_path=0.6)
    images, outputs = torch.randn(4, 3, 64, 50), []
    for forward in (
        lambda: list(ours.train()(images).features.values()),
        lambda: timm_features(theirs.train(), images),
    ):
        torch.manual_seed(7)
        outputs.append(forward())
    for one, other in zip(*outputs, strict=True):
        assert_close(one, other, 1e-5)


@pytest.mark.usefixtures("path")
def test_a_swin_gives_pytorch_a_bias_that_its_fast_kernels_take(monkeypatch):
    """With three dimensions, a CPU takes the slow path: 30 % of the backbone's time."""
    attend, dimensions = F.scaled_dot_product_attention, set()

    def recorded(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, dropout: float) -> Tensor:
        dimensions.add(bias.ndim)
        return attend(query, key, value, bias, dropout)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    with torch.no_grad():
        build(TINY, SMALL).eval()(torch.randn(1, 3, 64, 70))
    assert dimensions == {4}


@pytest.mark.usefixtures("path")
def test_dropout_that_is_left_on_changes_predictions_of_a_swin():
    """Monte Carlo dropout: the model predicts, its dropout layers train."""
    backbone = build(TINY, SMALL | {"proj_drop_rate": 0.5}).eval()
    for stage in backbone.stages:
        for block in stage.blocks:
            block.attn.proj_drop.train()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert not torch.equal(backbone(images).features[4], backbone(images).features[4])


def test_a_swin_predicts_the_same_on_the_cpu_path_as_on_the_plain_path(request):
    torch.manual_seed(0)
    backbone = build(TINY, {"attn_drop_rate": 0.5, "proj_drop_rate": 0.5}).eval()
    images = torch.randn(2, 3, 200, 333)
    with torch.inference_mode():
        on_cpu_path = backbone(images).features
        request.getfixturevalue("plain_path")
        plain = backbone(images).features
    for stride, feature in plain.items():
        assert_close(on_cpu_path[stride], feature, 1e-5)


@pytest.mark.usefixtures("path")
@pytest.mark.skipif(not has_fast_bfloat16(), reason="this CPU only emulates bfloat16")
def test_a_swin_in_bfloat16_stays_near_float32():
    torch.manual_seed(0)
    backbone = build(TINY, SMALL).eval()
    images = torch.randn(1, 3, 96, 130)
    with torch.inference_mode():
        float32 = backbone(images).features
        with autocast(torch.device("cpu"), "bf16"):
            bfloat16 = backbone(images).features
    for stride, feature in float32.items():
        assert_close(bfloat16[stride].float(), feature, 0.05)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_resnets_of_one_seed_have_the_weights_of_timm(name):
    torch.manual_seed(3)
    theirs = timm.create_model(name, num_classes=0).state_dict()
    torch.manual_seed(3)
    ours = build(name, {}, "batch").network.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_swins_of_one_seed_have_the_weights_of_timm():
    torch.manual_seed(3)
    theirs = timm_swin(TINY, SMALL, None).state_dict()
    torch.manual_seed(3)
    ours = build(TINY, SMALL).state_dict()
    for key, value in theirs.items():
        if not key.startswith("norm."):
            assert torch.equal(ours[key.replace("layers.", "stages.")], value), key


RESNETS = [
    pytest.param("resnet18", {}, id="resnet18"),
    pytest.param("resnet34", {"layers": [1, 2, 1, 1]}, id="resnet34, fewer blocks"),
    pytest.param("resnet50.a1_in1k", {}, id="resnet50"),
    pytest.param("resnet101", {"layers": [1, 1, 2, 1], "in_chans": 5}, id="resnet101, five channels"),
]


@pytest.mark.parametrize("norm", ["frozen", "batch", "statistics"])
@pytest.mark.parametrize(("name", "options"), RESNETS)
def test_resnets_have_the_features_and_gradients_of_timm(name, options, norm):
    torch.manual_seed(0)
    ours = build(name, options, norm, drop_path=0.3 if norm == "batch" else 0.0)
    drop_path = {"drop_path_rate": 0.3} if norm == "batch" else {}
    theirs = timm.create_model(name, features_only=True, out_indices=(1, 2, 3, 4), **options, **drop_path)
    randomize(theirs)
    state = {key: value.clone() for key, value in theirs.state_dict().items()}
    if norm == "frozen":
        state = {key: value for key, value in state.items() if "num_batches" not in key}
        theirs.eval()  # its norms then take the same statistics
    ours.network.load_state_dict(state)
    assert any(isinstance(module, FrozenBatchNorm) for module in ours.modules()) == (norm == "frozen")
    images, outputs = torch.randn(2, options.get("in_chans", 3), 64, 96), []
    for forward in (lambda: list(ours.train()(images).features.values()), lambda: theirs(images)):
        torch.manual_seed(7)
        outputs.append(forward())
        sum((feature * torch.randn_like(feature)).sum() for feature in outputs[-1]).backward()
    for one, other in zip(*outputs, strict=True):
        assert_close(one, other, 2e-5)
    expected = dict(theirs.named_parameters())
    for key, parameter in ours.network.named_parameters():
        if parameter.requires_grad:
            assert_close(parameter.grad, expected[key].grad, 1e-3)
    assert all(
        parameter.requires_grad == (norm != "statistics" or parameter.ndim > 1) for parameter in ours.parameters()
    )
    if norm != "frozen":
        assert_close(ours.network.bn1.running_mean, theirs.bn1.running_mean, 1e-5)


@pytest.mark.parametrize("size", [(1, 1, 70, 101), (2, 1, 32, 32), (2, 3, 70, 101), (3, 3, 20, 300)], ids=str)
@pytest.mark.parametrize("norm", ["frozen", "batch"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_resnet_predicts_the_same_on_the_cpu_path_as_on_the_plain_path(name, norm, size, request):
    torch.manual_seed(0)
    backbone = build(name, {"in_chans": size[1], "layers": [2, 1, 2, 1]}, norm).eval()
    randomize(backbone)
    images = torch.randn(size).contiguous(memory_format=torch.channels_last)
    original = images.clone()
    with torch.inference_mode():
        on_cpu_path = backbone(images).features
        request.getfixturevalue("plain_path")
        plain = backbone(images).features
    for stride, feature in plain.items():
        assert_close(on_cpu_path[stride], feature, 1e-5)
    assert torch.equal(images, original)


def test_a_resnet_with_other_options_is_built_by_timm():
    backbone = build("resnet18", {"stem_type": "deep", "stem_width": 16})
    assert isinstance(backbone(torch.randn(1, 3, 64, 64)), BackboneOutput)
    assert type(backbone).__name__ == "TimmBackbone"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (TINY, {"wings": 2}, "wings is unknown, known are embed_dim, depths, "),
        (TINY, {"depths": [2, 2, 2]}, "depths has 3 entries, expected 4"),
        (TINY, {"depths": [2, 0, 2, 2]}, "widths, depths, heads and windows must be at least 1"),
        (TINY, {"num_heads": 0}, "widths, depths, heads and windows must be at least 1"),
        (TINY, {"embed_dim": "wide"}, "do not suit"),
        (TINY, {"mlp_ratio": "wide"}, "do not suit"),
        ("resnet18", {"layers": [1, 1, 1]}, "layers must be four numbers of blocks, each at least 1"),
        ("resnet50", {"layers": [1, 1, 0, 1]}, "layers must be four numbers of blocks, each at least 1"),
        ("resnet50", {"layers": 3}, "layers must be four numbers of blocks, each at least 1"),
        ("swin_tiny_patch4_window7", {}, "nearest: swin"),
    ],
)
def test_impossible_options_are_refused_in_one_line(name, options, message):
    with pytest.raises(RecipeError) as error:
        build(name, options)
    assert message in str(error.value)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_depthwise_convolutions_are_trained_in_float32_on_a_cpu():
    network = build_timm_backbone("tf_efficientnet_lite0", {}, norm="batch").network
    images, types = torch.randn(1, 3, 64, 64), {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, _, output, name=name: types.update({name: output.dtype}))
    with torch.autocast("cpu", torch.bfloat16):
        network(images)
        trained = dict(types)
        with torch.no_grad():
            network(images)
    depthwise = {name for name in types if name.endswith("conv_dw")}
    assert {trained[name] for name in depthwise} == {torch.float32}
    assert {trained[name] for name in trained.keys() - depthwise} == {torch.bfloat16}
    assert set(types.values()) == {torch.bfloat16}
