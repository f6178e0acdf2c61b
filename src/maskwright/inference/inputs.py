"""The images to predict: files, folders, globs, archives, lists of images, and the same at URLs."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from maskwright.data.images.find import find_images, is_image_name
from maskwright.data.storage.archives import is_archive, is_archive_name, list_entries
from maskwright.data.storage.folders import File
from maskwright.data.storage.image_tables import is_image_table, read_image_table
from maskwright.data.storage.remote import is_url, list_urls
from maskwright.errors import DatasetError, ImageError
from maskwright.results.own_files import is_result
from maskwright.results.save import unique_names

logger = logging.getLogger(__name__)

Source = Path | File
"""An image: a file on disk, or one in an archive, at a URL or in a Parquet file."""


def find_sources(inputs: Sequence[str], output: Path, column: str | None = None) -> list[Source]:
    """Return the images that the inputs name, each once, without results of predictions.

    An archive stands for the images in it, and a `.csv` or `.parquet` file for the images it lists. Images in folders
    come first, in the order of their paths; images of archives and lists follow in their own order.

    Args:
        inputs: files, folders, globs, archives, lists, and URLs of these.
        output: folder of the results, which is not searched.
        column: of the lists; see `read_image_table`.

    Raises:
        DatasetError: an archive, a list or a URL cannot be read, or has no images.
        ImageError: an input matches nothing, or nothing but results.
    """
    plain: list[str] = []
    found: dict[str | File, Source] = {}
    for item in inputs:
        for name in _expand_tables(item):
            if is_url(name) or is_archive(Path(name)) or (is_image_table(name) and Path(name).is_file()):
                for source in _files(name, column):
                    found[source if source.location is not None else source.name] = source
            else:
                plain.append(name)
    paths = find_inputs(plain, output) if plain else []
    sources = {str(path): path for path in paths} | found
    return [
        Path(source.name) if isinstance(source, File) and source.is_on_disk else source for source in sources.values()
    ]


def name_results(sources: Sequence[Source]) -> list[str]:
    """Return a name for the results of each image; see `unique_names`."""
    return unique_names([re.sub(r"^\w[\w+.-]*://", "", str(source)) for source in sources])


def find_inputs(inputs: Sequence[str], output: Path) -> list[Path]:
    """Return the images in files, folders and globs, without results of predictions.

    Raises:
        ImageError: an input matches nothing, or nothing but results.
    """
    found: set[Path] = set()
    skipped: set[Path] = set()
    for item in inputs:
        inside = _contains(_search_root(item), output)
        for path in find_images(item):
            is_ours = (inside and _contains(output, path)) or (path.suffix.lower() == ".png" and is_result(path))
            (skipped if is_ours else found).add(path)
    if skipped:
        logger.info("skipped %d images that are results of predictions or in %s", len(skipped), output)
    if not found:
        raise ImageError(
            "holds only results of predictions", where=", ".join(inputs), remedy="name the images to segment"
        )
    return sorted(found)


def _expand_tables(item: str) -> list[str]:
    """Return the files that a glob of archives or lists matches, such as shards/*.parquet; other inputs unchanged."""
    is_pattern = not is_url(item) and glob.has_magic(item) and not Path(item).exists()
    if not is_pattern or not (is_archive_name(item) or is_image_table(item)):
        return [item]
    return sorted(glob.glob(item, recursive=True)) or [item]


def _files(name: str, column: str | None) -> Iterator[File]:
    """Yield the images of an archive or a list, or at a URL."""
    is_pattern = is_url(name) and not name.startswith("http") and glob.has_magic(name)
    if is_archive_name(name) and not is_pattern:
        yield from _in_archive(name)
    elif is_image_table(name) and not is_pattern:
        yield from read_image_table(name, column)
    elif name.startswith("http"):
        yield File(name)
    else:
        yield from _at_url(name, is_pattern, column)


def _at_url(name: str, is_pattern: bool, column: str | None) -> Iterator[File]:
    """Yield the file at a URL, the images below a folder, or what matches a pattern."""
    urls = list_urls(name)
    tables = [url for url in urls if is_pattern and (is_archive_name(url) or is_image_table(url))]
    images = urls if urls == [name] else [url for url in urls if is_image_name(url)]
    if not images and not tables:
        raise DatasetError("has no images", where=name, remedy="check the address")
    yield from map(File, sorted(images))
    for url in sorted(tables):
        yield from _files(url, column)


def _in_archive(archive: str) -> list[File]:
    files = [
        File(f"{archive}/{name}", entry)
        for name, entry in list_entries(archive, archive)
        if is_image_name(name) and not any(part.startswith(".") for part in PurePosixPath(name).parts)
    ]
    if not files:
        raise DatasetError("the archive has no images", where=archive, remedy="check its content")
    return sorted(files, key=str)


def _search_root(item: str) -> Path:
    """Return the folder that is searched for an input; for a glob, the part before its first pattern."""
    path = Path(item)
    if path.is_dir():
        return path
    while glob.has_magic(str(path)) and not path.exists():
        path = path.parent
    return path.parent if path.is_file() else path


def _contains(folder: Path, path: Path) -> bool:
    """Return True if the path is below the folder, and is not the folder itself."""
    return Path(os.path.realpath(folder)) in Path(os.path.realpath(path)).parents
