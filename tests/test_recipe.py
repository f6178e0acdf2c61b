"""Recipes: what is read, what is refused and in which words, and the recipes that come with the package."""

import json
import time
from pathlib import Path

import pytest
import torch
import yaml

from maskwright.config import recipe_keys
from maskwright.config.categories import load_categories
from maskwright.config.old_names import OLD_NAMES
from maskwright.config.recipe import Recipe, data_root, dump_recipe, load_recipe, parse_recipe, recipe_names
from maskwright.errors import DatasetError, RecipeError
from maskwright.models import build_model
from maskwright.structures.annotations import Category
from tests import tiny

VALUES = {
    "name": "tiny",
    "model": {"backbone": "resnet18"},
    "data": {"format": "label_maps", "root": "data", "task": "semantic", "categories": "camvid"},
    "train": {"steps": 10, "augment": {"resize": "short_side", "crop_size": [64, 64], "scale_range": [0.5, 2.0]}},
    "evaluate": {"task": "semantic"},
}


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(VALUES), encoding="utf-8")
    return path


def refuse(source: object, *overrides: str) -> str:
    """The message; always one line."""
    with pytest.raises(RecipeError) as error:
        load_recipe(source, overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


# Reading


def test_a_file_is_read_with_the_defaults_of_the_original(file):
    recipe = load_recipe(file)
    assert (recipe.train.learning_rate, recipe.train.weight_decay, recipe.train.max_grad_norm) == (1e-4, 0.05, 0.01)
    assert (recipe.train.num_points, recipe.train.oversample_ratio, recipe.train.importance_sample_ratio) == (
        12544,
        3.0,
        0.75,
    )
    assert (recipe.train.class_loss_weight, recipe.train.mask_loss_weight, recipe.train.dice_loss_weight) == (
        2.0,
        5.0,
        5.0,
    )
    assert (recipe.model.num_queries, recipe.model.hidden_dim, recipe.model.masked_decoder_layers) == (100, 256, 9)
    assert (recipe.evaluate.object_threshold, recipe.evaluate.overlap_threshold, recipe.evaluate.top_k) == (
        0.8,
        0.8,
        100,
    )


def test_numbers_without_a_dot_before_the_exponent_are_numbers(file):
    text = file.read_text(encoding="utf-8").replace("steps: 10", "steps: 10\n  learning_rate: 3e-4")
    file.write_text(text, encoding="utf-8")
    assert load_recipe(file).train.learning_rate == 3e-4


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("train.steps=250", "train", "steps", 250),
        ("train.learning_rate=3e-4", "train", "learning_rate", 3e-4),
        ("train.learning_rate=1", "train", "learning_rate", 1.0),
        ("train.max_grad_norm=null", "train", "max_grad_norm", None),
        ("train.milestones=[0.5, 0.75]", "train", "milestones", (0.5, 0.75)),
        ("model.backbone=swin_tiny_patch4_window7_224", "model", "backbone", "swin_tiny_patch4_window7_224"),
        ("model.backbone_options={depths: [1, 1, 1, 1]}", "model", "backbone_options", {"depths": [1, 1, 1, 1]}),
        ("model.pixel_mean=[1, 2.5, 3]", "model", "pixel_mean", (1.0, 2.5, 3.0)),
        ("data.root=/some/folder=with/equals", "data", "root", "/some/folder=with/equals"),
        ("data.label_map={7: 1, 8: ignore}", "data", "label_map", {7: 1, 8: "ignore"}),
        ("evaluate.max_images=5", "evaluate", "max_images", 5),
    ],
)
def test_overrides_of_every_kind_replace_the_value_in_the_file(file, override, section, key, value):
    assert getattr(getattr(load_recipe(file, [override]), section), key) == value


