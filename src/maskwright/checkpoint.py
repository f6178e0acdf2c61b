"""Weight files: ours, and reading those of others without running anything in them.

Our format is one `.safetensors` whose header holds, as JSON, the model's configuration, its categories, how it is
evaluated, the recipe it was trained with, and where it came from. A model file is therefore all that prediction needs.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor

from maskwright import __version__
from maskwright.data.category_lists import load_categories
from maskwright.errors import CheckpointError, MaskwrightError
from maskwright.layouts import State, infer_config, listing, published_setting, recognise, translate
from maskwright.models import build_model
from maskwright.models.mask2former import Mask2Former
from maskwright.recipe import CategoryConfig, EvaluateConfig, ModelConfig, Recipe
from maskwright.structures import Category

FORMAT = "maskwright-1"


@dataclass
class Checkpoint:
    """Weights and all that is needed to use them.

    Attributes:
        config: the model.
        categories: its classes, in label order.
        evaluate: how it is run and decided on.
        state: our parameter names to tensors.
        recipe: what it was trained with, where that is known.
        provenance: origin, version, metrics: free JSON.
        dropped: (key, reason) of entries left out when a foreign file was read.
    """

    config: ModelConfig
    categories: tuple[Category, ...]
    evaluate: EvaluateConfig
    state: State
    recipe: Recipe | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    dropped: list[tuple[str, str]] = field(default_factory=list)


def load_model(source: str | Path, device: torch.device | str = "cpu") -> Mask2Former:
    """A model ready to predict, from our file or from a checkpoint of another implementation.

    Returns:
        The model in evaluation mode, with `config`, `categories`, `evaluate` and `recipe` attached.

    Raises:
        CheckpointError: the file is absent, broken, unsafe, of an unknown layout, or not a whole model.
    """
    return model_from_checkpoint(read_checkpoint(source), device)


def model_from_checkpoint(checkpoint: Checkpoint, device: torch.device | str = "cpu") -> Mask2Former:
    """The model of a checkpoint in evaluation mode; see `load_model`."""
    model = build_model(checkpoint.config, checkpoint.categories)
    _check_fit(model.state_dict(), checkpoint.state)
    model.load_state_dict(checkpoint.state)
    model.evaluate_config, model.recipe = checkpoint.evaluate, checkpoint.recipe
    return model.to(device).eval()


def read_checkpoint(source: str | Path, categories: str | None = None) -> Checkpoint:
    """Read a weight file of any known layout.

    Args:
        source: `.safetensors`, `.pkl` (detectron2), `.pth`, `.pt` or `.bin`.
        categories: class list for a foreign file (a built-in name or a YAML file); None guesses by the number of
            classes, and numbers them where that fails.

    Raises:
        CheckpointError: as `load_model`.
    """
    path = Path(source)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint file {path}")
    if path.suffix == ".safetensors":
        state, metadata = read_safetensors(path)
        if metadata.get("format") == FORMAT:
            return _own(path, state, metadata)
    else:
        state = _tensors(path, _read_pickle(path))
    layout = recognise(state)
    if layout is None:
        raise CheckpointError(f"{path}: not a checkpoint that maskwright knows; its first keys are {listing(state, 4)}")
    try:
        translation = translate(state, layout)
        config, num_classes = infer_config(translation.state)
        names, evaluate = published_setting(num_classes, config)
        classes = _categories(categories or names, num_classes)
        with torch.device("meta"):
            expected = build_model(config, classes).state_dict()
        _check_fit(expected, translation.state)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    provenance = {"layout": layout.name, "file": path.name, "maskwright": __version__}
    return Checkpoint(config, classes, evaluate, translation.state, None, provenance, translation.dropped)


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write our format, whole or not at all."""
    metadata = {
        "format": FORMAT,
        "model": checkpoint.config.model_dump_json(),
        "categories": json.dumps([[c.id, c.name, c.is_thing, list(c.color)] for c in checkpoint.categories]),
        "evaluate": checkpoint.evaluate.model_dump_json(),
        "recipe": checkpoint.recipe.model_dump_json() if checkpoint.recipe else "",
        "provenance": json.dumps(checkpoint.provenance),
    }
    state = {key: tensor.detach().contiguous().cpu() for key, tensor in checkpoint.state.items()}
    write_whole(path, lambda temporary: safetensors.torch.save_file(state, temporary, metadata))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place in one step; an error leaves nothing.

    Raises:
        MaskwrightError: the disk is full, or the folder cannot be written to.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise MaskwrightError(f"{path}: cannot be written: {reason}; free space or choose another folder") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def read_safetensors(path: Path) -> tuple[State, dict[str, str]]:
    """Tensors and header of a safetensors file.

    Raises:
        CheckpointError: the file is cut off or its header is wrong.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file: {error}") from None


def _own(path: Path, state: State, metadata: dict[str, str]) -> Checkpoint:
    try:
        categories = tuple(
            Category(number, name, thing, tuple(color))
            for number, name, thing, color in json.loads(metadata["categories"])
        )
        return Checkpoint(
            ModelConfig.model_validate_json(metadata["model"]),
            categories,
            EvaluateConfig.model_validate_json(metadata["evaluate"]),
            state,
            Recipe.model_validate_json(metadata["recipe"]) if metadata["recipe"] else None,
            json.loads(metadata["provenance"]),
        )
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path}: the header of this maskwright file is damaged: {' '.join(str(error).split())}"
        ) from None


def _categories(source: str | None, num_classes: int) -> tuple[Category, ...]:
    numbered = [CategoryConfig(id=number, name=f"class {number}") for number in range(num_classes)]
    categories = load_categories(numbered if source is None else source)
    if len(categories) != num_classes:
        raise CheckpointError(
            f"the weights have {num_classes} classes, the class list '{source}' has {len(categories)}"
        )
    return categories


def _check_fit(expected: State, found: State) -> None:
    problems = []
    if missing := expected.keys() - found.keys():
        problems.append(f"{len(missing)} missing: {listing(missing)}")
    if extra := found.keys() - expected.keys():
        problems.append(f"{len(extra)} left over: {listing(extra)}")
    wrong = [
        f"{key} {tuple(found[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in expected.keys() & found.keys()
        if found[key].shape != expected[key].shape
    ]
    if wrong:
        problems.append(f"{len(wrong)} of another shape: {listing(wrong)}")
    if problems:
        raise CheckpointError("the weights do not fit the model; " + "; ".join(problems))


_ALLOWED = {
    ("collections", "OrderedDict"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.numeric", "_frombuffer"),
    ("_codecs", "encode"),
}


class _ArrayUnpickler(pickle.Unpickler):
    """Arrays, numbers, text and containers; any other name is refused before it is even imported."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise CheckpointError(f"it calls {module}.{name}, which weights never need; nothing of it was run")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _read_pickle(path: Path) -> Any:
    """The content of a pickle: plain with arrays (detectron2 `.pkl`), or PyTorch's zip with tensors."""
    try:
        if path.suffix == ".pkl":
            return _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
        return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: refused: {error}") from None
    except pickle.UnpicklingError as error:
        reason = str(error).split("GLOBAL ")[-1].split(" was not an allowed")[0] if "GLOBAL" in str(error) else None
        message = f"refused: it calls {reason}, which weights never need" if reason else "not a weight file"
        raise CheckpointError(f"{path}: {message}; nothing of it was run") from None
    except Exception as error:  # a broken pickle can raise nearly anything
        raise CheckpointError(
            f"{path}: broken or not a weight file ({type(error).__name__}: {str(error)[:120]})"
        ) from None


