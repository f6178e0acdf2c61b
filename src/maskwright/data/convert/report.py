"""Counts of what a conversion cannot keep."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class ConversionReport:
    """Counts by sentence, each with the first image concerned.

    Attributes:
        image: name of the image that is being converted.
        counts: sentence -> (number of things, number of images, first image).
    """

    image: str = ""
    counts: dict[str, tuple[int, int, str]] = field(default_factory=dict)

    def add(self, what: str, count: int) -> None:
        """Add what is lost of the current image; `what` continues a number, as "objects are dropped"."""
        if count:
            before, images, first = self.counts.get(what, (0, 0, self.image))
            self.counts[what] = before + count, images + 1, first

    def lines(self) -> list[str]:
        """Return one line per sentence."""
        return [
            f"{count:,} {what} ({images:,} {'image' if images == 1 else 'images'}, first {first})"
            for what, (count, images, first) in self.counts.items()
        ]