def test_overrides_reach_inside_and_create_what_is_absent(file):
    recipe = load_recipe(
        file, ["train.augment.color_jitter=true", "train.augment.flip_probability=0", "data.val.images=val"]
    )
    assert (recipe.train.augment.color_jitter, recipe.train.augment.flip_probability) == (True, 0.0)
    assert recipe.data.val.images == "val"
    assert recipe.train.augment.crop_size == (64, 64)


def test_the_last_of_two_overrides_counts(file):
    assert load_recipe(file, ["train.steps=1", "train.steps=2"]).train.steps == 2


def test_a_recipe_cannot_be_changed_afterwards(file):
    recipe = load_recipe(file)
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.steps = 5


# Refusing


@pytest.mark.parametrize(
    ("override", "unknown", "nearest"),
    [
        ("train.learning_rat=1", "train.learning_rat", "train.learning_rate"),
        ("model.num_querys=50", "model.num_querys", "model.num_queries"),
        ("train.augment.flip_prob=1", "train.augment.flip_prob", "train.augment.flip_probability"),
        ("data.train.image=x", "data.train.image", "data.train.images"),
        ("trian=1", "trian", "train"),
        ("evaluate.x=1", "evaluate.x", "evaluate.top_k"),
    ],
)
def test_an_unknown_key_names_the_file_the_key_and_the_nearest_one(file, override, unknown, nearest):
    message = refuse(file, *(["data.train.images=train"] if "data.train" in override else []), override)
    assert message.startswith(f"tiny.yaml: unknown key '{unknown}'; the nearest valid key is '")
    if unknown != "evaluate.x":
        assert message.endswith(f"'{nearest}'")


@pytest.mark.parametrize(
    ("override", "key", "found"),
    [
        ("train.steps=many", "train.steps", "'many' (str)"),
        ("train.steps=1.5", "train.steps", "1.5 (float)"),
        ("train.steps=0", "train.steps", "0 (int)"),
        ("train.learning_rate=[1]", "train.learning_rate", "[1] (list)"),
        ("model.backbone=50", "model.backbone", "50 (int)"),
        ("model.backbone.depth=50", "model.backbone", "{'depth': 50} (dict)"),
        ("train.augment.crop_size=512", "train.augment.crop_size", "512 (int)"),
        ("train.augment.crop_size=[512]", "train.augment.crop_size.1", "is missing"),
        ("evaluate.task=depth", "evaluate.task", "'depth' (str)"),
        ("evaluate.object_threshold=80", "evaluate.object_threshold", "80 (int)"),
        ("model=null", "model", "None (NoneType)"),
        ("data.categories=5", "data.categories", "5 (int)"),
        ("data.categories=[{id: 1, nam: road}]", "data.categories", "nam"),
    ],
)
def test_a_wrong_value_names_the_file_the_key_and_what_was_found(file, override, key, found):
    message = refuse(file, override)
    assert message.startswith("tiny.yaml: ")
    assert key in message
    assert found in message


@pytest.mark.parametrize(
    "key", ["name", "model", "model.backbone", "data.root", "train.steps", "train.augment.crop_size"]
)
def test_a_missing_key_is_named(tmp_path, key):
    values = json.loads(json.dumps(VALUES))
    *parents, last = key.split(".")
    section = values
    for parent in parents:
        section = section[parent]
    del section[last]
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    assert refuse(tmp_path / "tiny.yaml") == f"tiny.yaml: key '{key}' is missing"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.hidden_dim=100"], "model: hidden_dim 100 must be a multiple of 32"),
        (["model.hidden_dim=96", "model.num_heads=5"], "model: hidden_dim 96 must be a multiple of num_heads 5"),
        (
            ["train.batch_size=6", "train.gradient_accumulation_steps=4"],
            "train: batch_size 6 must be a multiple of gradient_accumulation_steps 4",
        ),
        (["train.augment.scale_range=null"], "train.augment: short_side needs either short_sides or scale_range"),
        (["train.augment.short_sides=[64]"], "train.augment: short_side needs either short_sides or scale_range"),
        (["train.augment.scale_range=[2, 1]"], "scale_range [2.0, 1.0] must be [min, max]"),
        (["train.augment={resize: large_scale_jitter, crop_size: [8, 8]}"], "large_scale_jitter needs scale_range"),
    ],
)
def test_values_that_contradict_each_other_are_refused(file, overrides, message):
    assert message in refuse(file, *overrides)


