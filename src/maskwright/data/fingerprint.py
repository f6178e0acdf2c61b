"""A fingerprint of a split, by which a resumed run notices that its data has changed."""

from __future__ import annotations

import zlib

from maskwright.data.formats.base import AnnotatedImages
from maskwright.data.storage.folders import File

_SAMPLED_IMAGES = 128


def fingerprint(split: AnnotatedImages) -> str:
    """Return the number of images and a CRC-32, such as "118287 images, 0a1b2c3d".

    It covers the COCO JSON, if there is one, and of evenly spaced images the id and the label file; nothing that
    depends on where the data is stored.

    Raises:
        DatasetError: a file cannot be read.
    """
    count = len(split)
    document = getattr(split.reader, "annotation_file", None)
    crc32 = zlib.crc32(document.read()) if document else 0
    for index in sorted({number * count // _SAMPLED_IMAGES for number in range(_SAMPLED_IMAGES)} if count else ()):
        crc32 = zlib.crc32(str(split.image_id(index)).encode(), crc32)
        for file in _label_files(split, index):
            crc32 = zlib.crc32(file.read(), crc32)
    return f"{count} images, {crc32:08x}"


def _label_files(split: AnnotatedImages, index: int) -> list[File]:
    annotation = split.reader.images.annotation(index)
    if isinstance(annotation, File):
        return [annotation]
    return [part for part in annotation if isinstance(part, File)] if isinstance(annotation, tuple | list) else []
