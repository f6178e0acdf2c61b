"""The report of a run: one HTML file that opens offline. Its page is `report.html` beside this file, filled in here."""

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
from maskwright.training.read_logs import read_rows

REPORT_SIDE = 1024  # pixels; the report's pictures are scaled down to it


def curves(log_file: Path, output: Path) -> None:
    """Draw a run's log: loss and its terms, learning rate, gradient norm and metrics over the steps, as a PNG.

    Raw values are pale, their moving average over a thirtieth of the run is strong. A run that was resumed may have
    logged a step twice: the later row counts. A last line that is still being written is left out.

    Args:
        log_file: `log.jsonl` of a run; it may hold no row yet.
        output: the PNG.
    """
    save_png(run_figure(read_rows(log_file)), output)


def report(
    run: Path,
    output: Path,
    *,
    recipe_yaml: str,
    evaluation: Mapping[str, Any],
    pictures: Sequence[tuple[Any, ...]],
    categories: Sequence[Category],
    facts: Mapping[str, Any],
) -> None:
    """Write one HTML file about a run that opens offline, on a phone and in the dark.

    Args:
        run: folder of the run, named in the title; its `log.jsonl` becomes the curves, where there is one.
        output: the HTML file.
        recipe_yaml: the resolved recipe.
        evaluation: metrics. Floats in 0..1 are shown in percent, None as no data, the first one largest; a mapping of
            mappings, such as "per_class", becomes a table. Empty: no metrics.
        pictures: (title, prediction, truth) or (title, prediction, truth, plain image), pictures of PIL; after those,
            the semantic maps of a backbone's stages, fine to coarse, in a row of their own.
        categories: for the colours beside the class names.
        facts: what else should be known of the run: device, versions, duration, git revision.
    """
    tables = {name: rows for name, rows in evaluation.items() if _is_table(rows)}
    colors = {category.name: category.color for category in categories}
    rows = read_rows(run / "log.jsonl")
    page = Template(
        resources.files("maskwright.training").joinpath("report.html").read_text(encoding="utf-8")
    ).substitute(
        title=escape(run.resolve().name),
        headlines="".join(_headline(name, value) for name, value in evaluation.items() if name not in tables),
        curves=_section("Curves", _chart(rows) if rows else ""),
        tables="".join(_section(f"{_title(name)} (%)", _table(rows, colors)) for name, rows in tables.items()),
        pictures=_section("Pictures", "".join(_picture_row(*row) for row in pictures)),
        facts=_section("Run", _facts(facts)),
        recipe=_section("Recipe", f"<pre>{escape(recipe_yaml)}</pre>" if recipe_yaml else ""),
    )
    output.write_text(page, encoding="utf-8")


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(row, Mapping) for row in value.values())


def _figure_text(value: Any) -> str:
    """A metric as people read it."""
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
    return f'<div class="headline"><b>{_figure_text(value)}{unit}</b><span>{escape(name)}</span></div>'


def _table(rows: Mapping[str, Mapping[str, Any]], colors: Mapping[str, tuple[int, int, int]]) -> str:
    """A table with one row per class; cells with a share carry a bar."""
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
        return f"<td>{_figure_text(value)}</td>"
    return f'<td class="bar" style="--share:{100 * value:.1f}%">{_figure_text(value)}</td>'


def _picture_row(title: str, *pictures: PIL.Image.Image) -> str:
    """One image of the data set: each of its pictures with a caption."""
    stages = [f"semantic map of stage {number}" for number, _ in enumerate(pictures[3:], 1)]
    rows = (zip(("prediction", "truth", "image"), pictures, strict=False), zip(stages, pictures[3:], strict=True))
    figures = ("".join(_figure(title, caption, picture) for caption, picture in row) for row in rows)
    return f"<h3>{escape(title)}</h3>" + "".join(f'<div class="pictures">{row}</div>' for row in figures if row)


def _figure(title: str, caption: str, picture: PIL.Image.Image) -> str:
    image = f'<img alt="{caption} of {escape(title)}" src="{_picture_data(picture)}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _facts(facts: Mapping[str, Any]) -> str:
    items = "".join(f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items())
    return f"<dl>{items}</dl>" if items else ""


def _chart(rows: list[dict[str, Any]]) -> str:
    buffer = io.BytesIO()
    save_png(run_figure(rows), buffer, dots_per_inch=130)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<div class="wide"><img class="chart" alt="training curves" src="data:image/png;base64,{data}"></div>'


def _picture_data(picture: PIL.Image.Image) -> str:
    buffer, small = io.BytesIO(), picture.convert("RGB")
    small.thumbnail((REPORT_SIDE, REPORT_SIDE))
    small.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
