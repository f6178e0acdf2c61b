"""The page of a check, `check.html`: problems, statistics, and a contact sheet of pictures with what is annotated.

One file that opens offline, in the dark and on a phone; everything can be reached with the keyboard, and read without
the page's script.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from maskwright.data.check.previews import Example
from maskwright.data.check.report import Report, Sort, TaskStatistics, class_table, split_table
from maskwright.data.problems import Problem
from maskwright.runtime.atomic_write import write_file_atomically
from maskwright.structures.annotations import Category

CASES_PER_KIND = 300


def write_page(report: Report, output: Path) -> None:
    """Write the page; raises MaskwrightError where it cannot be written."""
    write_file_atomically(output, lambda file: file.write_text(page(report), encoding="utf-8"))


def page(report: Report) -> str:
    """The whole HTML file."""
    template = resources.files("maskwright.data.check").joinpath("html_report.html").read_text(encoding="utf-8")
    return Template(template).substitute(
        title=escape(report.source),
        headlines=_headlines(report),
        problems=_problems(report.sorts),
        splits=_section("Splits", _table(*split_table(report)) + _explanation(report.task)) if report.splits else "",
        classes="".join(map(_classes, report.tasks)) if report.splits else "",
        channels=_section("Pixel values, for a recipe", _channels(report)) if report.recipe_lines() else "",
        sheet=_sheet(report) if report.examples else "",
    )


def _explanation(task: str) -> str:
    rest = "Background is" if task == "instance" else "Void, which is ignored in training, is"
    return (
        '<p class="quiet">S, M and L are objects below 32×32 pixels, between, and from 96×96 on. Empty images have no '
        f"object. {rest} the share of pixels without an object.</p>"
    )


def _headlines(report: Report) -> str:
    values = [
        ("error" if report.errors else "fine", report.errors, "errors"),
        ("warning" if report.warnings else "fine", report.warnings, "warnings"),
        ("", report.images, "images read"),
        ("", len(report.categories), "classes"),
        ("", ", ".join(part.task for part in report.tasks) or "–", "tasks" if report.others else "task"),
        ("", report.format or "–", "format"),
    ]
    return "".join(
        f'<div class="headline {tone}"><b>{escape(str(value))}</b><span>{name}</span></div>'
        for tone, value, name in values
    )


def _section(title: str, body: str, name: str = "") -> str:
    place = f' id="{name}"' if name else ""
    return f"<section{place}><h2>{title}</h2>{body}</section>"


def _problems(sorts: Sequence[Sort]) -> str:
    if not sorts:
        return _section("Problems", "<p>None.</p>")
    tools = (
        '<div class="tools"><label>search <input type="search" aria-label="search in problems"></label>'
        '<label><input type="checkbox" value="error" checked> errors</label>'
        '<label><input type="checkbox" value="warning" checked> warnings</label>'
        '<button type="button">open all</button><output aria-live="polite"></output></div>'
    )
    return _section("Problems", tools + "".join(map(_sort, sorts)), "problems")


def _sort(sort: Sort) -> str:
    first, tone = sort.problems[0], sort.severity
    cases = "".join(f"<li>{_case(problem)}</li>" for problem in sort.problems[:CASES_PER_KIND])
    hidden = sort.count - min(len(sort.problems), CASES_PER_KIND)
    if hidden:
        cases += f'<li class="quiet">and {hidden} more; maskwright check --json has up to 1000 of each sort</li>'
    remedy = f'<p class="remedy">What to do: {escape(first.remedy)}</p>' if first.remedy else ""
    return (
        f'<details class="{tone}" data-severity="{tone}"><summary><span class="badge">{tone}</span>'
        f'<span class="times">{sort.count}×</span><span>{escape(str(first))}</span></summary>'
        f'{remedy}<div class="cases" tabindex="0" role="region" aria-label="cases"><ul>{cases}</ul></div></details>'
    )


def _case(problem: Problem) -> str:
    items = [item for item in problem.items if item not in problem.found]
    more = f" and {len(items) - 20} more" if len(items) > 20 else ""
    named = f' <span class="items">({escape(", ".join(items[:20]))}{more})</span>' if items else ""
    return escape(str(problem)) + named


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    cells = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(f"<tr>{_cells(row)}</tr>" for row in rows)
    return f'<div class="wide" tabindex="0"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'


def _cells(row: Iterable[str]) -> str:
    first, *others = row
    return f'<th scope="row">{escape(first)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in others)


def _classes(part: TaskStatistics) -> str:
    head, rows = class_table(part)
    cells = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = ""
    for label, (category, row) in enumerate(zip(part.categories, rows, strict=True)):
        absent = not any(split.classes[label].images for split in part.splits.values())
        name = f"{_swatch(category)}{escape(category.name)}"
        others = "".join(f"<td>{escape(cell)}</td>" for cell in row[2:])
        body += f'<tr{" class=absent" if absent else ""}><th scope="row">{row[0]}</th><td>{name}</td>{others}</tr>'
    table = f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"
    return _section(f"Classes, {part.task}", f'<div class="wide named" tabindex="0">{table}</div>')


def _swatch(category: Category) -> str:
    return '<i class="swatch" style="background:rgb({},{},{})"></i>'.format(*category.color)


def _channels(report: Report) -> str:
    return f'<pre tabindex="0">{escape(report.recipe_lines())}</pre>'


def _sheet(report: Report) -> str:
    common = len(os.path.commonpath([os.path.dirname(example.path) for example in report.examples])) + 1
    tiles = "".join(
        _tile(example, example.path[common:], report.wrong.get(example.path, [])) for example in report.examples
    )
    splits = "".join(f"<option>{escape(name)}</option>" for name in report.splits)
    seen = {label for example in report.examples for label in example.labels}
    classes = "".join(
        f'<option value="{label}">{escape(report.categories[label].name)}</option>' for label in sorted(seen)
    )
    tools = (
        f'<div class="tools"><label>split <select><option value="">all</option>{splits}</select></label>'
        f'<label>class <select><option value="">all</option>{classes}</select></label>'
        '<label><input type="checkbox"> only with problems</label><output aria-live="polite"></output></div>'
    )
    return _section("Contact sheet", f'{tools}<div class="sheet">{tiles}</div>', "sheet")


def _tile(example: Example, name: str, problems: Sequence[Problem]) -> str:
    tone = min((problem.severity for problem in problems), default="")
    said = " ".join(f"{problem.severity}: {problem.found}." for problem in problems[:5])
    name = escape(name)
    if example.jpeg is None:
        picture = '<span class="none">cannot be read</span>'
    else:
        data = base64.b64encode(example.jpeg).decode()
        picture = f'<img loading="lazy" alt="annotated picture {name}" src="data:image/jpeg;base64,{data}">'
    labels = " ".join(map(str, example.labels))
    return (
        f'<button type="button" class="tile {tone}" data-split="{escape(example.split)}" data-labels="{labels}" '
        f'data-problems="{escape(said)}">{picture}<span class="name">{name}</span></button>'
    )
