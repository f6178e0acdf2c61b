"""What can be trained by name: the package's recipes, and below each the published models that it trains.

The cost of a training is stated as what it takes on any machine: steps times images per step, the crop that each image
becomes, and the model's parameters. What the publishers trained on is in `docs/recipes.md`.
"""

from __future__ import annotations

import dataclasses

from maskwright.checkpoints.zoo import ZooEntry, published_models
from maskwright.config.recipe import Recipe, load_recipe, recipe_names
from maskwright.config.schema import AugmentConfig, TrainConfig

_HEAD = """\
`maskwright train NAME` takes each of these names, `maskwright recipes NAME` prints it as a file to start from.
Recipe: data, task, model; steps x images per step of a crop. Below it the published models that it trains: backbone,
expected score in percent, steps x images per step, millions of parameters, and the crop where it is another one.
"""


@dataclasses.dataclass(frozen=True)
class Row:
    """One name and what its training is and costs.

    Attributes:
        recipe: the file behind the name; the name itself for a recipe of the package.
        data: a published model's data set, or a recipe's `data.format`.
        model: a published model's backbone, or a recipe's timm name.
        scores: expected, in percent as published, the task's own first; empty for recipes that are ours.
        steps: of the optimizer.
        batch_size: images per step, over all processes.
        crop: height, width in pixels.
        parameters: millions; None for recipes, whose number of classes the data may decide.
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
        """Steps times images per step."""
        return f"{self.steps} x {self.batch_size}"

    @property
    def score(self) -> str:
        """The task's own, as published; empty where none is."""
        return next((f"{name} {value}" for name, value in self.scores.items()), "")


def all_rows() -> list[Row]:
    """Each recipe of the package, by name, followed by the published models that it trains."""
    models = [entry for entry in published_models().values() if entry.recipe]
    rows = []
    for name in recipe_names():
        recipe = load_recipe(name)
        trained = [_published(entry, load_recipe(entry.name)) for entry in models if entry.recipe == name]
        same = next((entry.scores for entry in models if entry.recipe == name and not entry.overrides), {})
        rows += [_own(recipe, same), *trained]
    return rows


def table(rows: list[Row]) -> str:
    """Rows for a terminal of 120 columns: a line for each recipe, and indented below it its published models."""
    columns = [_columns(row) for row in rows if row.parameters]
    widths = [max(map(len, column)) for column in zip(*columns, strict=True)]
    crops = {row.name: row.crop for row in rows}
    lines = [_HEAD]
    for row in rows:
        if row.parameters is None:
            about = row.description.partition("; published")[0]  # which the rows below say
            lines.append(f"{row.name}: {about}; {row.cost} of {_size(row.crop)}")
        else:
            name, model, score, cost = map(str.ljust, _columns(row), widths)
            other = f" {_size(row.crop)}" if row.crop != crops[row.recipe] else ""
            lines.append(f"  {name}  {model}  {score}  {cost}  {row.parameters:>3}M{other}")
    return "\n".join(lines)


def markdown(rows: list[Row]) -> str:
    """The recipes that train published models as a table, and what each of them sets."""
    head = ("recipe", "published models", "best", "steps x images", "crop", "rate", "schedule", "sizes in training")
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for row in rows:
        trained = [other for other in rows if other.recipe == row.name != other.name]
        if not trained:
            continue
        train = load_recipe(row.name).train
        best = max(trained, key=lambda other: next(iter(other.scores.values())))
        cells = (f"`{row.name}`", str(len(trained)), f"{best.score} ({best.model})", row.cost, _size(row.crop),
                 f"{train.learning_rate:g}", _schedule(train), _sizes(train.augment))  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _own(recipe: Recipe, scores: dict[str, float]) -> Row:
    return Row(
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


def _published(entry: ZooEntry, recipe: Recipe) -> Row:
    own = _own(recipe, entry.scores)
    return dataclasses.replace(
        own,
        recipe=entry.recipe or entry.name,
        data=entry.data,
        task=entry.task,
        model=entry.backbone,
        parameters=entry.parameters,
    )


def _columns(row: Row) -> tuple[str, ...]:
    return row.name, row.model.removeprefix("SeMask "), row.score, row.cost  # the recipe's line says SeMask


def _schedule(train: TrainConfig) -> str:
    warmup = f", {train.warmup_steps} steps of warm-up" if train.warmup_factor < 1 else ""
    if train.schedule == "poly":
        return f"poly {train.poly_power:g}{warmup}"
    return f"a tenth after {' and '.join(f'{drop:.1%}' for drop in train.milestones)}{warmup}"


def _sizes(augment: AugmentConfig) -> str:
    if augment.short_sides:
        return f"short side {augment.short_sides[0]} to {augment.short_sides[-1]}"
    low, high = augment.scale_range or (1.0, 1.0)
    return f"{low:g} to {high:g} times the {'crop' if augment.resize == 'large_scale_jitter' else 'picture'}"


def _size(crop: tuple[int, int]) -> str:
    return f"{crop[0]}x{crop[1]}"