@pytest.mark.parametrize("override", ["train.steps", "=3", "train steps 3"])
def test_an_override_of_another_form_is_refused(file, override):
    assert refuse(file, override) == f"override '{override}' does not have the form section.key=value"


def test_an_override_that_is_not_yaml_is_refused(file):
    assert (
        refuse(file, "train.milestones=[0.1")
        == "override 'train.milestones=[0.1': the value is not valid YAML; quote it"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [1", "broken.yaml: not valid YAML: "),
        ("- 1\n- 2", "broken.yaml: expected a mapping of keys to values, found list"),
        ("", "broken.yaml: expected a mapping of keys to values, found NoneType"),
        ("\x00\x01", "broken.yaml: not valid YAML: "),
        ("!!python/object/apply:os.system ['true']", "broken.yaml: not valid YAML: "),
    ],
)
def test_files_that_are_no_recipe_are_refused(tmp_path, content, message):
    (tmp_path / "broken.yaml").write_text(content, encoding="utf-8")
    assert refuse(tmp_path / "broken.yaml").startswith(message)


def test_a_recipe_that_is_not_found_names_the_nearest_ones():
    message = refuse("coco-panoptic-r5")
    assert message.startswith(
        "no recipe 'coco-panoptic-r5': it is neither a file nor a recipe of the package; nearest recipes: "
    )
    assert "coco-panoptic-r50" in message
    assert "recipes: ade20k" in refuse("zzz")
    assert "neither a file" in refuse("absent/folder/file.yaml")


# The package's own


