"""Catalog of everything that can be trained by name: built-in recipes, each with the published models that it trains.

The cost of a training run is given independently of the machine: steps times images per step, crop size, and number of
model parameters. The publishers' hardware is listed in `docs/recipes.md`.
"""

from __future__ import annotations

import dataclasses

from maskwright.checkpoints.zoo import ZooEntry, published_models
from maskwright.config.recipe import Recipe, load_recipe, recipe_names
from maskwright.config.schema import AugmentConfig, TrainConfig

_HEAD = """\
Train any of these with `maskwright train NAME`; print one as a YAML file to start from with `maskwright recipes NAME`.
Each recipe: data, task, model; steps x images per step of crop size. Below it, the published models that it trains:
backbone, expected score in percent, steps x images per step, millions of parameters, crop size if it differs.
"""


@dataclasses.dataclass(frozen=True)
class CatalogEntry:
    """A recipe or published model, and the cost of its training.

    Attributes:
        recipe: the built-in recipe that trains it.
        data: dataset of a published model, or `data.format` of a recipe.
        model: backbone of a published model, or `model.backbone` of a recipe.
        scores: expected, in percent as published, the main score of the task first; empty for recipes of maskwright.
        steps: optimizer steps.
        batch_size: images per step, over all processes.
        crop: height and width in pixels.
        parameters: in millions; None for recipes, whose number of classes may depend on the data.
    """

    name: str
    recipe: str
    description: str
    data: str
    task: str
    model: str
    scores: dict[str, float]
    steps: int
    batch_size: int
    crop: tuple[int, int]
    parameters: int | None

    @property
    def cost(self) -> str:
        """Steps x images per step."""
        return f"{self.steps} x {self.batch_size}"

    @property
    def score(self) -> str:
        """Main score of the task as published; empty if there is none."""
        return next((f"{name} {value}" for name, value in self.scores.items()), "")


def catalog_entries() -> list[CatalogEntry]:
    """Return all built-in recipes by name, each followed by the published models that it trains."""
    models = [entry for entry in published_models().values() if entry.recipe]
    entries = []
    for name in recipe_names():
        recipe = load_recipe(name)
        trained = [_from_published(entry, load_recipe(entry.name)) for entry in models if entry.recipe == name]
        same = next((entry.scores for entry in models if entry.recipe == name and not entry.overrides), {})
        entries += [_from_recipe(recipe, same), *trained]
    return entries


def terminal_table(entries: list[CatalogEntry]) -> str:
    """Format entries for 120 columns: one line per recipe, with its published models indented below."""
    columns = [_columns(entry) for entry in entries if entry.parameters]
    widths = [max(map(len, column)) for column in zip(*columns, strict=True)]
    crops = {entry.name: entry.crop for entry in entries}
    lines = [_HEAD]
    for entry in entries:
        if entry.parameters is None:
            description = entry.description.partition("; published")[0]  # the lines below say the rest
            lines.append(f"{entry.name}: {description}; {entry.cost} of {_size(entry.crop)}")
        else:
            name, model, score, cost = map(str.ljust, _columns(entry), widths)
            crop = f" {_size(entry.crop)}" if entry.crop != crops[entry.recipe] else ""
            lines.append(f"  {name} {model} {score} {cost} {entry.parameters:>4}M{crop}")
    return "\n".join(lines)


def markdown_table(entries: list[CatalogEntry]) -> str:
    """Format the recipes of published models, with the settings that define them, as a Markdown table."""
    head = (
        *("recipe", "published models", "best", "steps x images", "crop", "learning rate", "schedule"),
        "training image size",
    )
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for entry in entries:
        trained = [other for other in entries if other.recipe == entry.name != other.name]
        if not trained:
            continue
        train = load_recipe(entry.name).train
        best = max(trained, key=lambda other: next(iter(other.scores.values())))
        cells = (
            *(f"`{entry.name}`", str(len(trained)), f"{best.score} ({best.model})", entry.cost, _size(entry.crop)),
            *(f"{train.learning_rate:g}", _schedule(train), _image_size(train.augment)),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _from_recipe(recipe: Recipe, scores: dict[str, float]) -> CatalogEntry:
    return CatalogEntry(
        name=recipe.name,
        recipe=recipe.name,
        description=recipe.description,
        data=recipe.data.format,
        task=recipe.evaluate.task,
        model=recipe.model.backbone,
        scores=scores,
        steps=recipe.train.steps,
        batch_size=recipe.train.batch_size,
        crop=recipe.train.augment.crop_size,
        parameters=None,
    )


def _from_published(entry: ZooEntry, recipe: Recipe) -> CatalogEntry:
    return dataclasses.replace(
        _from_recipe(recipe, entry.scores),
        recipe=entry.recipe or entry.name,
        data=entry.data,
        task=entry.task,
        model=entry.backbone,
        parameters=entry.parameters,
    )


def _columns(entry: CatalogEntry) -> tuple[str, ...]:
    return entry.name, entry.model.removeprefix("SeMask "), entry.score, entry.cost  # the recipe's line says SeMask


def _schedule(train: TrainConfig) -> str:
    warmup = f", {train.warmup_steps} warm-up steps" if train.warmup_factor < 1 else ""
    if train.schedule == "poly":
        return f"poly {train.poly_power:g}{warmup}"
    return f"a tenth after {' and '.join(f'{drop:.1%}' for drop in train.milestones)}{warmup}"


def _image_size(augment: AugmentConfig) -> str:
    if augment.short_sides:
        return f"short side {augment.short_sides[0]} to {augment.short_sides[-1]}"
    low, high = augment.scale_range or (1.0, 1.0)
    return f"{low:g} to {high:g} times the {'crop' if augment.resize == 'large_scale_jitter' else 'image'}"


def _size(crop: tuple[int, int]) -> str:
    return f"{crop[0]}x{crop[1]}"
