"""The published models by name (`zoo.yaml`): how each is built, what it scored, whose it is, and where its file lies.

Nothing is downloaded here: the files are large, and many of them must not be used commercially. A name stands for a
file in the cache folder; where that is absent, the error says what to download from where.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import os
import shlex
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from maskwright.config.recipe import Recipe, load_recipe, zoo_values
from maskwright.errors import CheckpointError

if TYPE_CHECKING:
    from maskwright.checkpoints.checkpoint import Checkpoint
    from maskwright.structures.annotations import Category

_COLUMNS = ("name", "data", "task", "backbone", "score", "weights")
_BLOCK = 1 << 20


class Source(BaseModel):
    """Who published models, and on what terms."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    tables: str = Field(description="file of the repository that holds the published numbers")
    code_licence: str
    weights_licence: str


class ZooEntry(BaseModel):
    """One published model; the fields are those of `zoo.yaml`, `source` with its key replaced by what it stands for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    source: Source
    data: str
    task: Literal["semantic", "instance", "panoptic"]
    backbone: str
    parameters: int | None = Field(None, description="millions, as our model has them; null where `needs` is set")
    recipe: str | None = Field(None, description="a recipe of the package; null where `needs` is set")
    overrides: tuple[str, ...] = ()
    categories: str | None = Field(None, description="a built-in class list; the task 'instance' has its things only")
    needs: str | None = Field(None, description="what this version lacks to build the model")
    table: str = Field(description="heading, in `source.tables`, of the table with the scores")
    scores: dict[str, float] = Field(description="percent, as published; the task's own score is the first")
    config: str = Field(description="the configuration, in the publisher's repository")
    file: str | None = Field(None, description="the upstream file's name, where it is known")
    address: str
    md5: str | None = Field(None, description="first digits of the file's md5")
    sha256: str | None = Field(None, description="first digits of the file's sha256")
    note: str | None = None


@cache
def published_models() -> dict[str, ZooEntry]:
    """All entries by name, in the order of the file."""
    values = zoo_values()
    sources = {key: Source.model_validate(source) for key, source in values["sources"].items()}
    entries = [ZooEntry.model_validate(entry | {"source": sources[entry["source"]]}) for entry in values["models"]]
    return {entry.name: entry for entry in entries}


def get_entry(name: str) -> ZooEntry:
    """The entry of that name.

    Raises:
        CheckpointError: there is none; the message names the nearest.
    """
    models = published_models()
    if name not in models:
        near = difflib.get_close_matches(name, models, 3, 0.4)
        hint = f"nearest published models: {', '.join(near)}; all: maskwright zoo" if near else "see maskwright zoo"
        raise CheckpointError(f"'{name}' is neither a file nor a published model; {hint}")
    return models[name]


def published(source: str | Path) -> ZooEntry | None:
    """The entry that `source` names; None for a file, a folder, or what looks like a path or Hub id.

    Raises:
        CheckpointError: it can only be meant as a name, and there is none like it.
    """
    path = Path(source)
    if path.exists() or path.suffix or len(path.parts) != 1:
        return None
    return get_entry(str(source))


def recipe_of(entry: ZooEntry) -> Recipe:
    """How the model is built, trained and evaluated, in our terms; `maskwright train NAME` takes the same.

    Raises:
        RecipeError: this version cannot build the model.
    """
    return load_recipe(entry.name)


def categories_of(entry: ZooEntry) -> tuple[Category, ...]:
    """The model's classes, in label order."""
    from maskwright.config.categories import load_categories  # here, as it imports torch, and listing needs none

    categories = load_categories(entry.categories)
    return tuple(category for category in categories if category.is_thing or entry.task != "instance")


def settle(checkpoint: Checkpoint, entry: ZooEntry, categories: tuple[Category, ...]) -> Checkpoint:
    """The checkpoint of an entry's file with these classes, and the entry's evaluation and terms, instead of guesses.

    Raises:
        CheckpointError: the weights have another number of classes.
    """
    if len(categories) != len(checkpoint.categories):
        raise CheckpointError(
            f"{_place(entry)}: has {len(checkpoint.categories)} classes, {entry.name} has "
            f"{len(categories)}: another file; download it again from {entry.address}"
        )
    origin = {"model": entry.name, "address": entry.address, "weights_licence": entry.source.weights_licence}
    return dataclasses.replace(
        checkpoint,
        categories=categories,
        evaluate=recipe_of(entry).evaluate,
        provenance=checkpoint.provenance | origin,
    )


