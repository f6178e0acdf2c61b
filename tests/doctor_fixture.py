"""`python -m tests.doctor_fixture` writes diagnostics/doctor.json: a model as transformers computes it.

The model, image and points are those of `diagnostics.doctor`; `convert` takes the weights to transformers.
"""

import json
import tempfile
from pathlib import Path
from unittest import mock

import torch

from maskwright.checkpoints.checkpoint import Checkpoint, save_checkpoint
from maskwright.checkpoints.convert import convert
from maskwright.config.schema import EvaluateConfig
from maskwright.diagnostics import doctor

FILE = Path(doctor.__file__).with_name("doctor.json")


def points_in_their_order():
    """What their criterion draws: the last layer first, and in each the matcher's, the candidates and the uniform."""
    points, masks = doctor.SpreadPoints("cpu"), len(doctor.synthetic_target())
    layers, uncertain = doctor.MODEL.masked_decoder_layers + 1, doctor.POINTS * 3 // 4
    matching = points.matching(0, layers, doctor.POINTS)
    for layer in (layers - 1, *range(layers - 1)):
        yield matching[layer][None]
        yield points.candidates(layer, 0, masks, 3 * doctor.POINTS)
        yield points.uniform(layer, 0, masks, doctor.POINTS - uncertain)


def compute(folder: Path) -> dict[str, list[float]]:
    """Compute the values of `doctor.compute` with transformers."""
    import transformers

    transformers.logging.disable_progress_bar()
    state = doctor.build(torch.device("cpu")).state_dict()
    checkpoint = Checkpoint(doctor.MODEL, doctor.CATEGORIES, EvaluateConfig(task="instance"), state)
    save_checkpoint(folder / "ours.safetensors", checkpoint)
    convert(folder / "ours.safetensors", folder / "theirs", to="transformers")
    kind = transformers.Mask2FormerForUniversalSegmentation
    model = kind.from_pretrained(folder / "theirs", train_num_points=doctor.POINTS).train()
    mean, std = (torch.tensor(values)[:, None, None] for values in (doctor.MODEL.pixel_mean, doctor.MODEL.pixel_std))
    target, drawn = doctor.synthetic_target(), points_in_their_order()
    weights = {"cross_entropy": 2.0, "mask": 5.0, "dice": 5.0}
    pixels = (doctor.synthetic_image().float() - mean) / std
    output = model(pixel_values=pixels, output_auxiliary_logits=True)
    masks, classes = [target.masks.float()], [target.labels]
    with mock.patch.object(torch, "rand", side_effect=drawn):
        terms = model.criterion(
            output.masks_queries_logits, output.class_queries_logits, masks, classes, output.auxiliary_logits
        )
    total = sum(
        weights[term] * value for term in weights for key, value in terms.items() if key.startswith(f"loss_{term}")
    )
    total.backward()
    gradients = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
    order = [*(f"_{layer}" for layer in range(doctor.MODEL.masked_decoder_layers)), ""]
    results = {
        "class logits": output.class_queries_logits.flatten(),
        "mask logits": output.masks_queries_logits[..., ::4, ::4].flatten(),
        "losses": torch.stack([terms[f"loss_{term}{layer}"] for term in weights for layer in order]),
        "gradient": torch.stack(gradients).norm().log()[None],
    }
    return {name: [round(value, 6) for value in values.tolist()] for name, values in results.items()}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        FILE.write_text(json.dumps(compute(Path(folder))) + "\n", encoding="utf-8")
