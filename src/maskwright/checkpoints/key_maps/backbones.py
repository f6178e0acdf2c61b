"""Key maps of backbones trained on their own, mostly to classify ImageNet, and the normalization they expect.

Most use the keys of a whole model without a prefix, so that model's key map is reused. Weights with timm's own names,
which torchvision's ResNets share, need no key map.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from maskwright.checkpoints.key_maps.detectron2 import DETECTRON2
from maskwright.checkpoints.key_maps.key_map import NOT_PARAMETERS, KeyMap
from maskwright.checkpoints.key_maps.openmmlab import OPENMMLAB
from maskwright.checkpoints.key_maps.transformers import TRANSFORMERS
from maskwright.checkpoints.key_maps.vit import DINOV2, DINOV3, DINOV3_GATED


@dataclass(frozen=True)
class Normalization:
    """Input that the first convolution was trained on: (pixel - mean) / std, with pixels in 0..255.

    Attributes:
        mean: of red, green, blue.
        std: of red, green, blue.
        bgr: the channels are ordered blue, green, red.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    bgr: bool = False


HALF = Normalization((127.5, 127.5, 127.5), (127.5, 127.5, 127.5))  # pixels scaled to -1..1, as in TensorFlow
IMAGENET = Normalization((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))


@dataclass(frozen=True)
class BackboneKeyMap:
    """A key map, and properties that the keys do not reveal.

    Attributes:
        key_map: foreign names to ours.
        normalization: None if it differs from file to file.
        folded_norms: the statistics of batch norms are folded into their scale and shift.
    """

    key_map: KeyMap
    normalization: Normalization | None = IMAGENET
    folded_norms: bool = False


_CLASSIFIER = "part of the classifier"

# Also for the pickles written by the original's `tools/convert-pretrained-swin-model-to-d2.py`.
_SWIN = replace(
    DETECTRON2,
    name="official Swin",
    signatures=("layers.0.downsample.reduction.weight",),  # timm counts from 1
    renames=((r"^", "backbone."),),
    dropped=(*NOT_PARAMETERS, (r"backbone\.(norm|head)\..*", _CLASSIFIER)),
)
_TORCHVISION_SWIN = KeyMap(
    name="torchvision Swin",
    signatures=("features.1.0.attn.relative_position_bias_table",),
    prefixes=(
        ("features.0.0", "backbone.patch_embed.proj"),
        ("features.0.2", "backbone.patch_embed.norm"),
        *(
            row
            for stage in range(4)
            for row in (
                (f"features.{2 * stage + 1}.{{j}}.mlp.0", f"backbone.stages.{stage}.blocks.{{j}}.mlp.fc1"),
                (f"features.{2 * stage + 1}.{{j}}.mlp.3", f"backbone.stages.{stage}.blocks.{{j}}.mlp.fc2"),
                (f"features.{2 * stage + 1}.{{j}}", f"backbone.stages.{stage}.blocks.{{j}}"),
            )
        ),
        *((f"features.{2 * stage}", f"backbone.stages.{stage}.downsample") for stage in (1, 2, 3)),
    ),
    dropped=(*NOT_PARAMETERS, (r"(norm|head)\..*", _CLASSIFIER)),
)
# Pickles written by `tools/convert-torchvision-to-d2.py`, such as `torchvision/R-50.pkl` of detectron2's zoo.
DETECTRON2_RESNET = replace(
    DETECTRON2,
    name="detectron2 ResNet",
    signatures=("stem.conv1.weight",),
    renames=((r"^", "backbone."),),
    dropped=(*NOT_PARAMETERS, (r"backbone\.stem\.fc\..*", _CLASSIFIER)),
)
_OPENMMLAB = replace(
    OPENMMLAB,
    name="OpenMMLab Swin",
    signatures=("stages.0.blocks.0.attn.w_msa.qkv.weight",),
    renames=((r"^", "backbone."), *OPENMMLAB.renames),
    dropped=(*NOT_PARAMETERS, (r"backbone\.(norm|head)\..*", _CLASSIFIER)),
)
_TRANSFORMERS = replace(
    TRANSFORMERS,
    name="transformers backbone",
    signatures=(
        "encoder.layers.0.blocks.0.attention.self.query.weight",
        "encoder.layers.0.blocks.0.attention.q_proj.weight",
        "embedder.embedder.convolution.weight",
    ),
    renames=((r"^", "model.pixel_level_module.encoder."), *TRANSFORMERS.renames),
)


