"""`maskwright evaluate --engine ray`: the scores of `evaluate`, by many workers.

Each worker opens the annotations once, scores shares of the split, and returns their metrics. These hold counts and the
outcome of matching, no masks; merged, they give the scores of a single process exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from maskwright.cluster.ray_options import RayOptions
from maskwright.cluster.ray_session import ray_session
from maskwright.config.recipe import Recipe
from maskwright.errors import MaskwrightError
from maskwright.evaluation.evaluate import Evaluation, OpenSplit, merge_shares, open_split, score_share
from maskwright.inference.exported_model import ExportedModel, open_model
from maskwright.models.segmenter import Segmenter
from maskwright.runtime.device import pick_device

_IMAGES_PER_SHARE = 256
_SHARES_PER_WORKER = 4


@dataclass
class EvaluateJob:
    """What every worker gets; `model` is the path of an exported file, or a model on the CPU."""

    model: Segmenter | Path
    recipe: Recipe
    split: str
    device: str | None
    precision: str
    threads: int

    def loaded_model(self) -> Segmenter:
        """Return the model on the device of the worker."""
        if isinstance(self.model, Segmenter):
            return self.model.to(pick_device(self.device)).eval()
        return open_model(self.model, self.device)


def evaluate_on_ray(
    checkpoint: str | Path,
    recipe: Recipe,
    split: str,
    ray_options: RayOptions,
    *,
    device: str | None = None,
    precision: str = "fp32",
    on_image: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score a model on a split by workers on Ray; see `evaluate`.

    The data must be visible to all workers. A worker that dies is replaced, and its unfinished share is scored again.

    Raises:
        MaskwrightError: as for `evaluate`, or a cluster cannot be used.
    """
    model = open_model(checkpoint, "cpu")
    opened = open_split(model, recipe, split)  # also checks everything before Ray starts
    sent = model.file.path if isinstance(model, ExportedModel) else model
    with ray_session(ray_options) as session:
        plan = session.plan(device)
        session.check_nodes([recipe.data.root, *([sent] if isinstance(sent, Path) else [])])
        shares = max(plan.workers * _SHARES_PER_WORKER, -(-opened.count // _IMAGES_PER_SHARE))
        shares = max(1, min(shares, opened.count))
        in_workers = recipe.model_copy(update={"train": recipe.train.model_copy(update={"num_workers": 0})})
        job = EvaluateJob(sent, in_workers, split, device, precision, plan.threads)
        parts = []
        chunks = [(rank, shares) for rank in range(shares)]
        for part in session.run(EvaluateWorker, job, chunks, plan):
            if isinstance(part, MaskwrightError):
                raise part
            parts.append(part)
            if on_image:
                on_image(part.images, opened.count)
    if len(parts) != shares or sum(part.images for part in parts) != opened.count:
        raise MaskwrightError(f"{len(parts)} of {shares} shares were scored", remedy="run the same command again")
    return merge_shares(parts)


class EvaluateWorker:
    """Scores shares of a split in a worker process."""

    def __init__(self, job: EvaluateJob, _: object) -> None:
        self._job = job
        torch.set_num_threads(job.threads)
        self._opened: tuple[Segmenter, OpenSplit] | None = None

    def __call__(self, number: int, share: tuple[int, int]) -> object:
        """Return the `Share`, or the error."""
        try:
            if self._opened is None:
                model = self._job.loaded_model()
                self._opened = model, open_split(model, self._job.recipe, self._job.split)
            return score_share(*self._opened, *share, precision=self._job.precision)
        except MaskwrightError as error:
            return error
