"""A prediction and an evaluation on Ray with two workers: `python -m tests.ray_steps FOLDER`, for tests/test_ray.py.

It is a program of its own so that pytest survives whatever happens to Ray. FOLDER holds model.safetensors, images, and
data in COCO's panoptic format. FOLDER/outcomes.pkl then maps each step to what it returned, or to its traceback.
"""

import logging
import os
import pickle
import sys
import traceback
from pathlib import Path

import ray

from maskwright.cluster.ray_evaluate import evaluate_on_ray
from maskwright.cluster.ray_options import RayOptions
from maskwright.cluster.ray_predict import predict_on_ray
from tests import tiny

TWO = RayOptions(workers=2)
INPUTS = ("folder", "more.zip", "list.csv", "bytes.parquet", "damaged", "transparent")
STARTS = 4  # Ray gives up after 30 seconds on a busy machine


def files(root):
    """Write the files of `predict`; return the summary, the arguments of `on_image`, and what was logged."""
    finished, logged = [], []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())
    logging.getLogger("maskwright").addHandler(handler)
    settings = {"device": "cpu", "on_image": lambda *counts: finished.append(counts)}
    paths = [str(root / name) for name in INPUTS]
    summary = predict_on_ray(root / "model.safetensors", paths, root / "files", TWO, **settings)
    return summary, finished, logged


def scores(root):
    """Score a split; return the scores and the number of finished images."""
    recipe, finished = tiny.recipe(root / "data", evaluate__metrics=["pq", "ap", "mean_iou"]), []
    options = {"device": "cpu", "on_image": lambda count, _: finished.append(count)}
    return evaluate_on_ray(root / "model.safetensors", recipe, "val", TWO, **options).scores, sum(finished)


def start_ray():
    """Start Ray, several times if need be."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    for attempt in range(1, STARTS + 1):
        try:
            ray.init("local", num_cpus=2, object_store_memory=80_000_000, include_dashboard=False, log_to_driver=False)
            return
        except Exception:
            if attempt == STARTS:
                raise
            traceback.print_exc()
            ray.shutdown()


def main(root):
    """Run the steps."""
    logging.getLogger("maskwright").setLevel(logging.INFO)
    start_ray()
    outcomes = {}
    for step in (files, scores):
        try:
            outcomes[step.__name__] = step(root)
        except Exception:
            outcomes[step.__name__] = traceback.format_exc()
        (root / "outcomes.pkl").write_bytes(pickle.dumps(outcomes))
    ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
