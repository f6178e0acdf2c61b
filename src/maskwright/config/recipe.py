"""Recipes: one complete, typed YAML file per dataset, task and model family. Unknown keys are errors.

Files do not inherit from each other: a value is in the file, or it is the default in `schema`. The name of a
published model (`zoo.yaml`) refers to one of these files, plus the values that differ in its training. The resolved
recipe is saved with every run and inside every checkpoint.
"""

from __future__ import annotations

import difflib
import logging
import reprlib
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError, model_validator

from maskwright.config.old_names import old_keys, rename_key, rename_recipe, rename_section
from maskwright.config.safe_yaml import LOADER, load_yaml
from maskwright.config.schema import DataConfig, EvaluateConfig, ModelConfig, Strict, TrainConfig
from maskwright.config.text import decode_text
from maskwright.errors import RecipeError, one_line, printable

logger = logging.getLogger(__name__)

_SHORTENER = reprlib.Repr()  # for values in errors
_SHORTENER.maxstring = _SHORTENER.maxother = 80


class Recipe(Strict):
    """A complete recipe."""

    name: str
    description: str = ""
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    evaluate: EvaluateConfig

    @model_validator(mode="after")
    def _check_channels(self) -> Recipe:
        if self.model.channels is not None and self.train.augment.color_jitter:
            raise ValueError(
                "train.augment.color_jitter changes red, green and blue, but model.channels reads values as stored; "
                "set color_jitter to false or channels to null"
            )
        return self

    @model_validator(mode="after")
    def _check_copy_paste(self) -> Recipe:
        if self.train.augment.copy_paste is not None and self.data.task == "semantic":
            raise ValueError(
                "train.augment.copy_paste pastes single objects, but data.task semantic has one region per class "
                "and no objects; set data.task to instance or panoptic, or copy_paste to null"
            )
        return self

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        official = [name for name in self.evaluate.metrics or () if name.startswith("cityscapes")]
        if official and self.data.format not in ("cityscapes", "coco_panoptic"):
            raise ValueError(
                f"evaluate.metrics has {official[0]}, which needs Cityscapes' instance ids and void pixels, but "
                f"data.format {self.data.format} has neither; use data.format coco_panoptic, or other metrics"
            )
        if self.model.family == "semantic_fpn" and not self.data.task == self.evaluate.task == "semantic":
            raise ValueError(
                f"model.family semantic_fpn is for task semantic, but data.task is {self.data.task} and "
                f"evaluate.task is {self.evaluate.task}; set both to semantic"
            )
        pairs, blocks = len(self.train.mask_annealing), self.model.query_blocks
        if pairs and self.model.family != "eomt":
            raise ValueError("train.mask_annealing is for model.family eomt; set it to []")
        if pairs not in (0, blocks):
            raise ValueError(
                f"train.mask_annealing needs one [start, end] for each of {blocks} blocks (model.query_blocks), "
                f"found {pairs}; add or remove some"
            )
        return self


def load_recipe(source: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe and apply overrides.

    Args:
        source: a YAML file, or the name of a recipe that comes with the package (see `recipe_names`) or of a
            published model (see `zoo_values`).
        overrides: "section.key=value" each; values are YAML, so `null`, `true`, `3e-4` and `[1, 2]` work.

    Raises:
        RecipeError: the file does not exist or is not YAML; a key is unknown (the message names the nearest valid
            one) or missing; a value has the wrong type; the published model is not supported.
    """
    path = _find(source)
    if path is None:
        values, where = _published_values(_published_entry(str(source))), str(source)
    else:
        values, where = _read(path), path.name
    for old, new in old_keys(values):
        logger.warning("%s: %s has been renamed to %s", where, old, new)
    values = rename_recipe(values)
    batch_size = _batch_size(values)
    for override in overrides:
        _apply(values, override)
    if _batch_size(values) != batch_size and not any(key.startswith("train.learning_rate") for key in overrides):
        values["train"]["base_batch_size"] = batch_size
    return parse_recipe(values, where)


def read_recipe(file: Path) -> Recipe:
    """Read a recipe that maskwright wrote itself: like `load_recipe`, without warnings about old names of keys.

    Raises:
        RecipeError: as `load_recipe`.
    """
    return parse_recipe(_read(file), file.name)


def parse_recipe(values: dict, where: str) -> Recipe:
    """Validate plain values; `where` names their origin in errors.

    Raises:
        RecipeError: as `load_recipe`.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise _error(error, where) from None


def change_data(section: DataConfig, overrides: Sequence[str], where: str) -> DataConfig:
    """Return the `data` section of a dataset without a recipe with overrides as `load_recipe` takes them.

    Raises:
        RecipeError: as `load_recipe`; a key belongs to another section.
    """
    values = {"data": section.model_dump()}
    for override in overrides:
        _apply(values, override)
    if others := sorted(values.keys() - {"data"}):
        raise RecipeError(
            f"'{printable(others[0])}' cannot be set for a dataset without a recipe, only keys of data can",
            where=where,
            remedy="write a recipe with maskwright check --recipe, and change it there",
        )
    try:
        return DataConfig.model_validate(values["data"])
    except ValidationError as error:
        raise _error(error, where, DataConfig) from None


def change_settings(config: EvaluateConfig, **choices: object) -> EvaluateConfig:
    """Return the `evaluate` section with some values replaced; None keeps a value.

    Raises:
        RecipeError: a key is unknown, a value is of the wrong type or out of range, or two contradict each other.
    """
    given = {key: value for key, value in choices.items() if value is not None}
    values = config.model_dump() | rename_section("evaluate", given)
    try:
        return EvaluateConfig.model_validate(values)
    except ValidationError as error:
        raise _error(error, "", EvaluateConfig) from None


def recipe_names() -> list[str]:
    """Return the names of the recipes in the package."""
    return sorted(file.name[:-5] for file in _folder().iterdir() if file.name.endswith(".yaml"))


@cache
def zoo_values() -> dict[str, Any]:
    """Read `zoo.yaml`: "sources" by key, and "models", each with its recipe and the values that differ from it.

    It is read here, and not in `checkpoints/zoo.py`, because every published model can be trained by its name.
    """
    return yaml.load((resources.files("maskwright.config") / "zoo.yaml").read_text("utf-8"), LOADER)


def recipe_text(name: str) -> str:
    """Return a recipe as YAML to edit: a built-in one with its comments, a published model's with all its values.

    Raises:
        RecipeError: as `load_recipe`.
    """
    path = _find(name)
    if path is not None:
        return decode_text(path.read_bytes(), path.name)
    values = load_recipe(name).model_dump(mode="json", exclude_unset=True)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)


