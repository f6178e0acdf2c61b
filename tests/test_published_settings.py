"""Every published configuration, by its name, is what its publisher wrote (facts in `published_settings.yaml`)."""

import functools
import itertools
import json
from pathlib import Path

import pytest
import yaml

from maskwright.checkpoints import zoo
from maskwright.config.categories import ignored_ids
from maskwright.config.recipe import Recipe, load_recipe, recipe_names, zoo_values
from maskwright.errors import RecipeError
from maskwright.training.optimizer import learning_rate_factor
from tests.full_size import SHARED, needs_full_size

TESTS = Path(__file__).resolve().parent

TABLE = yaml.safe_load((TESTS / "published_settings.yaml").read_text(encoding="utf-8"))
PUBLISHED = {name: entry for name, entry in zoo.published_models().items() if not entry.needs}
MODELS = {name: entry for name, entry in PUBLISHED.items() if not name.startswith("eomt-")}  # those have a table below


@functools.cache
def recipe_of(name: str) -> Recipe:
    return load_recipe(name)


def facts_of(config: str) -> dict:
    """The facts of a configuration, with those of its bases."""
    facts = TABLE["configs"][config]
    while "base" in facts:
        base = TABLE["bases"][facts["base"]]
        facts = base | {key: value for key, value in facts.items() if key != "base"}
    return facts


def named(stem: str) -> str:
    """The weights that timm names so: torchvision's ResNets, and Swins of ImageNet-1k or, as in the name, of 22k."""
    if stem.startswith("R-"):
        return f"resnet{stem[2:]}.tv_in1k"
    return f"{stem[:-4]}.ms_in22k" if stem.endswith("_22k") else f"{stem}.ms_in1k"


@functools.cache
def classes_of(categories: str, task: str) -> tuple[int, tuple[int, ...]]:
    """How many classes are trained, and which raw values are ignored; 255 stands for Cityscapes' -1."""
    entry = next(entry for entry in MODELS.values() if (entry.categories, entry.task) == (categories, task))
    ignored = (-1 if value == 255 and categories == "cityscapes" else value for value in ignored_ids(categories))
    return len(zoo.entry_categories(entry)), tuple(sorted(ignored))


def drops_of(recipe: Recipe) -> list[int] | None:
    """The steps from which the rate is a tenth, and a hundredth, found in the schedule itself."""
    train = recipe.train
    if train.schedule != "step":
        return None
    guesses = (round(drop * train.steps) + offset for drop in train.milestones for offset in (-1, 0, 1))
    return [step for step in guesses if learning_rate_factor(step, train) < 0.5 * learning_rate_factor(step - 1, train)]


def settings_of(name: str) -> dict:
    """What a recipe says, in the words of the table."""
    recipe, entry = recipe_of(name), MODELS[name]
    model, train, evaluate = recipe.model, recipe.train, recipe.evaluate
    augment = train.augment
    is_jitter = augment.resize == "large_scale_jitter"
    window = int(model.backbone.partition("window")[2].partition("_")[0] or 0)
    return {
        "task": evaluate.task if evaluate.task == recipe.data.task else None,
        "classes": classes_of(entry.categories, entry.task)[0],
        "ignore": list(classes_of(entry.categories, entry.task)[1]),
        "filter_empty": recipe.data.filter_empty,
        "weights": model.backbone if model.backbone_weights == "timm" else None,
        "norm": model.backbone_norm,
        "window": model.window_size or window,
        "semantic_window_size": model.semantic_window_size,
        "scope": list(model.semantic_attention or ()),
        "pixel_decoder": model.pixel_decoder,
        "drop_path_rate": model.drop_path_rate,
        "queries": model.num_queries,
        "mean": list(model.pixel_mean),
        "std": list(model.pixel_std),
        "batch": train.batch_size,
        "steps": train.steps,
        "rate": train.learning_rate,
        "decay": train.weight_decay,
        "backbone_lr_multiplier": train.backbone_lr_multiplier,
        "clip": train.max_grad_norm,
        "poly": train.poly_power if train.schedule == "poly" else None,
        "milestones": drops_of(recipe),
        "warmup": [train.warmup_steps, train.warmup_factor],
        "precision": "full" if train.precision == "fp32" else "mixed",
        "loss": [train.class_loss_weight, train.mask_loss_weight, train.dice_loss_weight, train.no_object_weight],
        "points": [train.num_points, train.oversample_ratio, train.importance_sample_ratio],
        "semantic": train.semantic_loss_weight,
        "ohem_pixels": train.ohem_pixels,
        "jitter": list(augment.scale_range or ()) if is_jitter else None,
        "scale": list(augment.scale_range or ()) if not is_jitter else None,
        "sides": list(augment.short_sides or ()),
        "longest": augment.max_side,
        "crop": list(augment.crop_size),
        "one_class": augment.single_category_max_area,
        "flip": augment.flip_probability,
        "color": augment.color_jitter,
        "test": [evaluate.short_side, evaluate.max_side],
        "thresholds": [evaluate.object_threshold, evaluate.overlap_threshold],
        "evaluate_every": train.evaluate_every,
    }


