"""The HTML report of a check: problems, statistics, and a contact sheet of images with their annotations.

One file that works offline, in dark mode, on a phone, with the keyboard, and without JavaScript.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from maskwright.data.check.previews import Preview
from maskwright.data.check.report import ProblemGroup, Report, TaskStatistics, class_table, split_table
from maskwright.data.problems import MAX_PER_KIND, Problem
from maskwright.runtime.atomic_write import write_file_atomically
from maskwright.structures.annotations import Category

SHOWN_PER_KIND, SHOWN_ITEMS, SHOWN_ON_TILE = 300, 20, 5


def write_html(report: Report, output: Path) -> None:
    """Write the report; raises MaskwrightError if the file cannot be written."""
    write_file_atomically(output, lambda file: file.write_text(render_html(report), encoding="utf-8"))


def render_html(report: Report) -> str:
    """Return the HTML file."""
    template = resources.files("maskwright.data.check").joinpath("html_report.html").read_text(encoding="utf-8")
    has_splits = bool(report.splits)
    recipe_lines = f'<pre tabindex="0">{escape(report.recipe_lines())}</pre>'
    return Template(template).substitute(
        title=escape(report.source),
        headlines=_headlines(report),
        problems=_problems(report.problem_groups),
        splits=_section("Splits", _notes(report) + _table(*split_table(report)) + _explanation(report))
        if has_splits
        else "",
        classes="".join(map(_classes, report.tasks)) if has_splits else "",
        pixels=_section("Pixel statistics, for a recipe", recipe_lines) if report.recipe_lines() else "",
        sheet=_contact_sheet(report) if report.previews else "",
    )


def _notes(report: Report) -> str:
    return f"<p>{'<br>'.join(map(escape, report.layout_lines().splitlines()))}</p>"


def _explanation(report: Report) -> str:
    void = "Background is" if report.tasks[0].task == "instance" else "Void, which training ignores, is"
    return (
        '<p class="quiet">S, M and L are objects below 32×32 pixels, up to 96×96, and larger. Empty images have no '
        f"object. {void} the share of pixels without an object.</p>"
    )


def _headlines(report: Report) -> str:
    values = [
        ("error" if report.errors else "fine", report.errors, "errors"),
        ("warning" if report.warnings else "fine", report.warnings, "warnings"),
        ("", report.images, "images read"),
        ("", len(report.categories), "classes"),
        ("", ", ".join(task.task for task in report.tasks) or "–", "tasks" if len(report.tasks) > 1 else "task"),
        ("", report.format or "–", "format"),
    ]
    return "".join(
        f'<div class="headline {tone}"><b>{escape(str(value))}</b><span>{name}</span></div>'
        for tone, value, name in values
    )


def _section(title: str, body: str, anchor: str = "") -> str:
    attribute = f' id="{anchor}"' if anchor else ""
    return f"<section{attribute}><h2>{title}</h2>{body}</section>"


def _problems(groups: Sequence[ProblemGroup]) -> str:
    if not groups:
        return _section("Problems", "<p>None.</p>")
    tools = (
        '<div class="tools"><label>search <input type="search" aria-label="search in problems"></label>'
        '<label><input type="checkbox" value="error" checked> errors</label>'
        '<label><input type="checkbox" value="warning" checked> warnings</label>'
        '<button type="button">open all</button><output aria-live="polite"></output></div>'
    )
    return _section("Problems", tools + "".join(map(_problem_group, groups)), "problems")


def _problem_group(group: ProblemGroup) -> str:
    first, tone = group.problems[0], group.severity
    cases = "".join(f"<li>{_case(problem)}</li>" for problem in group.problems[:SHOWN_PER_KIND])
    hidden = group.count - min(len(group.problems), SHOWN_PER_KIND)
    if hidden:
        cases += (
            f'<li class="quiet">and {hidden} more; maskwright check --json lists up to {MAX_PER_KIND} of each kind</li>'
        )
    remedy = f'<p class="remedy">What to do: {escape(first.remedy)}</p>' if first.remedy else ""
    return (
        f'<details class="{tone}" data-severity="{tone}"><summary><span class="badge">{tone}</span>'
        f'<span class="count">{group.count}×</span><span>{escape(str(first))}</span></summary>'
        f'{remedy}<div class="cases" tabindex="0" role="region" aria-label="cases"><ul>{cases}</ul></div></details>'
    )


def _case(problem: Problem) -> str:
    items = [item for item in problem.items if item not in problem.found]
    more = f" and {len(items) - SHOWN_ITEMS} more" if len(items) > SHOWN_ITEMS else ""
    listed = f' <span class="items">({escape(", ".join(items[:SHOWN_ITEMS]))}{more})</span>' if items else ""
    return escape(str(problem)) + listed


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    body = "".join(f"<tr>{_cells(row)}</tr>" for row in rows)
    return f'<div class="wide" tabindex="0"><table>{_table_head(header)}<tbody>{body}</tbody></table></div>'


def _table_head(header: Iterable[str]) -> str:
    cells = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    return f"<thead><tr>{cells}</tr></thead>"


def _cells(row: Iterable[str]) -> str:
    first, *others = row
    return f'<th scope="row">{escape(first)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in others)


def _classes(task: TaskStatistics) -> str:
    header, rows = class_table(task)
    body = ""
    for label, (category, row) in enumerate(zip(task.categories, rows, strict=True)):
        absent = not any(split.classes[label].images for split in task.splits.values())
        name = f"{_swatch(category)}{escape(category.name)}"
        others = "".join(f"<td>{escape(cell)}</td>" for cell in row[2:])
        body += f'<tr{" class=absent" if absent else ""}><th scope="row">{row[0]}</th><td>{name}</td>{others}</tr>'
    table = f"<table>{_table_head(header)}<tbody>{body}</tbody></table>"
    return _section(f"Classes, {task.task}", f'<div class="wide named" tabindex="0">{table}</div>')


def _swatch(category: Category) -> str:
    return '<i class="swatch" style="background:rgb({},{},{})"></i>'.format(*category.color)


def _contact_sheet(report: Report) -> str:
    common = len(os.path.commonpath([os.path.dirname(preview.path) for preview in report.previews])) + 1
    tiles = "".join(
        _tile(preview, preview.path[common:], report.problems_by_image.get(preview.path, []))
        for preview in report.previews
    )
    shown = (preview.split for preview in report.previews)
    splits = "".join(f"<option>{escape(name)}</option>" for name in dict.fromkeys([*report.splits, *shown]))
    labels = {label for preview in report.previews for label in preview.labels}
    classes = "".join(
        f'<option value="{label}">{escape(report.categories[label].name)}</option>' for label in sorted(labels)
    )
    tools = (
        f'<div class="tools"><label>split <select><option value="">all</option>{splits}</select></label>'
        f'<label>class <select><option value="">all</option>{classes}</select></label>'
        '<label><input type="checkbox"> only with problems</label><output aria-live="polite"></output></div>'
    )
    return _section("Contact sheet", f'{tools}<div class="sheet">{tiles}</div>', "sheet")


def _tile(preview: Preview, name: str, problems: Sequence[Problem]) -> str:
    tone = min((problem.severity for problem in problems), default="")
    texts = " ".join(f"{problem.severity}: {problem.found}." for problem in problems[:SHOWN_ON_TILE])
    name = escape(name)
    if preview.jpeg is None:
        image = '<span class="none">cannot be read</span>'
    else:
        data = base64.b64encode(preview.jpeg).decode()
        image = f'<img loading="lazy" alt="annotated image {name}" src="data:image/jpeg;base64,{data}">'
    labels = " ".join(map(str, preview.labels))
    return (
        f'<button type="button" class="tile {tone}" data-split="{escape(preview.split)}" data-labels="{labels}" '
        f'data-problems="{escape(texts)}">{image}<span class="name">{name}</span></button>'
    )