def dump_recipe(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, default_flow_style=None)


def data_root(root: str) -> Path:
    """Return the folder or archive of `data.root`; "sample" is the one in the package."""
    if root == "sample":
        return Path(str(resources.files("maskwright.data") / "sample"))
    return Path(root).expanduser()


def _folder():
    return resources.files("maskwright.config") / "recipes"


def _find(source: str | Path) -> Path | None:
    """Return the file of a recipe; None if the source is neither a file nor the name of a recipe in the package."""
    path = Path(source)
    if path.is_file():
        return path
    packaged = Path(str(_folder() / f"{source}.yaml"))
    return packaged if path.suffix not in (".yaml", ".yml") and packaged.is_file() else None


def _read(path: Path) -> dict:
    try:
        values = load_yaml(decode_text(path.read_bytes(), path.name))
    except (yaml.YAMLError, UnicodeError) as error:
        raise RecipeError(f"not valid YAML: {one_line(error)}", where=path.name) from None
    if not isinstance(values, dict):
        raise RecipeError(f"expected a mapping of keys to values, found {type(values).__name__}", where=path.name)
    return values


def _published_entry(name: str) -> dict:
    """Return the entry of that name in `zoo.yaml`."""
    entries = {entry["name"]: entry for entry in zoo_values()["models"]}
    if name in entries:
        return entries[name]
    near = difflib.get_close_matches(name, [*recipe_names(), *entries], 3, 0.4)
    hint = f"nearest recipes: {', '.join(near)}" if near else f"recipes: {', '.join(recipe_names())}"
    raise RecipeError(
        f"no recipe '{name}': it is neither a file nor a recipe of the package; {hint}",
        remedy="run `maskwright recipes` for the list",
    )


def _published_values(entry: dict) -> dict:
    """Return the values of a published model: those of its entry's recipe, with its overrides and its own name."""
    if "recipe" not in entry:
        raise RecipeError(f"{entry['name']} needs '{entry['needs']}', which this version does not support")
    values = _read(Path(str(_folder() / f"{entry['recipe']}.yaml")))
    for override in entry.get("overrides", ()):
        _apply(values, override)
    score, value = next(iter(entry["scores"].items()))
    about = f"{entry['data']}, {entry['task']}, {entry['backbone']}; published {score} {value}"
    return values | {"name": entry["name"], "description": about}


def _batch_size(values: dict) -> Any:
    train = values.get("train")
    default = TrainConfig.model_fields["batch_size"].default
    return train.get("batch_size", default) if isinstance(train, dict) else default


def _apply(values: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"override '{override}' does not have the form section.key=value")
    if (new := rename_key(key)) != key:
        logger.warning("%s has been renamed to %s", key, new)
    *parents, last = new.split(".")
    for parent in parents:
        child = values.get(parent)
        if not isinstance(child, dict):
            child = values[parent] = {}
        values = child
    try:
        values[last] = load_yaml(text)
    except yaml.YAMLError:
        where = f"override '{printable(override)}'"
        raise RecipeError("the value is not valid YAML", where=where, remedy="quote it") from None


def _error(error: ValidationError, where: str, section: type[BaseModel] = Recipe) -> RecipeError:
    """Make an error of the first problem that validation found."""
    problem = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in problem["loc"])
    match problem["type"]:
        case "extra_forbidden":
            nearest = difflib.get_close_matches(key, _keys(section), 1, 0.0)[0]
            return RecipeError(f"unknown key '{key}'", where=where, remedy=f"the nearest valid key is '{nearest}'")
        case "missing":
            return RecipeError(f"key '{key}' is missing", where=where)
        case "value_error":
            return RecipeError(
                f"{key}: {problem['ctx']['error']}" if key else str(problem["ctx"]["error"]), where=where
            )
    expected = f"{problem['msg'][:1].lower()}{problem['msg'][1:]}"
    found = problem["input"]
    return RecipeError(
        f"{key}: {expected}; found {_SHORTENER.repr(found)} ({printable(type(found).__name__)})", where=where
    )


def _keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Return the dotted names of all keys."""
    keys = []
    for name, info in model.model_fields.items():
        keys.append(prefix + name)
        for part in (info.annotation, *getattr(info.annotation, "__args__", ())):
            if isinstance(part, type) and issubclass(part, BaseModel):
                keys += _keys(part, f"{prefix}{name}.")
    return keys
