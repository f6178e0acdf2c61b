"""Files at URLs that fsspec opens: `s3://`, `gs://`, `https://` and others.

fsspec comes with PyTorch; most schemes need one more package (`s3fs`, `gcsfs`), which fsspec's own error names.
Credentials and endpoints are those of that package, for S3 the usual environment variables and files of AWS.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Generator
from contextlib import contextmanager
from typing import IO, Any

from maskwright.errors import DatasetError, one_line

_URL = re.compile(r"[a-zA-Z][\w+.-]+://")


def is_url(name: str) -> bool:
    """Return True for "scheme://...", which is not a path on any system."""
    return _URL.match(name) is not None


def list_urls(url: str) -> list[str]:
    """Return the URLs of all files that a URL names: itself, those below a folder, or those that match a pattern.

    Raises:
        DatasetError: nothing is found, or the storage cannot be reached.
    """
    with _remote_errors(url):
        system, path = _open_system(url)
        found = system.glob(path) if glob.has_magic(path) else system.find(path)  # of a file, `find` returns itself
        if not found:
            raise FileNotFoundError("no such file or folder")
        return [system.unstrip_protocol(name) for name in found]


def read_url(url: str, start: int | None = None, end: int | None = None) -> bytes:
    """Return the bytes of a file, or those from `start` to `end` (exclusive).

    Raises:
        DatasetError: the file is missing, or the storage cannot be reached.
    """
    with _remote_errors(url):
        system, path = _open_system(url)
        return system.cat_file(path, start=start, end=end)  # s3fs has another order


def url_size(url: str) -> int:
    """Return the size of a file in bytes; errors as for `read_url`."""
    with _remote_errors(url):
        system, path = _open_system(url)
        return int(system.info(path)["size"])


def open_url(url: str) -> IO[bytes]:
    """Open a file for reading at any position; errors as for `read_url`."""
    with _remote_errors(url):
        system, path = _open_system(url)
        return system.open(path, "rb")


def _open_system(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs  # takes a tenth of a second, and only URLs need it

    return url_to_fs(url)


@contextmanager
def _remote_errors(url: str) -> Generator[None]:
    try:
        yield
    except ImportError as error:
        raise DatasetError(f"cannot be opened: {one_line(error)}", where=url, remedy="install that package") from None
    except Exception as error:  # clients of storage services raise almost any type
        raise DatasetError(
            f"cannot be read ({one_line(error)})", where=url, remedy="check the address and its credentials"
        ) from None