@pytest.mark.parametrize("name", MODELS)
def test_every_published_configuration_resolves_to_what_was_published(name):
    facts, settings = facts_of(MODELS[name].config), settings_of(name)
    facts["weights"] = named(facts["weights"])
    if facts["warmup"][1] == settings["warmup"][1] == 1.0:  # from the full rate on: no warm-up, whatever its steps
        del facts["warmup"]
    assert {key: settings[key] for key in facts} == facts


def test_the_table_has_every_configuration_once_and_no_other():
    """47 of the original, not 57; 24 of OpenMMLab; 16 of SeMask's 17, as MaskFormer cannot be built; EasyCV's."""
    assert sorted(entry.config for entry in MODELS.values()) == sorted(TABLE["configs"])
    publishers = [config.partition("/")[0] if "SeMask" in config else config.split("/")[1]
                  for config in TABLE["configs"]]  # fmt: skip
    assert sum(name in ("coco", "cityscapes", "ade20k", "mapillary-vistas") for name in publishers) == 47
    assert publishers.count("mask2former") == 24
    assert sum(name.startswith("SeMask") for name in publishers) == 16


def test_recipes_state_what_all_of_their_family_share():
    """A file may be read alone, so what the original never changes stands in each of its recipes."""
    for name in recipe_names():
        recipe = load_recipe(name)
        if (
            not name.startswith(("coco-p", "coco-i", "cityscapes-", "ade20k-", "mapillary-"))
            or "fpn" in name
            or "eomt" in name
        ):
            continue
        train = recipe.train
        assert {
            "steps",
            "batch_size",
            "learning_rate",
            "backbone_lr_multiplier",
            "weight_decay",
            "max_grad_norm",
            "schedule",
        } <= (train.model_fields_set), name
        assert (train.batch_size, train.learning_rate, train.max_grad_norm) == (16, 1e-4, 0.01), name
        assert recipe.data.root.startswith("data/"), name


# Configurations of tue-mps/eomt 7bd19dd: size of the ViT, its blocks with queries, steps, at which each block's masks
# begin to vanish and are gone, queries, side of the input. Its two schedules of COCO have 12 and 24 epochs.
LARGE = ("large", 4, 88692, [14782, 29564, 44346, 59128], [29564, 44346, 59128, 73910], 200)
GIANT = ("giant", 5, 88692, [14782, 25869, 36955, 48042, 59128], [29564, 40651, 51737, 62824, 73910], 200)
TWICE = (3, 177384, [29564, 73910, 118256], [59128, 103474, 147820], 200)
LARGE_ADE = ("large", 4, 39122, [6520, 13040, 19560, 26080], [13040, 19560, 26080, 32600])
GIANT_ADE = ("giant", 5, 39122, [6520, 11410, 16300, 21190, 26080], [13040, 17930, 22820, 27710, 32600])
LARGE3 = ("large", 4, 88692, [0, 29564, 44346, 59128], [3000, 44346, 59128, 73910], 200)
TWICE3 = (3, 177384, [0, 73910, 118256], [3000, 103474, 147820], 200)
EOMT = {
    "eomt-small-640-coco-panoptic": ("small", *TWICE, 640),
    "eomt-base-640-coco-panoptic": ("base", *TWICE, 640),
    "eomt-large-640-coco-panoptic": (*LARGE, 640),
    "eomt-giant-640-coco-panoptic": (*GIANT, 640),
    "eomt-large-1280-coco-panoptic": (*LARGE, 1280),
    "eomt-giant-1280-coco-panoptic": (*GIANT, 1280),
    "eomt-large-640-ade-panoptic": (*LARGE_ADE, 200, 640),
    "eomt-giant-640-ade-panoptic": (*GIANT_ADE, 200, 640),
    "eomt-large-1280-ade-panoptic": (*LARGE_ADE, 200, 1280),
    "eomt-giant-1280-ade-panoptic": (*GIANT_ADE, 200, 1280),
    "eomt-large-1024-cityscapes-semantic": (
        *("large", 4, 19902, [3317, 6634, 9951, 13268], [6634, 9951, 13268, 16585], 100),
        1024,
    ),
    "eomt-large-512-ade-semantic": (*LARGE_ADE, 100, 512),
    "eomt-large-640-coco-instance": (*LARGE, 640),
    "eomt-large-1280-coco-instance": (*LARGE, 1280),
    "eomt-dinov3-small-640-coco-panoptic": ("small", *TWICE3, 640),
    "eomt-dinov3-base-640-coco-panoptic": ("base", *TWICE3, 640),
    "eomt-dinov3-large-640-coco-panoptic": (*LARGE3, 640),
    "eomt-dinov3-large-1280-coco-panoptic": (*LARGE3, 1280),
    "eomt-dinov3-large-512-ade-semantic": (
        *("large", 4, 20192, [0, 6520, 9780, 13040], [3000, 9780, 13040, 16300], 100),
        512,
    ),
    "eomt-dinov3-large-640-coco-instance": (*LARGE, 640),
    "eomt-dinov3-large-1280-coco-instance": (*LARGE, 1280),
}


