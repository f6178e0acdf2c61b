"""Images whose bytes are stored in a column of a Parquet file, as Hugging Face and Ray write them.

A cell is identified by its position, so that a million of them can be listed and sent to any process without their
bytes. Row groups may be larger than memory: a reader goes forward through one in small batches, and cells that are read
in order are decoded once.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

from maskwright.data.storage.remote import is_url, open_url
from maskwright.errors import DatasetError, MaskwrightError, one_line

_ROWS_AT_ONCE = 8
_BUFFER_BYTES = 1 << 20
_MAX_READERS = 2
_FIELD = "bytes"  # of the structs {bytes, path} in which the library `datasets` stores images


class Cell(NamedTuple):
    """The position of an image in a Parquet file: `row` counts from the first row of the row group."""

    table: str
    row_group: int
    row: int
    column: str


def open_parquet(table: str) -> Any:
    """Open a Parquet file, on disk or at a URL, as `pyarrow.parquet.ParquetFile`.

    Raises:
        DatasetError: it is missing, or is not a Parquet file.
        MaskwrightError: pyarrow is not installed.
    """
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise MaskwrightError(
            "reading it needs pyarrow", where=table, remedy="pip install 'maskwright[parquet]'"
        ) from None
    source = open_url(table) if is_url(table) else table
    try:
        return pq.ParquetFile(source, buffer_size=_BUFFER_BYTES, pre_buffer=False)
    except Exception as error:  # pyarrow raises many types
        raise DatasetError(f"not a readable Parquet file ({one_line(error)})", where=table) from None


def read_cell(cell: Cell) -> bytes:
    """Return the bytes of an image.

    Raises:
        DatasetError: the cell is empty, or the file is damaged or has changed.
    """
    where = f"{cell.table}, row {cell.row} of row group {cell.row_group}"
    with _lock:
        try:
            value = _reader(cell).read(cell.row)
        except MaskwrightError:
            raise
        except Exception as error:
            raise DatasetError(f"cannot be read ({one_line(error)})", where=where) from None
    content = value.get(_FIELD) if isinstance(value, dict) else value
    if content is None:
        raise DatasetError(f"no image in column '{cell.column}'", where=where)
    return content


class _RowGroupReader:
    """Reads one column of a row group forward."""

    def __init__(self, file: Any, row_group: int, column: str) -> None:
        self._open = lambda: file.iter_batches(_ROWS_AT_ONCE, row_groups=[row_group], columns=[column])
        self._batches, self._start, self._values = self._open(), 0, []

    def read(self, row: int) -> Any:
        if row < self._start:
            self._batches, self._start, self._values = self._open(), 0, []
        while row >= self._start + len(self._values):
            self._start += len(self._values)
            self._values = next(self._batches).column(0).to_pylist()
        return self._values[row - self._start]


_lock = threading.Lock()
_readers: dict[tuple[str, int, str], _RowGroupReader] = {}  # the last ones used


def _reader(cell: Cell) -> _RowGroupReader:
    key = (cell.table, cell.row_group, cell.column)
    reader = _readers.pop(key, None) or _RowGroupReader(open_parquet(cell.table), cell.row_group, cell.column)
    _readers[key] = reader
    while len(_readers) > _MAX_READERS:
        del _readers[next(iter(_readers))]
    return reader
