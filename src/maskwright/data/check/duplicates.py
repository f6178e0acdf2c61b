"""Images that occur more than once: in two splits they inflate the score, in one they count double.

Duplicates have equal pixels. Near-duplicates have thumbnails of 16x16 gray cells that correlate: the same image
compressed again or scaled, or the next frame of a video.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import combinations

import numpy as np

from maskwright.data.check.examine import PixelContent
from maskwright.data.problems import Problem

MIN_CORRELATION = 0.995  # of thumbnails; compressed again or scaled: above 0.999, other scenes: below 0.97
_BLOCK = 1024  # thumbnails compared at a time

_LEAK = "remove it from one of them, since a model must not be evaluated on what it was trained on"

Images = Mapping[str, PixelContent]  # by path


def find_duplicates(splits: Mapping[str, Images]) -> Iterator[Problem]:
    """Warn of images that occur twice in a split or in two splits, or have a near-duplicate in another split."""
    by_fingerprint = {name: _by_fingerprint(images) for name, images in splits.items()}
    for name, groups in by_fingerprint.items():
        for first, *others in groups.values():
            for path in others:
                found = f"the same image is in {name} twice, also as {first}"
                yield Problem("warning", path, (first,), found, "remove one of them, or it counts double")
    for (first_name, first), (second_name, second) in combinations(splits.items(), 2):
        unique = dict(second)
        for path, pixels in second.items():
            copies = by_fingerprint[first_name].get(pixels.fingerprint)
            if copies:
                del unique[path]
                found = f"the same image is in {first_name} and in {second_name}, there as {copies[0]}"
                yield Problem("warning", path, (copies[0],), found, _LEAK)
        for path, other, correlation in _near_duplicates(first, unique):
            found = f"this image of {second_name} looks like {other} of {first_name} (correlation {correlation:.4f})"
            yield Problem("warning", path, (other,), found, "if both show one scene, keep them in one split")


def _by_fingerprint(images: Images) -> dict[tuple, list[str]]:
    groups = defaultdict(list)
    for path, pixels in images.items():
        groups[pixels.fingerprint].append(path)
    return groups


def _near_duplicates(first: Images, second: Images) -> Iterator[tuple[str, str, float]]:
    """Yield (path in `second`, most similar path in `first`, correlation) of near-duplicates."""
    first_paths, second_paths = (
        [path for path, pixels in images.items() if np.ptp(pixels.thumbnail)] for images in (first, second)
    )
    if not first_paths or not second_paths:
        return
    first_vectors = _normalize([first[path] for path in first_paths])
    for start in range(0, len(second_paths), _BLOCK):
        paths = second_paths[start : start + _BLOCK]
        vectors = _normalize([second[path] for path in paths])
        best, position = np.full(len(paths), -1.0, np.float32), np.zeros(len(paths), np.intp)
        for offset in range(0, len(first_paths), _BLOCK):
            correlations = vectors @ first_vectors[offset : offset + _BLOCK].T
            nearest = correlations.argmax(1)
            values = correlations[np.arange(len(paths)), nearest]
            better = values > best
            best[better], position[better] = values[better], nearest[better] + offset
        for i in np.flatnonzero(best >= MIN_CORRELATION):
            yield paths[i], first_paths[position[i]], min(float(best[i]), 1.0)


def _normalize(images: list[PixelContent]) -> np.ndarray:
    """Return (N, 256) float32 thumbnails of mean 0 and length 1."""
    vectors = np.stack([pixels.thumbnail.ravel() for pixels in images]).astype(np.float32)
    vectors -= vectors.mean(1, keepdims=True)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