@pytest.mark.parametrize("name", recipe_names())
def test_every_packaged_recipe_loads_and_builds(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    listed = recipe.data.categories
    categories = load_categories(listed) if listed else (Category(1, "thing", True, (0, 0, 0)),)
    with torch.device("meta"):
        model = build_model(recipe.model, categories)
    if recipe.model.family == "semantic_fpn":
        assert model.decoder.classifier.out_channels == len(categories)
    else:
        head = model.head if recipe.model.family == "eomt" else model.masked_decoder
        assert head.class_head.out_features == len(categories) + 1


@pytest.mark.parametrize("name", recipe_names())
def test_every_packaged_recipe_survives_being_written_and_read(name, tmp_path):
    recipe = load_recipe(name)
    (tmp_path / "copy.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "copy.yaml") == recipe
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


@pytest.mark.parametrize("name", recipe_names())
def test_every_packaged_recipe_is_complete_and_short(name):
    text = (Path(load_recipe.__code__.co_filename).parent / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 80
    recipe = load_recipe(name)
    assert recipe.data.train is not None
    assert recipe.data.val is not None
    things_only = recipe.data.task == "instance"
    assert not (things_only and recipe.evaluate.task != "instance")


def test_the_table_of_keys_in_the_docs_is_current_and_describes_every_key():
    table = recipe_keys.markdown()
    assert (Path(__file__).parents[1] / "docs" / "recipe-keys.md").read_text(encoding="utf-8") == table
    assert "None" not in table
    for section in OLD_NAMES.values():
        assert all(f"| `{old}` |" in table for old in section)


def test_names_in_any_script_survive_being_written(tmp_path):
    recipe = parse_recipe(VALUES | {"name": "Straße – 道路"}, "here")
    (tmp_path / "copy.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "copy.yaml") == recipe


def test_the_sample_is_inside_the_package_and_other_roots_are_paths(monkeypatch, tmp_path):
    assert (data_root("sample") / "README.md").is_file()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_root("~/data") == tmp_path / "data"
    assert data_root("data/coco") == Path("data/coco")


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)
HOSTILE_YAML = {
    "aliases of aliases": (BOMB + "model: *a9\n", "aliases stand for too much, line|aliases stand for too much"),
    "a long text many times": (f"a: &a {'x' * 10_000}\nb: [{', '.join(['*a'] * 200)}]\n", "aliases stand for too much"),
    "an alias in itself": ("a: &a [*a]\n", "contains itself"),
    "deep lists": ("a: " + "[" * 100_000, "nested too deeply"),
    "deep mappings": ("a: " + "{a: " * 5000, "nested too deeply"),
    "deep blocks": ("- " * 3000 + "a", "nested too deeply"),
    "an endless integer": (f"a: {'9' * 5000}", "a value cannot be read"),
    "an impossible date": ("a: 2001-13-45", "a value cannot be read"),
    "a false number": ("a: !!int x", "a value cannot be read"),
    "an empty number": ("a: !!int ''", "a value cannot be read"),
    "a false date": ("a: !!timestamp x", "a value cannot be read"),
    "a Python object": ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
    "a list as a key": ("? [a]\n: b", "unhashable"),
    "an unknown alias": ("a: *b", "undefined alias"),
}


@pytest.mark.parametrize("name", HOSTILE_YAML)
def test_hostile_yaml_is_refused_in_one_line(name, file, tmp_path):
    content, message = HOSTILE_YAML[name]
    (tmp_path / "hostile.yaml").write_text(content)
    start = time.process_time()
    with pytest.raises(RecipeError, match=rf"hostile\.yaml: not valid YAML.*({message})") as error:
        load_recipe(tmp_path / "hostile.yaml")
    with pytest.raises(DatasetError, match=r"hostile\.yaml: not a class list") as second:
        load_categories(str(tmp_path / "hostile.yaml"))
    inline = content.replace("\n", ", ").rstrip(", ")
    with pytest.raises(RecipeError, match="the value is not valid YAML") as third:
        load_recipe(file, [f"train.steps={{{inline}}}"])
    assert time.process_time() - start < 5
    assert all(str(one.value).isprintable() and len(str(one.value)) < 600 for one in (error, second, third))


def test_aliases_that_save_typing_are_read(tmp_path):
    values = tiny.values(tmp_path)
    text = yaml.safe_dump(values).replace("crop_size:\n    - 64\n    - 64", "crop_size: [&side 64, *side]")
    assert "*side" in text
    (tmp_path / "recipe.yaml").write_text(text)
    assert load_recipe(tmp_path / "recipe.yaml").train.augment.crop_size == (64, 64)


def test_long_values_are_shortened_in_errors(file):
    with pytest.raises(RecipeError, match=r"train\.steps: .* found \['x.*\.\.\.") as error:
        load_recipe(file, [f"train.steps=[{', '.join(['x' * 500] * 100)}]"])
    assert len(str(error.value)) < 600


def test_overrides_of_many_levels_are_unknown_keys(file):
    with pytest.raises(RecipeError, match="unknown key") as error:
        load_recipe(file, [f"{'a.' * 5000}b=1"])
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "cp1252"])
def test_recipes_and_class_lists_in_other_encodings_are_read(tmp_path, encoding):
    values = VALUES | {"description": "Bäume"}
    text = yaml.safe_dump(values, allow_unicode=True)
    (tmp_path / "r.yaml").write_bytes(text.encode(encoding))
    assert load_recipe(tmp_path / "r.yaml").description == "Bäume"
    (tmp_path / "classes.yaml").write_bytes("- {id: 1, name: Bäume}\n".encode(encoding))
    assert load_categories(str(tmp_path / "classes.yaml"))[0].name == "Bäume"


def test_recipe_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"\x00\xff\xfe\x81" * 40)
    with pytest.raises(RecipeError, match="not a text file"):
        load_recipe(tmp_path / "r.yaml")