EOMT_SCORES = {  # model_zoo/dinov2.md and dinov3.md
    "eomt-small-640-coco-panoptic": 46.7,
    "eomt-base-640-coco-panoptic": 51.6,
    "eomt-large-640-coco-panoptic": 56.0,
    "eomt-giant-640-coco-panoptic": 57.0,
    "eomt-large-1280-coco-panoptic": 58.3,
    "eomt-giant-1280-coco-panoptic": 59.2,
    "eomt-large-640-ade-panoptic": 50.6,
    "eomt-giant-640-ade-panoptic": 51.3,
    "eomt-large-1280-ade-panoptic": 51.7,
    "eomt-giant-1280-ade-panoptic": 52.8,
    "eomt-large-1024-cityscapes-semantic": 84.2,
    "eomt-large-512-ade-semantic": 58.4,
    "eomt-large-640-coco-instance": 45.2,
    "eomt-large-1280-coco-instance": 48.8,
    "eomt-dinov3-small-640-coco-panoptic": 47.2,
    "eomt-dinov3-base-640-coco-panoptic": 53.1,
    "eomt-dinov3-large-640-coco-panoptic": 56.8,
    "eomt-dinov3-large-1280-coco-panoptic": 58.9,
    "eomt-dinov3-large-512-ade-semantic": 59.5,
    "eomt-dinov3-large-640-coco-instance": 45.9,
    "eomt-dinov3-large-1280-coco-instance": 49.9,
}


def test_every_configuration_of_eomt_has_its_published_score():
    assert sorted(EOMT) == sorted(set(PUBLISHED) - set(MODELS))
    assert {name: next(iter(PUBLISHED[name].scores.values())) for name in EOMT} == EOMT_SCORES
    for name, score in EOMT_SCORES.items():
        entry = PUBLISHED[name]
        if not entry.overrides:
            assert f"published {next(iter(entry.scores))} {score}" in load_recipe(entry.recipe).description


@pytest.mark.parametrize("name", EOMT)
def test_recipes_of_eomt_are_the_configurations_of_its_authors(name):
    size, blocks, steps, starts, ends, queries, side = EOMT[name]
    recipe, is_dinov3 = recipe_of(name), "dinov3" in name
    model, train, evaluate = recipe.model, recipe.train, recipe.evaluate
    assert model.backbone == f"vit_{size}_patch{'16_dinov3_qkvb' if is_dinov3 else '14_reg4_dinov2'}"
    options = {"rope_rescale_coords": 2.0} if is_dinov3 else {"img_size": side, "patch_size": 16}
    assert (model.backbone_options, model.query_blocks, model.num_queries) == (options, blocks, queries)
    assert (train.steps, train.batch_size) == (steps, 16)
    found = [[round(fraction * steps) for fraction in pair] for pair in train.mask_annealing]
    assert found == [list(pair) for pair in zip(starts, ends, strict=True)]
    assert [train.warmup_steps, train.backbone_warmup_steps] == ([2000, 3000] if is_dinov3 else [500, 1000])
    assert (train.learning_rate, train.query_block_decay) == ((2e-4, False) if is_dinov3 else (1e-4, True))
    assert train.layer_decay == (1.0 if name == "eomt-dinov3-large-512-ade-semantic" else 0.8)
    assert (train.backbone_lr_multiplier, train.weight_decay, train.max_grad_norm) == (1.0, 0.05, 0.01)
    assert train.decay_norms_and_embeddings
    assert train.augment.crop_size == (side, side)
    assert train.augment.scale_range == ((0.5, 2.0) if evaluate.task == "semantic" else (0.1, 2.0))
    assert train.augment.color_jitter == (recipe.data.format != "coco")
    assert evaluate.short_side == side
    if evaluate.task == "semantic":
        assert (evaluate.window_size, evaluate.window_stride, evaluate.pad_size) == ((side, side), "even", None)
    else:
        assert (evaluate.max_side, evaluate.pad_size, evaluate.window_size) == (side, (side, side), None)


