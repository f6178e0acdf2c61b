"""A fingerprint of a split, by which a resumed run notices that its data has changed."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator

from maskwright.data.formats.base import AnnotatedImages
from maskwright.data.storage.archives import ArchiveEntry
from maskwright.data.storage.folders import File
from maskwright.errors import DatasetError, one_line

_SAMPLED_IMAGES = 128  # whose label files are read
_MAX_SIZES = 20_000  # label files whose sizes are looked up; a network drive may need a millisecond for each


def fingerprint(split: AnnotatedImages) -> str:
    """Return the number of images and two CRC-32, such as "118287 images, 0a1b2c3d 4e5f6071".

    The first covers the COCO JSON, if there is one, and the ids and label files of 128 evenly spaced images; the second
    the ids of all images, and the sizes of up to 20,000 label files. Neither depends on where the data is stored.

    Raises:
        DatasetError: a file cannot be read.
    """
    count = len(split)
    document = getattr(split.reader, "annotation_file", None)
    content = zlib.crc32(document.read()) if document else 0
    for index in _evenly_spaced(count, _SAMPLED_IMAGES):
        content = zlib.crc32(str(split.image_id(index)).encode(), content)
        for file in _label_files(split, index):
            content = zlib.crc32(file.read(), content)
    ids = "\n".join(str(split.image_id(index)) for index in range(count))
    sizes = [_size(file) for index in _evenly_spaced(count, _MAX_SIZES) for file in _label_files(split, index)]
    return f"{count} images, {content:08x} {zlib.crc32(repr(sizes).encode(), zlib.crc32(ids.encode())):08x}"


def _evenly_spaced(count: int, samples: int) -> Iterator[int]:
    yield from sorted({number * count // samples for number in range(samples)}) if count > samples else range(count)


def _size(file: File) -> int:
    """Return the size of a file in bytes."""
    if isinstance(file.location, ArchiveEntry):
        return file.location.size
    if file.location is not None:
        return len(file.location)
    try:
        return os.stat(file.name).st_size
    except OSError as error:
        raise DatasetError(f"cannot be read ({one_line(error)})", where=file.name, remedy="check the path") from None


def _label_files(split: AnnotatedImages, index: int) -> list[File]:
    annotation = split.reader.images.annotation(index)
    if isinstance(annotation, File):
        return [annotation]
    return [part for part in annotation if isinstance(part, File)] if isinstance(annotation, tuple | list) else []
