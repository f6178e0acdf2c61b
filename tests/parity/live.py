"""Live comparisons: small random models of the installed transformers, written to a folder and read here."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from types import SimpleNamespace

import torch

from maskwright.checkpoints.load import load_model
from maskwright.structures.annotations import Target
from maskwright.training.losses.criterion import Criterion
from maskwright.training.losses.point_sampling import RandomPoints
from tests.parity.report import LOGITS, LOSSES, Report, difference
from tests.test_against_transformers import SamePoints

NUM_POINTS = 96
SIDE = 64
SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "image_size": SIDE,
    "num_blocks": 2,
    "num_queries": 7,
    "num_labels": 3,
    "train_num_points": NUM_POINTS,
}
KINDS = ("dinov2", "dinov2-gated", "dinov3")


def build_theirs(kind: str) -> torch.nn.Module:
    """transformers' EoMT with random weights that all matter."""
    from transformers import EomtConfig, EomtForUniversalSegmentation
    from transformers.models.eomt_dinov3 import EomtDinov3Config, EomtDinov3ForUniversalSegmentation

    torch.manual_seed(1)
    if kind == "dinov3":
        model = EomtDinov3ForUniversalSegmentation(
            EomtDinov3Config(**SIZES, intermediate_size=96, layer_norm_eps=1e-5, pos_embed_rescale=None)
        )
    else:
        model = EomtForUniversalSegmentation(EomtConfig(**SIZES, use_swiglu_ffn=kind == "dinov2-gated"))
    for name, parameter in model.named_parameters():  # so that masks are neither empty nor full
        is_scale = parameter.ndim == 1 and "mask_head" not in name
        torch.nn.init.normal_(parameter, 0.5 if is_scale else 0, 0.25)
    return model.eval()


def eomt(kind: str) -> Report:
    """Logits, attention bits and losses of an EoMT; its masks are applied in all blocks with queries."""
    theirs, report = build_theirs(kind), Report()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = load_model(folder)
    images = torch.randint(0, 256, (2, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(5)).to(torch.uint8)
    pixels = (images.float() - ours.pixel_mean) / ours.pixel_std
    targets = [_target(image) for image in range(2)]
    masks: tuple[list, list] = ([], [])
    with torch.no_grad(), _recorded_attention(masks):
        expected = theirs(pixels)
        masks[0].extend(masks[1])
        masks[1].clear()
        output = ours(images, intermediate=True)
    final = output.final
    report.most("class logits", difference(final.class_logits.numpy(), expected.class_queries_logits.numpy()), LOGITS)
    report.most("mask logits", difference(final.mask_logits().numpy(), expected.masks_queries_logits.numpy()), LOGITS)
    flipped = sum(int((a != b).sum()) for a, b in zip(*masks, strict=True))
    report.check("attention bits flipped", str(flipped), flipped == 0)
    queries, cells = SIZES["num_queries"], (SIDE // 16) ** 2
    hidden = 1 - torch.stack([mask[:, :queries, -cells:].float().mean() for mask in masks[0]])
    report.check("hidden", ", ".join(f"{share:.0%}" for share in hidden), 0.05 < hidden.mean() < 0.95)

    criterion = Criterion(num_points=NUM_POINTS)
    settings = SimpleNamespace(
        train=SimpleNamespace(seed=0, num_points=NUM_POINTS, importance_sample_ratio=0.75, oversample_ratio=3.0),
        model=SimpleNamespace(num_queries=SIZES["num_queries"]),
    )
    batch = SimpleNamespace(keys=[(0, 0), (0, 1)], targets=targets)
    drawn = SamePoints(settings, 0, batch, [*range(SIZES["num_blocks"] + 1)])
    original, torch.rand = torch.rand, drawn.rand
    try:
        loss = theirs(
            pixels,
            mask_labels=[target.masks.float() for target in targets],
            class_labels=[target.labels for target in targets],
        ).loss.item()
    finally:
        torch.rand = original
    found = criterion.total(criterion(output, targets, RandomPoints(0, 0, batch.keys, "cpu"))).item()
    report.most("loss", abs(found - loss) / loss, LOSSES)
    return report


class _recorded_attention:
    """Context in which the masks that `scaled_dot_product_attention` gets are recorded as booleans."""

    def __init__(self, masks: tuple[list, list]) -> None:
        self.masks = masks[1]

    def __enter__(self) -> None:
        self.original = torch.nn.functional.scaled_dot_product_attention

        def attend(query, key, value, attn_mask=None, **options):
            if attn_mask is not None:
                visible = attn_mask[:, 0] if attn_mask.dtype == torch.bool else attn_mask[:, 0] > -1e6
                self.masks.append(visible.clone())
            return self.original(query, key, value, attn_mask=attn_mask, **options)

        torch.nn.functional.scaled_dot_product_attention = attend

    def __exit__(self, *_: object) -> None:
        torch.nn.functional.scaled_dot_product_attention = self.original


def _target(image: int) -> Target:
    """Two rectangles."""
    ids = torch.zeros(1, SIDE, SIDE, dtype=torch.int32)
    ids[0, 8 : 40 + 8 * image, 4:36] = 1
    ids[0, 44:, 20 + 8 * image :] = 2
    return Target(
        id_maps=ids,
        labels=torch.tensor([image, 2]),
        is_crowd=torch.zeros(2, dtype=torch.bool),
        image_id=str(image),
        original_size=(SIDE, SIDE),
    )


CASES: dict[str, Callable[[], Report]] = {f"eomt-{kind}": lambda kind=kind: eomt(kind) for kind in KINDS}