def _caffe2_rows(norms: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """Return the rows of a bottleneck ResNet; `norms` has (their, our) name of each tensor of a batch norm."""
    branches = (("branch1", "downsample.{}"), ("branch2a", "{}1"), ("branch2b", "{}2"), ("branch2c", "{}3"))
    rows = [("conv1_w", "backbone.network.conv1.weight")]
    rows += [(f"res_conv1_bn_{theirs}", f"backbone.network.bn1.{ours}") for theirs, ours in norms]
    for stage in (1, 2, 3, 4):
        for branch, name in branches:
            foreign = f"res{stage + 1}_{{i}}_{branch}"
            convolution, norm = (0, 1) if branch == "branch1" else ("conv", "bn")
            block = f"backbone.network.layer{stage}.{{i}}."
            rows.append((f"{foreign}_w", block + name.format(convolution) + ".weight"))
            rows += [(f"{foreign}_bn_{theirs}", block + name.format(norm) + f".{ours}") for theirs, ours in norms]
    return tuple(rows)


_NOT_CAFFE2 = (
    (r"(fc1000|pred|last_out_L1000)_[wb]", _CLASSIFIER),
    (r"conv1_b", "not used by detectron2: the following batch norm has a shift of its own"),
    (r".*_momentum|lr|model_iter", "optimizer state"),
)
CAFFE2 = KeyMap(
    name="Caffe2 ResNet",
    signatures=("res2_0_branch2a_bn_running_mean", "res2_0_branch2a_bn_rm"),
    prefixes=_caffe2_rows(
        (
            ("gamma", "weight"),
            ("beta", "bias"),
            ("running_mean", "running_mean"),
            ("running_var", "running_var"),
            ("s", "weight"),
            ("b", "bias"),
            ("rm", "running_mean"),
            ("riv", "running_var"),
        )
    ),
    dropped=_NOT_CAFFE2,
)
CAFFE2_FOLDED = replace(
    CAFFE2,
    name="Caffe2 ResNet with folded norms",
    signatures=("res2_0_branch2a_bn_s",),
    prefixes=_caffe2_rows((("s", "weight"), ("b", "bias"))),
)


def _efficientnet_lite(signature: str, repeats: tuple[int, ...]) -> KeyMap:
    """Return the key map of an EfficientNet-Lite with `repeats` blocks per stage.

    EfficientNet-PyTorch numbers the blocks through the whole network, timm within each stage. The first stage has no
    expansion, so its blocks have one convolution and one norm less.
    """
    expanded = (
        ("_expand_conv", "conv_pw"),
        ("_bn0", "bn1"),
        ("_depthwise_conv", "conv_dw"),
        ("_bn1", "bn2"),
        ("_project_conv", "conv_pwl"),
        ("_bn2", "bn3"),
    )
    separable = (("_depthwise_conv", "conv_dw"), ("_bn1", "bn1"), ("_project_conv", "conv_pw"), ("_bn2", "bn2"))
    places = [(stage, index) for stage, count in enumerate(repeats) for index in range(count)]
    rows = [("_conv_stem", "backbone.network.conv_stem"), ("_bn0", "backbone.network.bn1")]
    for number, (stage, index) in enumerate(places):
        block = f"backbone.network.blocks.{stage}.{index}"
        parts = expanded if stage else separable
        rows += [(f"_blocks.{number}.{theirs}", f"{block}.{ours}") for theirs, ours in parts]
    return KeyMap(
        name="EfficientNet-PyTorch",
        signatures=(signature,),
        prefixes=tuple(rows),
        dropped=(*NOT_PARAMETERS, (r"(_conv_head|_bn1|_fc)\..*", _CLASSIFIER)),
    )


EFFICIENTNET_LITE0 = _efficientnet_lite("_blocks.15._depthwise_conv.weight", (1, 2, 2, 3, 3, 4, 1))
EFFICIENTNET_LITE1 = _efficientnet_lite("_blocks.20._depthwise_conv.weight", (1, 3, 3, 4, 4, 5, 1))  # and Lite2

# The first with a matching signature counts. Normalization of Caffe2's files as in detectron2's configurations:
# X-101-32x8d divides by ImageNet's standard deviation; Detectron's older files, whose norms are folded, do not divide.
BACKBONE_KEY_MAPS = (
    BackboneKeyMap(_TRANSFORMERS, normalization=None),  # matches the signature of the official Swin, too
    BackboneKeyMap(DINOV2),
    BackboneKeyMap(DINOV3_GATED),  # has the signature of DINOv3, too
    BackboneKeyMap(DINOV3),
    BackboneKeyMap(_SWIN),
    BackboneKeyMap(_TORCHVISION_SWIN),
    BackboneKeyMap(DETECTRON2_RESNET),
    BackboneKeyMap(_OPENMMLAB),
    BackboneKeyMap(EFFICIENTNET_LITE1, normalization=HALF),  # has the signature of Lite0, too
    BackboneKeyMap(EFFICIENTNET_LITE0, normalization=HALF),
    BackboneKeyMap(CAFFE2, normalization=replace(IMAGENET, bgr=True)),
    BackboneKeyMap(
        CAFFE2_FOLDED, normalization=Normalization(IMAGENET.mean, (1.0, 1.0, 1.0), bgr=True), folded_norms=True
    ),
)
