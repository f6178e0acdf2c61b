"""Report of a run: one HTML file that opens offline, made from the template `report.html`."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import PIL.Image

from maskwright.structures.annotations import Category
from maskwright.training.curves import is_share, run_figure, save_png
from maskwright.training.log_files import LOG_NAME, LogRow
from maskwright.training.read_logs import read_merged_rows

MAX_IMAGE_SIDE = 1024  # pixels; larger images are downscaled


def curves(log_file: Path, output: Path) -> None:
    """Plot a run's log as a PNG: loss and its terms, learning rate, gradient norm and metrics over the steps.

    If a resumed run logged a step twice, the later row counts. A last line that is still being written is skipped.

    Args:
        log_file: `log.jsonl` of a run; it may be empty.
        output: the PNG.
    """
    save_png(run_figure(read_merged_rows(log_file)), output)


def report(
    run: Path,
    output: Path,
    *,
    recipe_yaml: str,
    evaluation: Mapping[str, Any],
    images: Sequence[tuple[Any, ...]],
    categories: Sequence[Category],
    facts: Mapping[str, Any],
) -> None:
    """Write the report of a run as one HTML file without external resources, also for phones and dark mode.

    Args:
        run: the run's folder, which gives the title; its `log.jsonl`, if it exists, gives the curves.
        output: the HTML file.
        recipe_yaml: the resolved recipe.
        evaluation: metrics, the first one shown largest. Floats in 0..1 are shown in percent, None as no data; a
            mapping of mappings, such as "per_class", becomes a table. May be empty.
        images: (title, prediction, ground truth) or (title, prediction, ground truth, image), PIL images; then the
            semantic maps of a backbone's stages, fine to coarse, shown in a row of their own.
        categories: their colors are shown beside the class names.
        facts: about the run: device, versions, duration, git revision.
    """
    tables = {name: rows for name, rows in evaluation.items() if _is_table(rows)}
    colors = {category.name: category.color for category in categories}
    rows = read_merged_rows(run / LOG_NAME)
    template = resources.files("maskwright.training").joinpath("report.html").read_text(encoding="utf-8")
    page = Template(template).substitute(
        title=escape(run.resolve().name),
        headlines="".join(_headline(name, value) for name, value in evaluation.items() if name not in tables),
        curves=_section("Curves", _chart(rows) if rows else ""),
        tables="".join(_section(f"{_title(name)} (%)", _table(rows, colors)) for name, rows in tables.items()),
        images=_section("Images", "".join(_image_row(*row) for row in images)),
        facts=_section("Run", _facts(facts)),
        recipe=_section("Recipe", f"<pre>{escape(recipe_yaml)}</pre>" if recipe_yaml else ""),
    )
    output.write_text(page, encoding="utf-8")


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(row, Mapping) for row in value.values())


def _metric_text(value: Any) -> str:
    """Format a metric for people."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if is_share(value):
        return f"{100 * value:.1f}"
    return f"{value:.4g}" if isinstance(value, float) else escape(str(value))


def _title(key: str) -> str:
    return escape(key.replace("_", " ").capitalize())


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def _headline(name: str, value: Any) -> str:
    unit = "<small>%</small>" if is_share(value) else ""
    return f'<div class="headline"><b>{_metric_text(value)}{unit}</b><span>{escape(name)}</span></div>'


def _table(rows: Mapping[str, Mapping[str, Any]], colors: Mapping[str, tuple[int, int, int]]) -> str:
    """Build a table with one row per class; cells with a value in 0..1 have a bar."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join(
        f'<tr><th scope="row">{_swatch(colors.get(name))}{escape(str(name))}</th>'
        + "".join(_cell(row.get(column)) for column in columns)
        + "</tr>"
        for name, row in rows.items()
    )
    head = f'<thead><tr><th scope="col">class</th>{head}</tr></thead>'
    return f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>'


def _swatch(color: tuple[int, int, int] | None) -> str:
    return "" if color is None else '<i class="swatch" style="background:rgb({},{},{})"></i>'.format(*color)


def _cell(value: Any) -> str:
    if not is_share(value):
        return f"<td>{_metric_text(value)}</td>"
    return f'<td class="bar" style="--share:{100 * value:.1f}%">{_metric_text(value)}</td>'


def _image_row(title: str, *images: PIL.Image.Image) -> str:
    """Show prediction, ground truth and image of one example with captions, and any semantic maps below them."""
    stages = [f"semantic map of stage {number}" for number, _ in enumerate(images[3:], 1)]
    first = zip(("prediction", "ground truth", "image"), images, strict=False)
    rows = (first, zip(stages, images[3:], strict=True))
    figures = ("".join(_figure(title, caption, image) for caption, image in row) for row in rows)
    return f"<h3>{escape(title)}</h3>" + "".join(f'<div class="images">{row}</div>' for row in figures if row)


def _figure(title: str, caption: str, image: PIL.Image.Image) -> str:
    element = f'<img alt="{caption} of {escape(title)}" src="{_jpeg_data(image)}">'
    return f"<figure>{element}<figcaption>{caption}</figcaption></figure>"


def _facts(facts: Mapping[str, Any]) -> str:
    items = "".join(f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items())
    return f"<dl>{items}</dl>" if items else ""


def _chart(rows: list[LogRow]) -> str:
    buffer = io.BytesIO()
    save_png(run_figure(rows), buffer, dots_per_inch=130)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<div class="wide"><img class="chart" alt="training curves" src="data:image/png;base64,{data}"></div>'


def _jpeg_data(image: PIL.Image.Image) -> str:
    buffer, small = io.BytesIO(), image.convert("RGB")
    small.thumbnail((MAX_IMAGE_SIDE, MAX_IMAGE_SIDE))
    small.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