def _tensors(path: Path, content: Any) -> State:
    """The state dict inside a file, out of the wrappers that training programs put around it."""
    for _ in range(3):
        if not isinstance(content, dict):
            break
        inner = next((content[key] for key in ("model", "state_dict") if isinstance(content.get(key), dict)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path}: holds {type(content).__name__}, not a dictionary of weights")
    state = {}
    for key, value in content.items():
        if isinstance(value, np.ndarray | np.generic):
            value = torch.from_numpy(np.array(value))
        if isinstance(value, Tensor):
            state[str(key).removeprefix("module.")] = value
    if not state:
        raise CheckpointError(f"{path}: holds no weights; its keys are {listing(map(str, content), 6)}")
    return state


def load_backbone_weights(model: Mask2Former, config: ModelConfig) -> None:
    """Fill the backbone of a model: pretrained by timm, or from a file with timm's names; null keeps what it has.

    Raises:
        CheckpointError: the weights cannot be had, or do not fit the backbone.
    """
    if config.backbone_weights is None:
        return
    if config.backbone_weights == "timm":
        try:
            weights = timm.create_model(config.backbone, pretrained=True).state_dict()
        except Exception as error:  # the hub's client raises many kinds
            raise CheckpointError(
                f"model.backbone_weights=timm: the weights of '{config.backbone}' are neither in the cache nor to be "
                f"downloaded ({type(error).__name__}); put them in a file and set model.backbone_weights to its path"
            ) from None
    else:
        path = Path(config.backbone_weights)
        if not path.is_file():
            raise CheckpointError(f"model.backbone_weights: no file {path}")
        weights = read_safetensors(path)[0] if path.suffix == ".safetensors" else _tensors(path, _read_pickle(path))
    named = {_backbone_key(model, key): tensor for key, tensor in weights.items()}
    expected = model.backbone.state_dict()
    unused = [key for key in named if key not in expected and not re.search(_NOT_BACKBONE, key)]
    missing = [key for key in expected if key not in named and not re.search(_OUR_OWN, key)]
    if missing or unused:
        raise CheckpointError(
            f"model.backbone_weights={config.backbone_weights} does not fit '{config.backbone}'; "
            f"missing: {listing(missing) or 'nothing'}; left over: {listing(unused) or 'nothing'}"
        )
    model.backbone.load_state_dict({key: named[key] for key in expected if key in named}, strict=False)


_NOT_BACKBONE = r"(^|\.)(head|fc|norm|attn_mask|relative_position_index)(\.|$)"  # of the classifier, or derived
_OUR_OWN = r"^norms\.|num_batches_tracked$"


def _backbone_key(model: Mask2Former, key: str) -> str:
    """A timm key inside our backbone."""
    return f"network.{key}" if hasattr(model.backbone, "network") else re.sub(r"^layers\.", "stages.", key)


def checkpoint_of(model: Mask2Former, recipe: Recipe, provenance: dict[str, Any]) -> Checkpoint:
    """The checkpoint of a model that was trained with a recipe."""
    return Checkpoint(model.config, model.categories, recipe.evaluate, model.state_dict(), recipe, provenance)
