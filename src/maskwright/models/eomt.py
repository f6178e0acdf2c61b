"""EoMT (Kerssies et al. 2025, "Your ViT is Secretly an Image Segmentation Model"): queries inside a plain ViT.

Original: `tue-mps/eomt`, files `models/eomt.py` and `models/scale_block.py`. Unusual: attention masks are computed at
the resolution of the patches. Bilinear downsampling is linear, so the features are downsampled before they are
multiplied with the embeddings of the masks, and full-size masks are never computed here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskwright.config.schema import TrainConfig
from maskwright.models.ops.cpu_path import uses_cpu_path
from maskwright.models.segmenter import Segmenter
from maskwright.runtime.device import full_precision
from maskwright.structures.predictions import MaskPrediction, ModelOutput

if TYPE_CHECKING:
    from maskwright.models.backbones.vit import VitBackbone

_EPS = 1e-6
_LEAST_PROBABILITY = 0.5  # of a mask that is applied in prediction


class Eomt(Segmenter):
    """A plain ViT whose last blocks also process queries, and a head that predicts from them.

    In these blocks a query attends only to patches where its own mask is, with a probability that training lowers from
    1 to 0 block by block, so that prediction needs no masks at all.

    Differs from the reference: prediction in the middle of that applies the masks of all queries or of none, whichever
    is more probable, so that it is not random.

    Attributes:
        mask_probabilities: (number of blocks with queries,) float32.
        probabilities: the same values on the host.
    """

    tasks = ("semantic", "instance", "panoptic")
    mask_probabilities: Tensor

    def __init__(
        self,
        *,
        backbone: VitBackbone,
        head: EomtHead,
        query_blocks: int,
        pixel_mean: tuple[float, ...],
        pixel_std: tuple[float, ...],
    ) -> None:
        super().__init__(pixel_mean, pixel_std)
        self.backbone, self.head = backbone, head
        self.size_divisor = self.window_divisor = backbone.patch_size
        backbone.admit_queries(head.num_queries, query_blocks)
        self.register_buffer("mask_probabilities", torch.ones(query_blocks))
        self.probabilities = [1.0] * query_blocks
        self.register_load_state_dict_post_hook(_after_loading)

    def forward(self, images: Tensor, padding: Tensor | None = None, intermediate: bool = False) -> ModelOutput:
        """Predict; see `Segmenter`. Padding is black, as in the original, instead of the mean color."""
        backbone, head = cast("VitBackbone", self.backbone), self.head
        tokens, rope, grid = backbone.embed(self.normalize(images, None))
        first = len(backbone.blocks) - len(self.probabilities)
        for index in range(first):
            tokens = backbone.run_block(index, tokens, rope)
        tokens = torch.cat([head.query_features.weight.expand(tokens.shape[0], -1, -1), tokens], 1)
        predictions = []
        for index, probability in enumerate(self.probabilities, start=first):
            visible = None
            is_masked = probability > 0 if self.training else probability >= _LEAST_PROBABILITY
            if intermediate or is_masked:
                predictions.append(head(backbone.network.norm(tokens), grid))
            if is_masked:
                inside = _inside_mask(predictions[-1], grid)
                if self.training and probability < 1:
                    inside |= torch.rand(*inside.shape[:2], 1, device=inside.device) > probability
                visible = _visible(inside, tokens.shape[1])
            tokens = backbone.run_block(index, tokens, rope, visible)
        final = head(backbone.network.norm(tokens), grid)
        return ModelOutput(final, predictions if intermediate else [])

    def on_weights_loaded(self) -> None:
        """Copy the mask probabilities to the host once; reading them in each forward pass would synchronize."""
        self.probabilities = self.mask_probabilities.tolist()

    def begin_step(self, step: int, config: TrainConfig) -> None:
        """Set the probabilities of the masks for a training step; see `Segmenter`."""
        probabilities = []
        for start, end in config.mask_annealing:
            first, last = round(start * config.steps), round(end * config.steps)
            progress = min(max((step - first) / max(last - first, 1), 0.0), 1.0)
            probabilities.append((1 - progress) ** config.poly_power)
        if probabilities and probabilities != self.probabilities:
            self.probabilities = probabilities
            self.mask_probabilities.copy_(torch.tensor(probabilities))


class EomtHead(nn.Module):
    """The queries, and the prediction from tokens: classes, and masks at a stride of about 4.

    Args:
        width: C.
        patch_size: in pixels; the patches are upscaled by a power of two to a stride from 4 to 8.
        num_queries: Q.
        num_classes: K.
        num_prefix_tokens: class and register tokens between the queries and the patches.
    """

    def __init__(
        self, width: int, *, patch_size: int, num_queries: int, num_classes: int, num_prefix_tokens: int
    ) -> None:
        super().__init__()
        self.num_queries, self.num_prefix_tokens = num_queries, num_prefix_tokens
        self.query_features = nn.Embedding(num_queries, width)
        self.class_head = nn.Linear(width, num_classes + 1)
        self.mask_head = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)
        )
        self.upscale = nn.Sequential(*(UpscaleBlock(width) for _ in range(max(1, patch_size.bit_length() - 3))))

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> MaskPrediction:
        """Predict from normed tokens (B, Q + prefix + rows * columns, C)."""
        queries = tokens[:, : self.num_queries]
        patches = tokens[:, self.num_queries + self.num_prefix_tokens :].transpose(1, 2).unflatten(2, grid)
        return MaskPrediction(self.class_head(queries), self.mask_head(queries), self.upscale(patches))


class UpscaleBlock(nn.Module):
    """Doubles height and width: transposed convolution, GELU, depthwise convolution and layer norm over channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm = nn.LayerNorm(width, eps=_EPS)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, C, 2h, 2w)."""
        trained_on_cpu = uses_cpu_path(features) and features.requires_grad
        upscaled = upscale_by_product(self.conv, features) if trained_on_cpu else self.conv(features)
        features = self.depthwise(F.gelu(upscaled))
        return self.norm(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def upscale_by_product(conv: nn.ConvTranspose2d, features: Tensor) -> Tensor:
    """Apply a transposed convolution of stride and kernel size 2, as a matrix product with channels last.

    Gain, for training on a CPU: the backward pass of the convolution is slow. Both upscaling blocks of a ViT-S at
    640x640, forward and backward, on one thread of an AMD EPYC (Zen 4): 0.92 -> 0.56 s in float32, 0.34 -> 0.25 s in
    bfloat16.

    Args:
        conv: of C channels.
        features: (B, C, h, w).

    Returns:
        (B, C, 2h, 2w), with channels last in memory.
    """
    weight = conv.weight.permute(2, 3, 1, 0).flatten(0, 2)  # (2 * 2 * C, C)
    assert conv.bias is not None
    cells = F.linear(features.permute(0, 2, 3, 1), weight, conv.bias.repeat(4)).unflatten(3, (2, 2, -1))
    return cells.transpose(2, 3).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


@torch.no_grad()
def _inside_mask(prediction: MaskPrediction, grid: tuple[int, int]) -> Tensor:
    """Return (B, Q, rows * columns) bool: at which patches the mask probability of a query is above one half."""
    with full_precision(prediction.mask_embeddings):
        features = F.interpolate(prediction.mask_features.float(), size=grid, mode="bilinear", align_corners=False)
        return prediction.mask_embeddings.float() @ features.flatten(2) > 0


def _visible(inside: Tensor, count: int) -> Tensor:
    """Return which of `count` tokens attend to which, (B, 1, T, T) bool: all but the queries to patches outside."""
    batch, queries, patches = inside.shape
    visible = torch.ones(batch, 1, count, count, dtype=torch.bool, device=inside.device)
    visible[:, 0, :queries, count - patches :] = inside
    return visible


def _after_loading(model: nn.Module, _: Any) -> None:
    assert isinstance(model, Eomt)
    model.on_weights_loaded()
