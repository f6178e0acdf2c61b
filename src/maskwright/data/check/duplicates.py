"""Pictures that occur more than once: in two splits they make a score too good, in one they weigh double.

Equal pictures have equal pixels. Alike are those whose thumbnails of 16x16 gray cells correlate: the same picture
stored again with loss, scaled, or its neighbour in a film.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import combinations

import numpy as np

from maskwright.data.check.examine import Picture
from maskwright.data.problems import Problem

ALIKE = 0.995  # correlation of two thumbnails; stored again with loss or scaled: above 0.999, other scenes: below 0.97
_BLOCK = 1024  # thumbnails compared at once

_LEAK = "remove it from one of them, since a model must not be judged on what it was trained on"

Pictures = Mapping[str, Picture]  # by path


def duplicates(splits: Mapping[str, Pictures]) -> Iterator[Problem]:
    """A warning for each picture that lies twice in one split, lies in two, or looks like one of another split."""
    digests = {name: _by_content(pictures) for name, pictures in splits.items()}
    for name, content in digests.items():
        for first, *others in content.values():
            for path in others:
                found = f"the same picture lies in {name} a second time, as {first}"
                yield Problem("warning", path, (first,), found, "remove one of them, or it weighs double")
    for (first_name, first), (second_name, second) in combinations(splits.items(), 2):
        others = dict(second)
        for path, picture in second.items():
            twins = digests[first_name].get(picture.content)
            if twins:
                del others[path]
                found = f"the same picture lies in {first_name} and in {second_name}, there as {twins[0]}"
                yield Problem("warning", path, (twins[0],), found, _LEAK)
        for path, twin, correlation in _alike(first, others):
            found = (
                f"this picture of {second_name} looks like one of {first_name}, {twin} (correlation {correlation:.4f})"
            )
            yield Problem("warning", path, (twin,), found, "if both show one scene, keep them in one split")


def _by_content(pictures: Pictures) -> dict[tuple, list[str]]:
    found = defaultdict(list)
    for path, picture in pictures.items():
        found[picture.content].append(path)
    return found


def _alike(first: Pictures, second: Pictures) -> Iterator[tuple[str, str, float]]:
    """Each path of `second` with that of `first` that it is most like, where it is."""
    known, asked = (
        [path for path, picture in pictures.items() if np.ptp(picture.thumbnail)] for pictures in (first, second)
    )
    if not known or not asked:
        return
    vectors = _normalised([first[path] for path in known])
    for start in range(0, len(asked), _BLOCK):
        part = asked[start : start + _BLOCK]
        wanted = _normalised([second[path] for path in part])
        best, place = np.full(len(part), -1.0, np.float32), np.zeros(len(part), np.intp)
        for row in range(0, len(known), _BLOCK):
            scores = wanted @ vectors[row : row + _BLOCK].T
            nearest = scores.argmax(1)
            values = scores[np.arange(len(part)), nearest]
            better = values > best
            best[better], place[better] = values[better], nearest[better] + row
        for i in np.flatnonzero(best >= ALIKE):
            yield part[i], known[place[i]], min(float(best[i]), 1.0)


def _normalised(pictures: list[Picture]) -> np.ndarray:
    """(N, 256) float32 thumbnails of mean 0 and length 1."""
    rows = np.stack([picture.thumbnail.ravel() for picture in pictures]).astype(np.float32)
    rows -= rows.mean(1, keepdims=True)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
