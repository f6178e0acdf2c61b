"""Names of backbones that were trained alone, mostly to classify ImageNet, and the pixels that they were trained on.

Most are those of a whole model without what stands before them, so its table serves. Weights with timm's own names
need no table; torchvision's ResNets have the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from maskwright.checkpoints.key_maps.detectron2 import DETECTRON2
from maskwright.checkpoints.key_maps.key_map import NOT_PARAMETERS, Layout
from maskwright.checkpoints.key_maps.openmmlab import OPENMMLAB
from maskwright.checkpoints.key_maps.transformers import TRANSFORMERS


@dataclass(frozen=True)
class Pixels:
    """What the first convolution was trained on: pixels minus mean, divided by deviation, in units of 0..255.

    Attributes:
        mean: of red, green, blue.
        std: of red, green, blue.
        bgr: whether the channels come as blue, green, red.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    bgr: bool = False


IMAGENET = Pixels((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))


@dataclass(frozen=True)
class BackboneLayout:
    """A table of names and what no name tells.

    Attributes:
        names: foreign names to ours.
        pixels: None where they differ from file to file.
        folded: whether batch norms have their statistics folded into scale and shift.
    """

    names: Layout
    pixels: Pixels | None = IMAGENET
    folded: bool = False


_CLASSIFIER = "of the classifier"

# Also the pickles that the original's `tools/convert-pretrained-swin-model-to-d2.py` makes of them.
_SWIN = replace(
    DETECTRON2,
    name="official Swin",
    marks=("layers.0.downsample.reduction.weight",),  # timm counts from 1
    renamed=((r"^", "backbone."),),
    dropped=(*NOT_PARAMETERS, (r"backbone\.(norm|head)\..*", _CLASSIFIER)),
)
_TORCHVISION_SWIN = Layout(
    name="torchvision Swin",
    marks=("features.1.0.attn.relative_position_bias_table",),
    names=(
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
# The pickles that `tools/convert-torchvision-to-d2.py` makes, as `torchvision/R-50.pkl` of detectron2's zoo.
DETECTRON2_RESNET = replace(
    DETECTRON2,
    name="detectron2 ResNet",
    marks=("stem.conv1.weight",),
    renamed=((r"^", "backbone."),),
    dropped=(*NOT_PARAMETERS, (r"backbone\.stem\.fc\..*", _CLASSIFIER)),
)
_OPENMMLAB = replace(
    OPENMMLAB,
    name="OpenMMLab Swin",
    marks=("stages.0.blocks.0.attn.w_msa.qkv.weight",),
    renamed=((r"^", "backbone."), *OPENMMLAB.renamed),
    dropped=(*NOT_PARAMETERS, (r"backbone\.(norm|head)\..*", _CLASSIFIER)),
)
_TRANSFORMERS = replace(
    TRANSFORMERS,
    name="transformers backbone",
    marks=(
        "encoder.layers.0.blocks.0.attention.self.query.weight",
        "encoder.layers.0.blocks.0.attention.q_proj.weight",
        "embedder.embedder.convolution.weight",
    ),
    renamed=((r"^", "model.pixel_level_module.encoder."), *TRANSFORMERS.renamed),
)


def _caffe2_names(norms: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """Rows of a bottleneck ResNet; `norms` has their and our name of each part of a batch norm."""
    branches = (("branch1", "downsample.{}"), ("branch2a", "{}1"), ("branch2b", "{}2"), ("branch2c", "{}3"))
    rows = [("conv1_w", "backbone.network.conv1.weight")]
    rows += [(f"res_conv1_bn_{theirs}", f"backbone.network.bn1.{ours}") for theirs, ours in norms]
    for stage in (1, 2, 3, 4):
        for branch, place in branches:
            foreign = f"res{stage + 1}_{{i}}_{branch}"
            convolution, norm = (0, 1) if branch == "branch1" else ("conv", "bn")
            block = f"backbone.network.layer{stage}.{{i}}."
            rows.append((f"{foreign}_w", block + place.format(convolution) + ".weight"))
            rows += [(f"{foreign}_bn_{theirs}", block + place.format(norm) + f".{ours}") for theirs, ours in norms]
    return tuple(rows)


_NOT_CAFFE2 = (
    (r"(fc1000|pred|last_out_L1000)_[wb]", _CLASSIFIER),
    (r"conv1_b", "detectron2 leaves it out: the batch norm behind it has a shift of its own"),
    (r".*_momentum|lr|model_iter", "of the optimizer"),
)
CAFFE2 = Layout(
    name="Caffe2 ResNet",
    marks=("res2_0_branch2a_bn_running_mean", "res2_0_branch2a_bn_rm"),
    names=_caffe2_names(
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
    marks=("res2_0_branch2a_bn_s",),
    names=_caffe2_names((("s", "weight"), ("b", "bias"))),
)

# The first whose mark is found. Of Caffe2's, the means and deviations are those of detectron2's own configurations:
# X-101-32x8d divides by ImageNet's; Detectron's older files, which are folded, by nothing.
BACKBONE_LAYOUTS = (
    BackboneLayout(_TRANSFORMERS, pixels=None),  # has the mark of the official Swin, too
    BackboneLayout(_SWIN),
    BackboneLayout(_TORCHVISION_SWIN),
    BackboneLayout(DETECTRON2_RESNET),
    BackboneLayout(_OPENMMLAB),
    BackboneLayout(CAFFE2, pixels=replace(IMAGENET, bgr=True)),
    BackboneLayout(CAFFE2_FOLDED, pixels=Pixels(IMAGENET.mean, (1.0, 1.0, 1.0), bgr=True), folded=True),
)
