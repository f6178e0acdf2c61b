"""A prediction and an evaluation on Ray with two workers: `python -m tests.ray_steps FOLDER`, for tests/test_ray.py.

It is a program of its own so that pytest survives whatever happens to Ray. FOLDER holds model.safetensors, images, and
data in COCO's panoptic format. FOLDER/outcomes.pkl then maps each step to what it returned, or to its traceback.
"""

import faulthandler
import logging
import os
import pickle
import sys
import traceback
from pathlib import Path

from maskwright.cluster.ray_evaluate import evaluate_on_ray
from maskwright.cluster.ray_options import RayOptions
from maskwright.cluster.ray_predict import predict_on_ray
from maskwright.cluster.ray_session import ray_session
from maskwright.errors import MaskwrightError
from tests import tiny

TWO = RayOptions(workers=2)
INPUTS = ("folder", "more.zip", "list.csv", "bytes.parquet", "damaged", "transparent")


def niceness(_):
    """Return the niceness of a worker process and of this one."""
    import ray  # after the session has set its variables

    return ray.get(ray.remote(lambda: os.nice(0)).remote()), os.nice(0)


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


def run_steps(root):
    """Run the steps on one Ray."""
    outcomes = {}
    with ray_session(TWO):
        for step in (niceness, files, scores):
            try:
                outcomes[step.__name__] = step(root)
            except Exception:
                outcomes[step.__name__] = traceback.format_exc()
            save(root, outcomes)


def save(root, outcomes):
    (root / "outcomes.pkl").write_bytes(pickle.dumps(outcomes))


def main(root, seconds):
    """Run the steps; after `seconds`, write to FOLDER/stacks.txt where this process hangs."""
    stacks = (root / "stacks.txt").open("w")
    faulthandler.dump_traceback_later(seconds, file=stacks)
    logging.getLogger("maskwright").setLevel(logging.INFO)
    try:
        run_steps(root)
    except MaskwrightError as error:
        save(root, {"start": error})


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
