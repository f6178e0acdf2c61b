"""Scores as tables for the terminal."""

from __future__ import annotations

from rich.table import Table

from maskwright.evaluation.metrics.base import Scores


def format_table(scores: Scores) -> Table:
    """Return the scores over all classes, in percent; "-" if there is no data."""
    table = Table("score", title=f"{scores['images']} images")
    table.add_column("%", justify="right")
    for name, value in scores.items():
        if name != "images" and not isinstance(value, dict):
            table.add_row(name, _percent(value))
    return table


def format_tables(scores: Scores) -> list[Table]:
    """Return the tables of scores (in percent) and counts, such as those per class; "-" if there is no data.

    Wide tables are split to fit into 80 characters.
    """
    tables = []
    for name, rows in scores.items():
        if isinstance(rows, dict):
            columns = list(dict.fromkeys(column for row in rows.values() for column in row))
            parts = [columns[start : start + _MAX_COLUMNS] for start in range(0, len(columns), _MAX_COLUMNS)]
            tables += [_format_rows(name.removeprefix("per_"), rows, part, scores["images"]) for part in parts]
    return tables


_MAX_COLUMNS = 6


def _format_rows(name: str, rows: dict[str, dict], columns: list[str], images: int) -> Table:
    table = Table(name, title=f"{images} images")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row, values in rows.items():
        table.add_row(row, *(_percent(values.get(column)) for column in columns))
    return table


def _percent(value: float | int | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{100 * value:.2f}"
