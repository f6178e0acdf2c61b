"""The record of a prediction in its output folder, by which it is resumed: nothing is done twice or mixed.

`OUTPUT/.maskwright/` has the settings of the run and the name of each image. An image is done when the last of its
files is there; files of one image are published in a fixed order, each atomically.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskwright.errors import MaskwrightError
from maskwright.results.formats.parquet import read_names
from maskwright.results.own_files import check_replaceable, is_result
from maskwright.results.save import result_files
from maskwright.runtime.atomic_write import remove, write_file_atomically
from maskwright.structures.annotations import Task

FOLDER = ".maskwright"
_LONG = 200  # bytes of a name, from which on its files are checked one by one


@dataclass
class RunFolder:
    """The output folder of a run.

    Attributes:
        output: the folder.
        task: kind of the results.
        as_parquet: whether results are rows of shards, and not files.
        confidence: whether there are confidence maps.
        attempt: how often the run was started, from 1; part of the names of shards.
        done: names of the images whose results are there.
    """

    output: Path
    task: Task
    as_parquet: bool
    confidence: bool
    attempt: int = 0
    done: frozenset[str] = frozenset()

    def open(self, settings: dict[str, Any], images: Sequence[tuple[str, str]]) -> None:
        """Start the run, or resume it.

        Args:
            settings: plain values that results depend on.
            images: (name, source) of each.

        Raises:
            MaskwrightError: the folder has results of other settings or another command, an image has another name
                than before, or the folder is not writable.
        """
        folder, record = self.record.parent, self.record
        if record.exists():
            before = json.loads(record.read_text(encoding="utf-8"))
            self.attempt = before["attempt"]
            self._check_settings(before["settings"], json.loads(json.dumps(settings)))
            images = self._join(folder / "images.parquet", images)
            self.done = self._find_done(images)
        else:
            self._refuse_results(images)
        self.attempt += 1
        write_file_atomically(folder / "images.parquet", lambda path: _write_columns(path, ("name", "source"), images))
        text = json.dumps({"attempt": self.attempt, "settings": settings}, indent=1)
        write_file_atomically(record, lambda path: path.write_text(text, encoding="utf-8"))

    @property
    def record(self) -> Path:
        """The file with the settings."""
        return self.output / FOLDER / "run.json"

    def files(self, name: str) -> list[Path]:
        """Return the files of an image in the order in which they are published; the first may be missing."""
        return result_files(self.task, self.output, name, self.confidence)

    def is_done(self, name: str) -> bool:
        """Return True if the files of an image are there."""
        return not self.as_parquet and self.files(name)[-1].exists()

    def shard(self, chunk: int) -> Path:
        """Return the Parquet file of a chunk of this attempt."""
        return self.output / f"part-{self.attempt:03d}-{chunk:06d}.parquet"

    def refusals(self, names: Sequence[str]) -> dict[str, str]:
        """Return the reason for each image whose results would overwrite a file that maskwright did not write."""
        if self.as_parquet:
            return {}
        present = _listing(self.output)
        reasons = {}
        for name in names:
            files = self.files(name)
            if len(os.fsencode(name)) > _LONG or any(file.name in present for file in files):
                try:
                    check_replaceable(files)
                except MaskwrightError as error:
                    reasons[name] = str(error)
        return reasons

    def finish(self, failures: Sequence[tuple[str, str, str]]) -> None:
        """Write failures.parquet with (source, name, reason), or remove that of an earlier attempt.

        Raises:
            MaskwrightError: the folder is not writable.
        """
        path = self.output / "failures.parquet"
        if failures:
            columns = ("source", "name", "reason")
            write_file_atomically(path, lambda temporary: _write_columns(temporary, columns, failures))
        else:
            remove(path)
        for partial in self.output.glob(".*.partial"):  # of workers that were killed
            remove(partial)

    def _find_done(self, images: Sequence[tuple[str, str]]) -> frozenset[str]:
        if self.as_parquet:
            return frozenset(read_names(sorted(self.output.glob("part-*.parquet"))))
        present = _listing(self.output)
        return frozenset(name for name, _ in images if self.files(name)[-1].name in present)

    def _check_settings(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        for key in before.keys() | now.keys():
            if before.get(key) != now.get(key):
                raise MaskwrightError(
                    f"has results with {key} {before.get(key)}, not {now.get(key)}",
                    where=self.output,
                    remedy="choose another output folder, or remove this one",
                )

    def _join(self, path: Path, images: Sequence[tuple[str, str]]) -> Sequence[tuple[str, str]]:
        """Return the images of earlier attempts and of this one."""
        known = dict(_read_images(path))
        for name, source in images:
            if known.setdefault(name, source) != source:
                raise MaskwrightError(
                    f"has results of {known[name]} under the name '{name}', which is now that of {source}",
                    where=self.output,
                    remedy="choose another output folder",
                )
        return list(known.items())

    def _refuse_results(self, images: Sequence[tuple[str, str]]) -> None:
        present = _listing(self.output)
        if self.as_parquet:
            found = next((self.output / name for name in sorted(present) if name.startswith("part-")), None)
        else:
            paths = (path for name, _ in images for path in self.files(name) if path.name in present)
            found = next((path for path in paths if is_result(path)), None)
        if found is not None:
            raise MaskwrightError(
                "is a result of another prediction, which would be taken for one of this run",
                where=found,
                remedy="choose another output folder",
            )


def _listing(folder: Path) -> set[str]:
    return set(os.listdir(folder)) if folder.is_dir() else set()


def _write_columns(path: Path, columns: Sequence[str], rows: Sequence[tuple[str, ...]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    values = list(zip(*rows, strict=True)) or [()] * len(columns)
    pq.write_table(pa.table({c: pa.array(v, pa.string()) for c, v in zip(columns, values, strict=True)}), path)


def _read_images(path: Path) -> list[tuple[str, str]]:
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    return list(zip(table.column("name").to_pylist(), table.column("source").to_pylist(), strict=True))
