"""Lists of images: CSV and Parquet files with a column of paths or URLs, and Parquet files with a column of bytes."""

from __future__ import annotations

import csv
import io
import os
import posixpath
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path, PurePath
from typing import Any

from maskwright.data.storage.folders import File
from maskwright.data.storage.parquet import Cell, open_parquet
from maskwright.data.storage.remote import is_url
from maskwright.data.storage.text import read_text
from maskwright.errors import DatasetError, printable

COLUMNS = ("image", "path", "file", "file_name", "filename", "image_path", "file_path", "url", "uri")
"""Names of the column of a list, tried in this order regardless of case."""


def is_image_table(name: str) -> bool:
    """Return True if a file with this name counts as a list of images."""
    return name.lower().endswith((".csv", ".parquet"))


def read_image_table(table: str, column: str | None = None) -> list[File]:
    """Return the images of a list, in order. Relative paths are relative to the folder of the list.

    Args:
        table: path or URL.
        column: its column; default: the first of `COLUMNS` that it has.

    Raises:
        DatasetError: the file cannot be read, has no such column, or lists no image.
        MaskwrightError: pyarrow is not installed.
    """
    files = _read_csv(table, column) if table.lower().endswith(".csv") else _read_parquet(table, column)
    if not files:
        raise DatasetError("lists no images", where=table)
    return files


def _read_csv(table: str, column: str | None) -> list[File]:
    rows = csv.reader(io.StringIO(read_text(File(table)), newline=""))
    header = next(rows, [])
    index = header.index(_choose(header, column, table))
    return [_named(row[index], table) for row in rows if len(row) > index and row[index].strip()]


def _read_parquet(table: str, column: str | None) -> list[File]:
    import pyarrow as pa

    file = open_parquet(table)
    fields = {field.name: field.type for field in file.schema_arrow}
    texts = [name for name, kind in fields.items() if pa.types.is_string(kind) or pa.types.is_large_string(kind)]
    binary = [name for name, kind in fields.items() if _holds_bytes(kind)]
    chosen = _choose([*texts, *binary], column, table)
    if chosen in texts:
        values = file.read(columns=[chosen]).column(0).to_pylist()
        return [_named(value, table) for value in values if value and value.strip()]
    return _name_cells(list(_cells(file, table, chosen)), _stored_names(file, chosen, texts), table)


def _holds_bytes(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _choose(names: Sequence[str], column: str | None, table: str) -> str:
    lower = {name.lower(): name for name in reversed(names)}
    if column is not None and column not in names:
        raise DatasetError(f"no column '{printable(column)}' with paths or images", where=table, remedy=_listed(names))
    chosen = column or next((lower[name] for name in COLUMNS if name in lower), None)
    if chosen is None:
        raise DatasetError(
            f"no column is named {', '.join(COLUMNS[:4])} or similar",
            where=table,
            remedy=f"name it with --column; {_listed(names)}",
        )
    return chosen


def _listed(names: Sequence[str]) -> str:
    return f"it has {', '.join(map(printable, names[:12]))}" if names else "it has none"


def _named(path: str, table: str) -> File:
    """Return the file with this path, which may be relative to the folder of the list."""
    path = path.strip()
    if is_url(path) or os.path.isabs(path):
        return File(path)
    return File(posixpath.join(posixpath.dirname(table), path) if is_url(table) else str(Path(table).parent / path))


def _cells(file: Any, table: str, column: str) -> Iterator[Cell]:
    for group in range(file.num_row_groups):
        for row in range(file.metadata.row_group(group).num_rows):
            yield Cell(table, group, row, column)


def _stored_names(file: Any, column: str, texts: Sequence[str]) -> list[str | None] | None:
    """Return the name of the image in each row: that in its struct, or in the first of `COLUMNS` with texts."""
    import pyarrow as pa

    kind = file.schema_arrow.field(column).type
    if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0:
        parts = (batch.column(0).to_pylist() for batch in file.iter_batches(columns=[f"{column}.path"]))
        return [value and value["path"] for value in chain.from_iterable(parts)]
    lower = {name.lower(): name for name in texts}
    named = next((lower[name] for name in COLUMNS if name in lower), None)
    return None if named is None else file.read(columns=[named]).column(0).to_pylist()


def _name_cells(cells: list[Cell], names: list[str | None] | None, table: str) -> list[File]:
    """Name images after the list and their stored names; those without a name of their own after their row."""
    known = [PurePath(name).as_posix().lstrip("/") if name else "" for name in names or [""] * len(cells)]
    count = Counter(known)
    labels = [name if name and count[name] == 1 else f"{row:06d}_{name}".rstrip("_") for row, name in enumerate(known)]
    return [File(f"{table}/{label}", cell) for label, cell in zip(labels, cells, strict=True)]
