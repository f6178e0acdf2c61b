"""Results as Parquet files, for pandas, DuckDB, Spark and Ray: one row per image, `part-00000.parquet` and so on.

The columns are those of `Segmentation.to_json`:

    source      string    file of the image
    name        string    unique name of the image, that of its files in other formats
    task        string    "semantic", "instance" or "panoptic"
    height      int32     of the image, in pixels
    width       int32
    segments    list of structs:
        category_id int64, name string
        score       float32, null for semantic results
        box         list of 4 floats: x0, y0, x1, y1 in pixels, x1 and y1 exclusive
        area        int64, in pixels
        mask        struct: size [height, width], counts (RLE of the COCO API), as pycocotools decodes it
        confidence  float32, mean over the segment; null without confidence maps
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from maskwright.errors import MaskwrightError
from maskwright.results.coco import to_json
from maskwright.results.formats.base import Run, ToolFiles
from maskwright.results.segmentation import Segmentation
from maskwright.runtime.atomic_write import write_file_atomically

ROWS_PER_SHARD = 512
_MARK = {b"maskwright": b"results"}


def require_pyarrow() -> None:
    """Raise a MaskwrightError if pyarrow is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise MaskwrightError("Parquet files need pyarrow", remedy="pip install 'maskwright[parquet]'") from None


def schema() -> Any:
    """Return the `pyarrow.Schema` of the files."""
    import pyarrow as pa

    mask = pa.struct([("size", pa.list_(pa.int32())), ("counts", pa.string())])
    segment = pa.struct(
        [
            ("category_id", pa.int64()),
            ("name", pa.string()),
            ("score", pa.float32()),
            ("box", pa.list_(pa.float32())),
            ("area", pa.int64()),
            ("mask", mask),
            ("confidence", pa.float32()),
        ]
    )
    columns = [("source", pa.string()), ("name", pa.string()), ("task", pa.string())]
    columns += [("height", pa.int32()), ("width", pa.int32()), ("segments", pa.list_(segment))]
    return pa.schema(columns, metadata=_MARK)


def to_row(result: Segmentation, name: str) -> dict[str, Any]:
    """Return the row of an image; its masks are encoded."""
    values = to_json(result)
    height, width = values["size"]
    return {
        "source": result.source,
        "name": name,
        "task": values["task"],
        "height": height,
        "width": width,
        "segments": values["segments"],
    }


def write_shard(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows atomically.

    Raises:
        MaskwrightError: the disk is full, or the folder is not writable.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(list(rows), schema())
    write_file_atomically(path, lambda temporary: pq.write_table(table, temporary, compression="zstd"))


def read_names(paths: Iterable[Path]) -> set[str]:
    """Return the names of the images in shards.

    Raises:
        MaskwrightError: a file is damaged, or was not written by maskwright.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    names: set[str] = set()
    for path in paths:
        try:
            is_ours = _MARK.items() <= (pq.read_schema(path).metadata or {}).items()
            names.update(pq.read_table(path, columns=["name"]).column(0).to_pylist() if is_ours else ())
        except (OSError, pa.ArrowException):
            is_ours = False
        if not is_ours:
            raise MaskwrightError(
                "is not a Parquet file of results", where=path, remedy="choose another output folder, or move it"
            )
    return names


class ParquetShards(ToolFiles):
    """Writes shards while images arrive. The folder must not have shards already: old and new rows would mix."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        require_pyarrow()
        existing = sorted(run.directory.glob("part-*.parquet"))
        if existing:
            raise MaskwrightError(
                "the folder has shards of an earlier prediction",
                where=existing[0],
                remedy="choose another output folder",
            )
        self._rows: list[dict[str, Any]] = []
        self._count = 0

    def add(self, result: Segmentation, name: str) -> None:
        """See `ToolFiles`."""
        self._rows.append(to_row(result, name))
        if len(self._rows) == ROWS_PER_SHARD:
            self.finish()

    def finish(self) -> None:
        """Write the rows that are not written yet."""
        if self._rows:
            write_shard(self.run.directory / f"part-{self._count:05d}.parquet", self._rows)
            self._rows, self._count = [], self._count + 1

    def discard(self) -> None:
        """Forget the rows that are not written."""
        self._rows = []
