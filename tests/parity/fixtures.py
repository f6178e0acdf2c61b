"""Finding fixtures and filling their weights, each in its own checkpoint layout."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType

import numpy as np
import safetensors.torch
import torch

from maskwright.checkpoints.convert import convert
from maskwright.checkpoints.load import load_model
from maskwright.models.segmenter import Segmenter

BUNDLED = Path(__file__).parent / "data"
OURS = "ours.safetensors"
SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "parity"


@dataclass(frozen=True)
class Fixture:
    """One `<name>.json` with its `<name>.npz`."""

    path: Path

    @property
    def name(self) -> str:
        return f"{self.path.parent.name}/{self.path.stem}"

    @cached_property
    def facts(self) -> dict:
        return json.loads(self.path.read_text(encoding="utf-8"))

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        with np.load(self.path.with_suffix(".npz")) as file:
            return {key: file[key] for key in file.files}

    def holds(self, name: str) -> bool:
        """Whether an array is there. Only the small copies that come with the tests may lack one, and they say so.

        Raises:
            KeyError: the array is absent and not listed under "left_out".
        """
        if name not in self.arrays and name not in self.facts.get("left_out", ()):
            raise KeyError(
                f"{self.path.with_suffix('.npz').name} has no array '{name}', nor does its json leave it out"
            )
        return name in self.arrays

    @property
    def layout(self) -> str:
        """Name of the checkpoint layout."""
        return self.facts.get("format", self.path.parent.name)

    @property
    def kind(self) -> str:
        """What the fixture holds: "criterion", "image" or "batch" of the original, "logits" of another layout, what
        "semask" has, else "unsupported: why".
        """
        if "cases" in self.facts:
            return "criterion"
        if self.layout in ("transformers", "openmmlab", "easycv"):
            return "logits"
        if self.layout == "semask":
            return "semask"
        if self.layout != "detectron2":
            return f"unsupported: layout {self.layout}"
        if "frames" in self.arrays:
            return "unsupported: video"
        return "batch" if "image_0" in self.arrays else "image"

    @property
    def class_list(self) -> str:
        """The built-in class list of the published model, which its weights do not name."""
        lists = ("ade20k", "cityscapes", "coco_instance")
        return next((name for name in lists if name in self.path.stem), "coco_panoptic")

    def state(self) -> dict[str, torch.Tensor]:
        """The weights in the foreign layout, by the rule of the fixture's folder; the structural entries as zeros."""
        rule = _rule(self.path)
        skipped = {key for key in self.facts["keys"] if rule.is_skipped(key)}
        assert skipped == set(self.facts.get("skipped_keys", skipped))
        shapes = {key: tuple(shape) for key, shape in self.facts["keys"].items() if key not in skipped}
        arguments = self.facts["fill"] if "fill" in self.facts else {"salt": self.facts["salt"]}
        state = {key: torch.from_numpy(value) for key, value in rule.fill(shapes, **arguments).items()}
        for key in skipped:
            integer = key in self.facts.get("integer_keys", ())
            state[key] = torch.zeros(self.facts["keys"][key], dtype=torch.int64 if integer else torch.float32)
        return state

    def model(self, folder: Path) -> Segmenter:
        """The model, through a foreign file and the public converter, which leaves it as `OURS` in the folder."""
        source, destination = folder / "foreign.safetensors", folder / OURS
        safetensors.torch.save_file(self.state(), source)
        convert(source, destination, categories=self.class_list)
        source.unlink()
        return load_model(destination)


def find(folders: list[Path]) -> Iterator[Fixture]:
    """Every fixture below the folders, once each, in the order of their paths."""
    seen: set[Path] = set()
    for folder in folders:
        for path in sorted(folder.resolve().rglob("*.json")):
            if path.with_suffix(".npz").is_file() and path not in seen:
                seen.add(path)
                yield Fixture(path)


def _rule(path: Path) -> ModuleType:
    places = (path.parent / "weights.py", path.parent.parent / "weights.py", Path(__file__).parent / "weights.py")
    return _load(next(place for place in places if place.is_file()))


@cache
def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("parity_weights", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
