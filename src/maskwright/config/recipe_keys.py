"""The table of all recipe keys, in Markdown: `maskwright recipes --keys` prints it, `docs/recipe-keys.md` holds it."""

from __future__ import annotations

import json
from typing import Any

from pydantic_core import PydanticUndefined

from maskwright.config.old_names import OLD_NAMES
from maskwright.config.schema import (
    AugmentConfig,
    CategoryConfig,
    CopyPasteConfig,
    DataConfig,
    EvaluateConfig,
    LoraConfig,
    ModelConfig,
    ResizingPhase,
    SplitConfig,
    Strict,
    TrainConfig,
)

_SECTIONS: dict[str, type[Strict]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "data.categories[]": CategoryConfig,
    "data.train, data.val, data.test": SplitConfig,
    "train": TrainConfig,
    "train.augment": AugmentConfig,
    "train.augment.copy_paste": CopyPasteConfig,
    "train.progressive_resizing[]": ResizingPhase,
    "train.lora": LoraConfig,
    "evaluate": EvaluateConfig,
}

_INTRODUCTION = """\
# Recipe keys

Every key of a [recipe](recipes.md), with its default. A key without a default is required. On the command line, a key
is written with its section: `maskwright train RECIPE train.steps=1000 evaluate.flip=true`. Old names are still read.

<!-- Written by `maskwright recipes --keys`. -->
"""


def markdown() -> str:
    """Return a table of the keys of each section: type, default, description and old name."""
    return "\n".join([_INTRODUCTION, *(_section(title, config) for title, config in _SECTIONS.items())])


def _section(title: str, config: type[Strict]) -> str:
    lines = [
        f"## `{title}`",
        "",
        "| key | type | default | description | old name |",
        "| --- | --- | --- | --- | --- |",
    ]
    old_names = {new: old for old, new in OLD_NAMES.get(config.section, {}).items()}
    schemas = config.model_json_schema()["properties"]
    for name, field in config.model_fields.items():
        old_name = f"`{old_names[name]}`" if name in old_names else ""
        lines.append(
            f"| `{name}` | {_type(schemas[name])} | {_default(field.default)} | {field.description} | {old_name} |"
        )
    return "\n".join([*lines, ""])


def _default(value: Any) -> str:
    return "" if value is PydanticUndefined else f"`{json.dumps(value)}`"


def _type(schema: dict[str, Any]) -> str:
    """Describe a JSON schema in a few words."""
    if "anyOf" in schema:
        return " or ".join(_type(option) for option in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if "$ref" in schema:
        return "section"
    match schema.get("type"):
        case "array" if "prefixItems" in schema:
            return f"[{', '.join(_type(item) for item in schema['prefixItems'])}]"
        case "array":
            return f"list of {_type(schema['items'])}"
        case "object":
            return "mapping"
    return f"{schema['type']}{_bounds(schema)}"


def _bounds(schema: dict[str, Any]) -> str:
    if "minimum" in schema and "maximum" in schema:
        return f" {schema['minimum']:g}..{schema['maximum']:g}"
    symbols = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    return "".join(f" {symbol} {schema[key]:g}" for key, symbol in symbols.items() if key in schema)