# The original's rules across its configurations, in words


def of_the_original():
    return [entry for entry in MODELS.values() if entry.source.title.startswith("Mask2Former")]


def test_queries_are_200_for_swin_large_with_instances_and_100_elsewhere():
    for entry in of_the_original():
        large = entry.backbone.startswith("Swin-L") and entry.task != "semantic"
        assert recipe_of(entry.name).model.num_queries == (200 if large else 100), entry.name


def test_steps_are_50_or_100_epochs_of_coco_and_90_160_and_300_thousand_elsewhere():
    thousands = {"cityscapes": 90, "ade": 160, "mapillary-vistas": 300}
    for entry in of_the_original():
        steps, large = recipe_of(entry.name).train.steps, entry.backbone.startswith("Swin-L")
        expected = 368750 * (2 if large else 1) if entry.data == "coco" else 1000 * thousands[entry.data]
        assert steps == expected, entry.name


def test_every_swin_drops_paths_and_no_resnet_does():
    for name, entry in MODELS.items():
        assert recipe_of(name).model.drop_path_rate == (0.3 if "Swin" in entry.backbone else 0.0), name


def test_within_one_recipe_only_the_backbone_sizes_and_the_publishers_habits_differ():
    """What an entry may change of its recipe: nothing else slips in unseen."""
    may_differ = {
        "name", "description", "model.backbone", "model.backbone_norm", "model.drop_path_rate", "model.num_queries",
        "model.pixel_decoder", "model.semantic_attention", "train.steps", "train.warmup_factor", "train.precision",
        "train.num_points", "train.ohem_pixels", "train.augment.short_sides", "train.augment.max_side",
        "train.augment.crop_size", "train.augment.single_category_max_area", "evaluate.short_side", "evaluate.max_side",
    }  # fmt: skip
    for name, entry in MODELS.items():
        ours, base = flat(recipe_of(name).model_dump()), flat(load_recipe(entry.recipe).model_dump())
        assert {key for key in ours if ours[key] != base[key]} <= may_differ, name


def flat(values: dict, prefix: str = "") -> dict:
    return dict(
        itertools.chain.from_iterable(
            flat(value, f"{prefix}{key}.").items() if isinstance(value, dict) and value else [(prefix + key, value)]
            for key, value in values.items()
        )
    )


# Names


def test_a_published_name_is_a_recipe_of_that_name_and_overrides_count_on_top():
    recipe = load_recipe("mask2former-swin-large-coco-panoptic", ["data.root=/coco", "train.batch_size=4"])
    assert recipe.name == "mask2former-swin-large-coco-panoptic"
    assert recipe.description == "coco, panoptic, Swin-L (22k); published PQ 57.8"
    assert (recipe.model.num_queries, recipe.data.root) == (200, "/coco")
    assert recipe.train.base_batch_size == 16


def test_no_recipe_has_the_name_of_a_published_model():
    assert not set(recipe_names()) & {entry["name"] for entry in zoo_values()["models"]}


def test_a_misspelt_published_name_and_one_that_cannot_be_built_are_refused_in_a_line():
    with pytest.raises(RecipeError, match=r"^no recipe 'mask2former-swin-tny-.*nearest recipes: mask2former-swin-tiny"):
        load_recipe("mask2former-swin-tny-coco-panoptic")
    with pytest.raises(RecipeError, match=r"^semask-maskformer-swin-large-ade-semantic needs 'maskformer', which this"):
        load_recipe("semask-maskformer-swin-large-ade-semantic")


# Against the facts beside the fixtures


