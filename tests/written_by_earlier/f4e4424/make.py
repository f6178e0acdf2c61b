"""Write the files of this folder. Run it with the code of commit f4e4424 only, from the root of a checkout of it:

    PYTHONPATH="$PWD/src:$PWD" python tests/written_by_earlier/f4e4424/make.py

It was run once. What is here stands for the files that users have, and must never be made anew with later code.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import typing
from pathlib import Path

import yaml
from pydantic import BaseModel

from tests.written_by_earlier.f4e4424.scenes import write_data
from tests.written_by_earlier.reading import ENVIRONMENT, describe_machine, history, looks, start_ranks, weights

HERE = Path(__file__).resolve().parent
RESNET = {"backbone": "test_resnet", "backbone_options": {"channels": [4, 4, 4, 4], "stem_width": 4}}
MASK2FORMER = {
    **RESNET,
    "backbone_norm": "batch",
    "queries": 6,
    "width": 32,
    "mask_width": 8,
    "heads": 2,
    "points": 1,
    "pixel_decoder_layers": 1,
    "pixel_decoder_feedforward": 8,
    "masked_decoder_layers": 1,
    "masked_decoder_feedforward": 8,
}
SEMASK = {
    "family": "semantic_fpn",
    "backbone": "swin_tiny_patch4_window7_224",
    "backbone_options": {"embed_dim": 2, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1], "mlp_ratio": 1.0},
    "window": 4,
    "semantic_scope": ["window", "window", "global", "global"],
    "semantic_window": 2,
    "width": 32,
}
PANOPTIC_SPLIT = {"images": "images", "annotations": "panoptic.json", "masks": "masks"}
PANOPTIC = {
    "format": "coco_panoptic",
    "root": "data/panoptic",
    "task": "panoptic",
    "train": PANOPTIC_SPLIT,
    "val": PANOPTIC_SPLIT,
}
LABELS = {
    "format": "label_maps",
    "root": "data/labels",
    "task": "semantic",
    "ignore_values": [255],
    "categories": [
        {"id": 3, "name": "sky", "is_thing": False},
        {"id": 7, "name": "grass", "is_thing": False},
        {"id": 8, "name": "box"},
        {"id": 20, "name": "card", "color": [230, 230, 230]},
    ],
    "train": {"images": "images", "annotations": "labels"},
    "val": {"images": "images", "annotations": "labels"},
}
INSTANCE = {
    "format": "coco_instance",
    "root": "data/four_channels",
    "task": "instance",
    "train": {"images": "images", "annotations": "instances.json"},
    "val": {"images": "images", "annotations": "instances.json"},
}
TRAIN = {
    "steps": 6,
    "batch_size": 4,
    "augment": {"resize": "large_scale_jitter", "scale": [0.8, 1.25], "crop": [64, 64]},
    "learning_rate": 1.0e-3,
    "backbone_factor": 1.0,
    "clip_norm": 1.0,
    "points": 64,
    "workers": 0,
    "check": False,
    "estimate": False,
    "log_every": 1,
    "trackers": [],
}
LEARNING = TRAIN | {
    "steps": 250,
    "optimizer": "muon",
    "muon_factor": 10.0,
    "learning_rate": 2.0e-3,
    "points": 256,
    "log_every": 50,
    "augment": {"resize": "short_side", "scale": [0.9, 1.1], "crop": [64, 64], "flip": 0.0},
}
MODELS = {
    "panoptic": {
        "name": "panoptic",
        "model": MASK2FORMER,
        "data": PANOPTIC,
        "train": LEARNING,
        "evaluate": {
            "task": "panoptic",
            "metrics": ["pq", "mean_iou", "ap"],
            "short_side": 96,
            "max_side": 128,
            "semantic_at": "input",
            "object_threshold": 0.4,
            "overlap_threshold": 0.5,
            "flip": True,
        },
    },
    "semask_fpn": {
        "name": "semask_fpn",
        "model": SEMASK,
        "data": LABELS,
        "train": LEARNING | {"steps": 60, "hard_pixels": 2000, "decay_batch_norms": True, "semantic_weight": 0.2},
        "evaluate": {
            "task": "semantic",
            "scales": [1.0, 1.5],
            "flip": True,
            "window": [48, 48],
            "stride": [32, 24],
            "batch_size": 2,
            "limit": 3,
        },
    },
    "four_channels": {
        "name": "four_channels",
        "model": MASK2FORMER | {"channels": 4, "pixel_mean": "measure", "pixel_std": "measure"},
        "data": INSTANCE,
        "train": LEARNING,
        "evaluate": {
            "task": "instance",
            "top_k": 20,
            "score_threshold": 0.05,
            "tile": 48,
            "tile_overlap": 16,
            "tile_mask_megabytes": 8,
        },
    },
}
# Each with what stands behind the recipe on its command line.
UNFINISHED = {
    "adamw": (
        {
            "name": "adamw",
            "model": MASK2FORMER | {"drop_path": 0.2},
            "data": PANOPTIC,
            "train": TRAIN
            | {
                "optimizer": "adamw",
                "schedule": "step",
                "drops": [0.5, 0.8],
                "warmup_steps": 3,
                "warmup_factor": 0.1,
                "layer_factor": 0.9,
                "gradient_checkpointing": True,
                "evaluate_every": 2,
                "best_score": "mIoU",
                "patience": 5,
                "checkpoint_every": 2,
            },
            "evaluate": {"task": "panoptic", "metrics": ["pq", "mean_iou"], "object_threshold": 0.1},
        },
        ["train.accumulate=2", "train.ema=0.6", "train.keep=1"],
    ),
    "muon": (
        {
            "name": "muon",
            "model": MASK2FORMER,
            "data": PANOPTIC,
            "train": TRAIN
            | {
                "optimizer": "muon",
                "muon_factor": 3.0,
                "muon_side": 32,
                "find_batch_size": True,
                "progressive": [{"until": 0.5, "size": 0.5}],
                "freeze_stages": 1,
                "keep": 1,
            },
            "evaluate": {"task": "panoptic"},
        },
        ["train.batch_size=2"],
    ),
    "sharded": (
        {
            "name": "sharded",
            "model": MASK2FORMER,
            "data": PANOPTIC,
            "train": TRAIN | {"shard": True, "optimizer": "muon", "freeze_stages": 4, "keep": 1},
            "evaluate": {"task": "panoptic", "object_threshold": 0.1},
        },
        [],
    ),
}
PROCESSES = {"adamw": 1, "muon": 1, "sharded": 2}
STOP_AFTER = 4  # of six steps


def main():
    for folder in ("models", "unfinished"):
        shutil.rmtree(HERE / folder, ignore_errors=True)
        (HERE / folder).mkdir()
    write_recipes()
    with tempfile.TemporaryDirectory() as place:
        write_data(Path(place) / "data")
        for name, values in MODELS.items():
            write_model(Path(place), name, values)
        for name, (values, overrides) in UNFINISHED.items():
            write_unfinished(Path(place), name, values, overrides)


def write_recipes():
    """Write what each recipe means, and see that together they set every key to something else than its default."""
    from maskwright.recipe import Recipe, load_recipe

    recipes = []
    for file in sorted((HERE / "recipes").glob("*.yaml")):
        recipe = load_recipe(file)
        write_json(file.with_suffix(".json"), recipe.model_dump(mode="json"))
        recipes.append(recipe)
    found, wanted = set(), set()
    collect(Recipe, recipes, found, wanted)
    assert wanted == found, sorted(wanted - found)


def collect(model, sections, found, wanted, prefix=""):
    """Collect the keys and the words to choose from that a section has, and those that the given ones use."""
    for name, field in model.model_fields.items():
        key, kinds = prefix + name, list(parts_of(field.annotation))
        given = [getattr(section, name) for section in sections if name in section.model_fields_set]
        items = [item for value in given for item in (value if isinstance(value, tuple) else [value])]
        wanted.add(key)
        if any(field.is_required() or value != field.default for value in given):
            found.add(key)
        for kind in kinds:
            if isinstance(kind, str):
                wanted.add(f"{key}={kind}")
                if kind in items or kind == field.default:
                    found.add(f"{key}={kind}")
            elif isinstance(kind, type) and issubclass(kind, BaseModel):
                collect(kind, [item for item in items if isinstance(item, kind)], found, wanted, key + ".")


def parts_of(annotation):
    """Give the types and choices that an annotation names, however deep."""
    yield annotation
    if typing.get_origin(annotation) is not dict:
        for part in typing.get_args(annotation):
            yield from parts_of(part)


def write_model(place, name, values):
    """Train a model, and write it with its scores and with what it sees in one image."""
    recipe = HERE / f"models/{name}.yaml"
    write_yaml(recipe, values)
    run(place, "train", recipe, "--output", name)
    shutil.copy(place / name / "best.safetensors", HERE / f"models/{name}.safetensors")
    model = HERE / f"models/{name}.safetensors"
    scores = json.loads(run(place, "evaluate", model, recipe, "--device", "cpu", "--json"))
    seen = looks(model, next((place / values["data"]["root"] / "images").glob("00.*")))
    write_json(
        HERE / f"models/{name}.json",
        {"machine": describe_machine(), "scores": scores, "seen": seen, "recipe": dump(recipe)},
    )


def write_unfinished(place, name, values, overrides):
    """Write a run that was asked to leave, and what becomes of it when it goes on."""
    recipe, processes = HERE / f"unfinished/{name}.yaml", PROCESSES[name]
    write_yaml(recipe, values)
    command = ["train", recipe, *overrides, "--output", name]
    assert start_ranks(processes, [sys.executable, __file__, "stop", *command], place)[0] == 75
    kept = shutil.ignore_patterns("*.png", "*.html", "best.safetensors", "last.safetensors")
    with tempfile.TemporaryDirectory() as copy, tarfile.open(HERE / f"unfinished/{name}.tar.xz", "w:xz") as archive:
        archive.add(shutil.copytree(place / name, Path(copy) / name, ignore=kept), name)
    status, told = start_ranks(processes, [sys.executable, "-m", "maskwright", *command], place)
    assert status == 0, told
    write_json(
        HERE / f"unfinished/{name}.json",
        {
            "machine": describe_machine(),
            "processes": processes,
            "overrides": overrides,
            "rows": history(place / name),
            "weights": weights(place / name / "last.safetensors"),
        },
    )


def stop(arguments):
    """Run the command line; the last process gets SIGTERM so early that all leave after the same step."""
    import maskwright.train

    import maskwright.cli

    real, world = maskwright.train.train_step, int(os.environ.get("WORLD_SIZE", "1"))

    def train_step(*parts):
        asked = STOP_AFTER - 1 if world == 1 else STOP_AFTER - 2  # several processes leave a step later
        if parts[-1] == asked and int(os.environ.get("RANK", "0")) == world - 1:
            signal.raise_signal(signal.SIGTERM)
        return real(*parts)

    maskwright.train.train_step = train_step
    sys.argv = ["maskwright", *arguments]
    maskwright.cli.main()


def dump(recipe):
    from maskwright.recipe import load_recipe

    return load_recipe(recipe).model_dump(mode="json")


def run(place, *arguments):
    command = [sys.executable, "-m", "maskwright", *map(str, arguments)]
    done = subprocess.run(command, cwd=place, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def write_yaml(file, values):
    file.write_text(yaml.dump(values, Dumper=Plain, sort_keys=False, width=110))


class Plain(yaml.SafeDumper):
    def ignore_aliases(self, data):
        return True


def write_json(file, values):
    file.write_text(json.dumps(values) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["stop"]:
        stop(sys.argv[2:])
    else:
        main()
