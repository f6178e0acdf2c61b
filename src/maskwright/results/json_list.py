"""Write a JSON document that contains a long list, without keeping the list in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from maskwright.runtime.atomic_write import AtomicFile


class JsonList(AtomicFile):
    """A JSON file with a list that grows.

    Args:
        path: the final name.
        head: text before the first entry, which opens the list.
    """

    def __init__(self, path: Path, head: str) -> None:
        super().__init__(path)
        self._separator = head

    def add(self, entry: dict[str, Any]) -> None:
        """Write one entry."""
        with self.writing() as file:
            file.write(f"{self._separator}{json.dumps(entry)}".encode())
        self._separator = ",\n"

    def end(self, tail: str) -> None:
        """Write what follows the list. The file is complete, but not yet published."""
        with self.writing() as file:
            file.write(((self._separator if self._separator != ",\n" else "") + tail).encode())
            file.flush()