@needs_full_size
def test_the_table_agrees_with_the_published_facts_of_openmmlab():
    published = json.loads((SHARED / "parity/openmmlab/published.json").read_text(encoding="utf-8"))
    for name, theirs in published.items():
        facts = facts_of(f"configs/mask2former/{name}.py")
        steps = {step["op"]: step for step in theirs["train_augmentation"]}
        crop = steps["random_crop"]
        (schedule,) = theirs["schedule"]
        assert facts["classes"] == theirs["num_classes"]
        assert facts["queries"] == theirs["num_queries"]
        assert facts["steps"] == theirs["max_iterations"] == schedule["end"]
        assert facts.get("milestones") == schedule.get("milestones")
        assert facts.get("poly") == schedule.get("power")
        assert facts["batch"] == theirs["base_batch_size"]
        assert (facts["rate"], facts["decay"]) == (theirs["optimizer"]["lr"], theirs["optimizer"]["weight_decay"])
        assert facts["backbone_lr_multiplier"] == theirs["param_multipliers"]["backbone"]["lr_mult"]
        assert facts["clip"] == theirs["grad_clip"]["max_norm"]
        assert facts["crop"] == crop["crop_size"]
        assert facts["one_class"] == crop.get("cat_max_ratio", 1.0)
        assert facts.get("sides") == steps.get("random_choice_resize", {}).get("scales")
        assert facts.get("longest") == steps.get("random_choice_resize", {}).get("max_size")
        assert facts.get("jitter") == steps.get("random_resize", {}).get("ratio_range")
        assert facts["flip"] == steps["random_flip"]["prob"]
        assert facts["color"] == ("photo_metric_distortion" in steps)
        assert facts["test"] == theirs["test_resize_wh"][0][::-1]
        assert facts["evaluate_every"] == theirs["val_interval"]
        assert facts["loss"] == [theirs["loss_weights"][key] for key in ("class", "mask", "dice", "no_object")]
        assert facts["points"] == list(theirs["points"].values())
        assert (facts["mean"], facts["std"]) == (theirs["input"]["mean"], theirs["input"]["std"])
        assert facts.get("drop_path_rate") == theirs["backbone"].get("drop_path_rate")
        assert facts.get("window") == theirs["backbone"].get("window_size")


@needs_full_size
@pytest.mark.parametrize("name", [name for name in MODELS if "semask-fpn" in name and "stuff" not in name])
def test_the_table_agrees_with_the_published_facts_of_semask(name):
    size, data = name.split("-")[3][0], "cityscapes" if "cityscapes" in name else "ade20k"
    file = SHARED / f"parity/semask/fpn_swin_{size}_{data}.json"
    theirs, facts = json.loads(file.read_text(encoding="utf-8")), facts_of(MODELS[name].config)
    training, optimizer = theirs["training"], theirs["training"]["optimizer"]
    assert facts["crop"] == training["crop"]
    assert facts["one_class"] == (training["augmentation"]["crop_retry_if_one_class_covers_at_least"] or 1.0)
    assert facts["test"] == theirs["test"]["image_scale"][::-1]
    assert (facts["rate"], facts["decay"]) == (optimizer["lr"], optimizer["weight_decay"])
    assert facts["scope"] == theirs["model"]["backbone"]["semantic_scope"]
    assert facts["window"] == theirs["model"]["backbone"]["window"] == theirs["model"]["backbone"]["sem_window"]
    assert facts["drop_path_rate"] == theirs["model"]["backbone"]["drop_path_rate"]
    assert facts["ohem_pixels"] == (theirs["losses_config"]["hard_pixels"] or {}).get("keep_per_image")
    assert facts["semantic"] == theirs["losses_config"]["semantic_weight"]
    assert list(MODELS[name].scores.values()) == [theirs["published"]["miou"], theirs["published"]["miou_ms_flip"]]


@needs_full_size
def test_the_table_agrees_with_the_published_facts_of_easycv():
    file = SHARED / "parity/easycv/easycv_r50_coco_panoptic.json"
    theirs = json.loads(file.read_text(encoding="utf-8"))["facts"]
    facts = facts_of("configs/segmentation/mask2former/mask2former_r50_8xb2_e50_panoptic.py")
    assert facts["points"] == list(theirs["points"].values())
    assert facts["milestones"] == theirs["schedule"]["step"]
    assert facts["test"] == theirs["test_pipeline"]["img_scale_wh"][::-1]
    assert (facts["rate"], facts["decay"]) == (theirs["optimizer"]["lr"], theirs["optimizer"]["weight_decay"])
    assert facts["clip"] == theirs["grad_clip"]["max_norm"]
    assert facts["batch"] == 8 * theirs["batch_size_per_gpu"]