def cache_folder() -> Path:
    """Where downloaded weights are kept: $MASKWRIGHT_CACHE, else maskwright in the user's cache folder."""
    if chosen := os.environ.get("MASKWRIGHT_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "maskwright"


def find_in_cache(name: str) -> Path:
    """The weight file of a published model, with its digest checked where one is published.

    Raises:
        CheckpointError: there is no such model, this version cannot build it, its file is not in the cache (the message
            says what to download from where), or the file there is not the published one.
    """
    entry = get_entry(name)
    _recipe_name(entry)  # refuses what cannot be built, before anybody downloads it
    path = _cached(entry)
    if path is None:
        raise CheckpointError(
            f"{name}: no {_place(entry)}; download {entry.address} to there (licence of the weights: "
            f"{entry.source.weights_licence})"
        )
    for kind, expected in (("md5", entry.md5), ("sha256", entry.sha256)):
        if expected and not (found := _digest(path, kind)).startswith(expected):
            raise CheckpointError(
                f"{path}: its {kind} starts with {found[: len(expected)]}, that of {name} with {expected}: cut off or "
                f"another file; download it again from {entry.address}"
            )
    return path


def list_models(entries: Iterable[ZooEntry]) -> str:
    """A table of entries for the terminal, one line each below a line of headings."""
    rows = [_COLUMNS, *map(_row, entries)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines = ("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def describe(entry: ZooEntry) -> str:
    """All about one entry, several lines."""
    facts = {
        "from": f"{entry.source.title}, {entry.config}",
        "model": f"{entry.backbone}, {entry.data}, {entry.task}",
        "published": f"{_scores(entry)} ({entry.source.tables}: {entry.table})",
        "licence": f"code {entry.source.code_licence}; weights {entry.source.weights_licence}",
        "recipe": shlex.join([entry.recipe, *entry.overrides]) if entry.recipe else "",
        "parameters": f"{entry.parameters} millions" if entry.parameters else "",
        "train": f"maskwright train {entry.name} data.root=FOLDER" if entry.recipe else "",
        "needs": f"'{entry.needs}', which this version of maskwright does not have yet" if entry.needs else "",
        "note": entry.note or "",
        "download": entry.address,
        "digest": f"md5 {entry.md5}..." if entry.md5 else f"sha256 {entry.sha256}..." if entry.sha256 else "",
        "put it at": _place(entry) + (" (is there)" if _cached(entry) else ""),
        "use": "" if entry.needs else f"maskwright predict {entry.name} IMAGE",
    }
    return "\n".join([entry.name, *(f"  {title:10} {text}" for title, text in facts.items() if text)])


def markdown() -> str:
    """`docs/zoo.md`: all entries, one table per publisher."""
    models = published_models().values()
    parts = [
        "<!-- Written by `maskwright zoo --markdown > docs/zoo.md`; change src/maskwright/zoo.yaml instead. -->",
        "# Published models",
        f"{len(models)} models by name. `maskwright zoo NAME` says where a file belongs; once it lies there, the name "
        "stands for it: `maskwright predict NAME IMAGE`, `load_model(NAME)`; `maskwright train NAME` trains it anew "
        "([recipes.md](recipes.md)). Scores are percentages as published. "
        "Mind the licence of the weights, which is not that of maskwright.",
    ]
    for source in dict.fromkeys(entry.source for entry in models):
        parts += [f"## {source.title}", f"Code {source.code_licence}; weights {source.weights_licence}."]
        rows = [_markdown_row(entry) for entry in models if entry.source == source]
        head = [
            "| name | data | task | backbone | parameters | published | recipe | file |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        parts.append("\n".join(head + rows))
    return "\n\n".join(parts)


def _recipe_name(entry: ZooEntry) -> str:
    if entry.recipe is None:
        raise CheckpointError(f"{entry.name} needs '{entry.needs}', which this version of maskwright does not have yet")
    return entry.recipe


def _row(entry: ZooEntry) -> tuple[str, ...]:
    score, value = next(iter(entry.scores.items()))
    needs = f" (needs {entry.needs})" if entry.needs else ""
    licence = entry.source.weights_licence + needs
    return entry.name, entry.data, entry.task, entry.backbone, f"{score} {value}", licence


def _markdown_row(entry: ZooEntry) -> str:
    recipe = entry.recipe or f"needs {entry.needs}"
    file = f"[{entry.file or 'file'}]({entry.address})"
    size = f"{entry.parameters} M" if entry.parameters else ""
    cells = (f"`{entry.name}`", entry.data, entry.task, entry.backbone, size, _scores(entry), recipe, file)
    return f"| {' | '.join(cells)} |"


def _scores(entry: ZooEntry) -> str:
    return ", ".join(f"{name} {value}" for name, value in entry.scores.items())


def _place(entry: ZooEntry) -> str:
    """Where the file belongs; files whose own name is not published are named after the model."""
    return str(cache_folder() / (entry.file or f"{entry.name}.pth"))


def _cached(entry: ZooEntry) -> Path | None:
    path = Path(_place(entry))
    return path if path.is_file() else None


def _digest(path: Path, kind: str) -> str:
    """Hexadecimal digest of a file, read in blocks."""
    digest = hashlib.new(kind, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
