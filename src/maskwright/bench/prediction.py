"""Whole predictions against transformers, with the same weights on the same picture.

Each side runs as its user runs it, from a uint8 picture to a panoptic result of the picture's size, pre- and
post-processing included, in turns (ours, theirs, ours, theirs, ...) so that a busy machine slows both. Unusual: the
weights are random, but scaled so that about twenty queries are sure of a class; otherwise neither side would have
anything to decide. Both sides use the same thresholds.

Differs from the reference: transformers stretches 800x1066 to 800x1088, where ours pads; the networks' inputs have the
same size. The difference of logits is taken on one common input.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from PIL import Image

from maskwright.bench.timing import Timing, alternate
from maskwright.checkpoint import load_model
from maskwright.device import autocast
from maskwright.errors import MaskwrightError
from maskwright.models.mask2former import Mask2Former
from maskwright.predict import Predictor
from maskwright.structures import pad_images

if TYPE_CHECKING:
    from transformers import Mask2FormerForUniversalSegmentation

Backbone = Literal["r50", "r50-timm", "swin-t"]
Precision = Literal["fp32", "bf16"]

HEIGHT, WIDTH, MAX_SIDE = 800, 1066, 1333
CLASSES, THINGS = 133, 80
CONFIDENT_QUERIES = 20  # in which a class beats "no object"; most of them clearly
OBJECT_THRESHOLD = 0.8
OVERLAP_THRESHOLD = 0.0  # random masks overlap; a higher one would reject them all


@dataclass
class Comparison:
    """What `bench` found.

    Attributes:
        backbone: of both models.
        precision: of both models.
        threads: of PyTorch.
        versions: of the libraries.
        maskwright: our side.
        transformers: theirs.
        class_logit_difference: largest, on one common input in float32.
        mask_logit_difference: largest, on the same.
    """

    backbone: str
    precision: str
    threads: int
    versions: dict[str, str]
    maskwright: Timing
    transformers: Timing
    class_logit_difference: float
    mask_logit_difference: float

    def to_json(self) -> dict:
        """Everything, with medians, minima and ratios (theirs divided by ours), as values that `json.dumps` takes."""
        values = asdict(self)
        for name, side in (("maskwright", self.maskwright), ("transformers", self.transformers)):
            values[name] |= {"median": side.median, "minimum": side.minimum}
        ratios = {kind: getattr(self.transformers, kind) / getattr(self.maskwright, kind) for kind in _KINDS}
        return values | {"ratio": ratios, "image": [HEIGHT, WIDTH]}

    def table(self) -> str:
        """The same for people."""
        values = self.to_json()
        rows = [f"{'':14}{'median s':>10}{'minimum s':>11}{'segments':>10}"]
        for name in ("maskwright", "transformers"):
            side = values[name]
            rows.append(f"{name:14}{side['median']:10.3f}{side['minimum']:11.3f}{side['segments']:10d}")
        rows.append(f"{'ratio':14}{values['ratio']['median']:10.2f}{values['ratio']['minimum']:11.2f}")
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return "\n".join(
            [
                f"{self.backbone}, {self.precision}, {HEIGHT}x{WIDTH}, {self.threads} threads; {versions}",
                *rows,
                f"largest difference on one input (fp32): class logits {self.class_logit_difference:.1e}, "
                f"mask logits {self.mask_logit_difference:.1e}",
            ]
        )


_KINDS = ("median", "minimum")


def bench_prediction(
    *, rounds: int = 5, threads: int = 2, precision: Precision = "fp32", backbone: Backbone = "r50", seed: int = 0
) -> Comparison:
    """Time whole predictions of both sides on the CPU.

    Args:
        rounds: timed predictions per side, after one that is not timed.
        threads: of PyTorch.
        precision: "bf16" runs both networks under autocast.
        backbone: "r50" is the ResNet of transformers itself, "r50-timm" the same through timm.
        seed: of weights and picture.

    Raises:
        MaskwrightError: transformers is not installed, or a number is below 1.
    """
    if rounds < 1 or threads < 1:
        raise MaskwrightError(f"bench: rounds {rounds} and threads {threads} must both be at least 1")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(seed)
        picture = _picture(seed)
        theirs = their_model(backbone)
        pixels = _common_input(picture)
        _make_decisive(theirs, pixels)
        ours = _our_model(theirs)
        classes, masks = _differences(ours, theirs, pixels)
        sides = (_our_side(ours, picture, precision), _their_side(theirs, picture, precision))
        timings = alternate(sides, rounds)
    finally:
        torch.set_num_threads(before)
    return Comparison(backbone, precision, threads, _versions(), *timings, classes, masks)


def their_model(backbone: Backbone) -> Mask2FormerForUniversalSegmentation:
    """A model of transformers with random weights."""
    try:
        import transformers
    except ImportError:
        raise MaskwrightError(
            "bench compares with transformers, which is not installed; pip install transformers"
        ) from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    stages: dict[str, Any] = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
    by_timm: dict[str, Any] = {"backbone": "resnet50", "out_indices": [1, 2, 3, 4], "use_pretrained_backbone": False}
    match backbone:
        case "r50":
            part = transformers.ResNetConfig(**stages)
        case "r50-timm":
            part = transformers.TimmBackboneConfig(**by_timm)
        case "swin-t":
            part = transformers.SwinConfig(depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], window_size=7, **stages)
    whole: dict[str, Any] = {"backbone_config": part, "num_labels": CLASSES}
    return transformers.Mask2FormerForUniversalSegmentation(transformers.Mask2FormerConfig(**whole)).eval()


def _our_model(theirs: Mask2FormerForUniversalSegmentation) -> Mask2Former:
    """Our model of their weights, the way a user gets it: they save a folder, we load it."""
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        model = cast(Mask2Former, load_model(Path(folder)))
    model.evaluate_config = model.evaluate_config.model_copy(update={"short_side": HEIGHT, "max_side": MAX_SIDE})
    return model


def _picture(seed: int) -> np.ndarray:
    """(H, W, 3) smooth colours: two percent of stretching must not change what a random network sees."""
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), np.uint8)
    return np.array(Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))


def _common_input(picture: np.ndarray) -> torch.Tensor:
    """(1, 3, H, W) normalised pixels, zero where padded."""
    images, padding = pad_images([torch.from_numpy(picture).permute(2, 0, 1)])
    mean, std = (torch.tensor(values)[:, None, None] for values in (_MEAN, _STD))
    return ((images.float() - mean) / std).masked_fill(padding[:, None], 0)


_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


@torch.no_grad()
def _make_decisive(theirs: Mask2FormerForUniversalSegmentation, pixels: torch.Tensor) -> None:
    """Keep queries different from each other, let masks cover half of the picture, and few queries be sure."""
    decoder = theirs.model.transformer_module
    decoder.queries_features.weight.normal_()
    for name, parameter in decoder.named_parameters():  # else ten random layers make all queries the same
        if name.endswith(("out_proj.weight", "fc2.weight")):
            parameter *= 0.2
    features = theirs(pixel_values=pixels, output_hidden_states=True).pixel_decoder_last_hidden_state  # (1, C, h, w)
    theirs.model.pixel_level_module.decoder.mask_projection.bias -= features.mean((0, 2, 3))
    head = theirs.class_predictor
    head.weight.normal_(std=1.0)
    head.weight[-1] = 0  # "no object" is the same for every query and picture
    logits = theirs(pixel_values=pixels).class_queries_logits[0]  # (Q, K+1)
    lead = (logits[:, :-1].amax(1) - logits[:, -1]).sort(descending=True).values
    head.bias[-1] += lead[CONFIDENT_QUERIES - 1 : CONFIDENT_QUERIES + 1].mean()


@torch.no_grad()
def _differences(
    ours: Mask2Former, theirs: Mask2FormerForUniversalSegmentation, pixels: torch.Tensor
) -> tuple[float, float]:
    """The largest difference of class and of mask logits."""
    prediction = ours.masked_decoder(*ours.pixel_decoder(ours.backbone(pixels).features), False)[-1]
    expected = theirs(pixel_values=pixels)
    classes = (prediction.class_logits - expected.class_queries_logits).abs().max().item()
    return classes, (prediction.mask_logits() - expected.masks_queries_logits).abs().max().item()


def _our_side(model: Mask2Former, picture: np.ndarray, precision: Precision) -> Callable[[], int]:
    predictor = Predictor(model, device="cpu", precision=precision)
    return lambda: len(
        predictor(
            picture, task="panoptic", object_threshold=OBJECT_THRESHOLD, overlap_threshold=OVERLAP_THRESHOLD
        ).labels
    )


def _their_side(
    model: Mask2FormerForUniversalSegmentation, picture: np.ndarray, precision: Precision
) -> Callable[[], int]:
    from transformers import Mask2FormerImageProcessor

    processor = Mask2FormerImageProcessor(size={"shortest_edge": HEIGHT, "longest_edge": MAX_SIDE})

    @torch.no_grad()
    def predict() -> int:
        inputs = processor(images=picture, return_tensors="pt")
        with autocast(torch.device("cpu"), precision):
            output = model(**inputs)
        result = processor.post_process_panoptic_segmentation(
            output,
            threshold=OBJECT_THRESHOLD,
            overlap_mask_area_threshold=OVERLAP_THRESHOLD,
            label_ids_to_fuse=set(range(THINGS, CLASSES)),
            target_sizes=[picture.shape[:2]],
        )
        return len(result[0]["segments_info"])

    return predict


def _versions() -> dict[str, str]:
    import transformers

    from maskwright import __version__

    return {"maskwright": __version__, "transformers": transformers.__version__, "torch": torch.__version__}
