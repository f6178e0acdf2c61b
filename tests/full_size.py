"""Fixtures that are too large, or not ours, to come with the repository; they lie in `shared` beside it.

Without them, tests that use them are skipped. Real annotations are also in the packaged sample, so that no behavior is
held by these fixtures alone.
"""

from pathlib import Path

import pytest

import maskwright

SHARED = Path(__file__).resolve().parents[1].parent / "shared"
DATA = SHARED / "data"
PARITY = SHARED / "parity"
SAMPLE = Path(maskwright.__file__).parent / "data/sample"

needs_full_size = pytest.mark.skipif(not SHARED.is_dir(), reason="full-size fixtures do not come with the repository")


def full_size(*values: object) -> object:
    """Return a row of `parametrize` that uses these fixtures."""
    return pytest.param(*values, marks=needs_full_size)


def find(name: str) -> Path:
    """Return the path of a fixture; names that begin with "sample" are in the package."""
    return SAMPLE.parent / name if name.startswith("sample") else DATA / name
