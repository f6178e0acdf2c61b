"""Results of benchmarks: one row for each timed operation, as a table, as JSON and as a chart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.timing import WHOLE, Timing

Backbone = Literal["r50", "r50-timm", "swin-t"]
Precision = Literal["fp32", "bf16"]
LiteRecipe = Literal["camvid-lite", "nuclei-lite"]


@dataclass(frozen=True)
class Options:
    """How benchmarks run.

    Attributes:
        rounds: timed calls of each side, after one warm-up call; None is the default of each part.
        threads: PyTorch threads.
        precision: "bf16" runs the networks of both sides under autocast.
        backbone: "r50" is transformers' own ResNet-50, "r50-timm" the same through timm.
        data: folder of CamVid, for the parts `accuracy` and `ablation`, or of the recipe's data.
        compile_minutes: time limit of `torch.compile` for the compiled peer, the third side; 0 leaves it out.
        runtimes: whether `prediction` also runs our exported model in ONNX Runtime and OpenVINO.
        seed: seed of weights and images.
        budget: processor seconds of each training of the part `ablation`.
        seeds: trainings of each of its configurations.
        output: folder for results.
        recipe: of the part `ablation`.
        vit_weights: weight file of DINOv2 ViT-S, for the part `ablation`; None compares parts of the recipe instead.
    """

    rounds: int | None = None
    threads: int = 2
    precision: Precision = "fp32"
    backbone: Backbone = "r50"
    data: Path | None = None
    compile_minutes: float = 2
    runtimes: bool = True
    seed: int = 0
    budget: float = 600
    seeds: int = 2
    output: Path | None = None
    recipe: LiteRecipe = "camvid-lite"
    vit_weights: Path | None = None


@dataclass(frozen=True)
class Row:
    """The timings of one operation on both sides.

    Attributes:
        part: the benchmark, e.g. "prediction".
        piece: a component of it, or "whole".
        setting: sizes, precision and threads.
        peer: name and version of the other implementation.
        maskwright: timing of maskwright.
        theirs: timing of the peer; None if there is none.
        others: timings of further sides by their names, such as the compiled peer or an exported model in its runtime.
        clock: "wall" or "processor" seconds.
        memory: peak megabytes (10^6 bytes) of a process that does nothing else, ours and theirs.
        roofline: seconds that the floating-point operations of our side take at this machine's matrix-product rate.
    """

    part: str
    piece: str
    setting: str
    peer: str
    maskwright: Timing
    theirs: Timing | None
    others: dict[str, Timing] = field(default_factory=dict)
    clock: Literal["wall", "processor"] = "wall"
    memory: tuple[float, float] | None = None
    roofline: float | None = None

    @property
    def ratio(self) -> float | None:
        """The peer's median divided by ours."""
        return self.theirs.median / self.maskwright.median if self.theirs else None

    def to_json(self) -> dict:
        """Return all values, with medians, minima and ratio, for `json.dumps`."""
        values: dict[str, Any] = asdict(self) | {"ratio": self.ratio}
        sides = [("maskwright", self.maskwright, values), ("theirs", self.theirs, values)]
        for name, side, place in [*sides, *((*item, values["others"]) for item in self.others.items())]:
            if side:
                place[name] |= {"median": side.median, "minimum": side.minimum}
        return values


def compared(
    part: str,
    piece: str,
    setting: str,
    peer: str,
    sides: Sequence[dict[str, Timing]],
    name: str = WHOLE,
    others: Sequence[str] = (),
) -> Row:
    """Make a row of wall-clock times from the timing `name` of ours, theirs and, by their names, of other sides."""
    ours, theirs, *more = sides
    found = {other: side[name] for other, side in zip(others, more, strict=True) if name in side}
    return Row(part, piece, setting, peer, ours[name], theirs[name], found)


@dataclass(frozen=True)
class Part:
    """The rows of one benchmark, and notes.

    Attributes:
        rows: timings.
        notes: one line each.
        scores: a table of anything else: cells by their column, the same columns in each row.
    """

    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    scores: list[dict[str, str]] = field(default_factory=list)


def table(parts: Sequence[Part]) -> str:
    """Return all rows as Markdown tables, each followed by its notes."""
    return "\n\n".join(_block(part) for part in parts)


def _block(part: Part) -> str:
    lines, settings = [], []
    if part.rows:
        first, others = part.rows[0], list(dict.fromkeys(name for row in part.rows for name in row.others))
        head = ["", "ours s", "min", f"{first.peer} s", "min", "ratio"]
        head += [title for name in others for title in (f"{name} s", "min", "ratio")]
        head += ["ours MB", "theirs MB", "x roofline"]
        lines += [f"{first.part}: {first.setting}, {first.clock} time", ""]
        lines += [*_markdown(_filled_columns([head, *(_cells(row, others) for row in part.rows)])), ""]
        settings = [f"{row.piece}: {row.setting}" for row in part.rows if row.setting != first.setting]
    if part.scores:
        lines += [*_markdown([list(part.scores[0]), *(list(row.values()) for row in part.scores)]), ""]
    return "\n".join([*lines, *(f"- {note}" for note in [*settings, *part.notes])]).rstrip()


def _filled_columns(cells: list[list[str]]) -> list[list[str]]:
    """Return the first column, and those in which a row below the head has a value."""
    kept = [column for column in range(len(cells[0])) if not column or any(row[column] for row in cells[1:])]
    return [[row[column] for column in kept] for row in cells]


def _markdown(cells: list[list[str]]) -> list[str]:
    """Return the lines of a table; the first row is the head, and all columns but the first are right-aligned."""
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = []
    for row in [cells[0], ["-" * width for width in widths], *cells[1:]]:
        rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append(f"| {' | '.join([row[0].ljust(widths[0]), *rest])} |")
    return lines


def _cells(row: Row, others: Sequence[str]) -> list[str]:
    ours = row.maskwright
    cells = [row.piece, _number(ours.median, 3), _number(ours.minimum, 3)]
    for side in (row.theirs, *(row.others.get(name) for name in others)):
        values = (side.median, side.minimum, side.median / ours.median) if side else (None, None, None)
        cells += [_number(value, digits) for value, digits in zip(values, (3, 3, 2), strict=True)]
    memory = [_number(value, 0) for value in row.memory or (None, None)]
    roofline = ours.median / row.roofline if row.roofline else None
    return [*cells, *memory, _number(roofline, 2)]


def _number(value: float | None, digits: int) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" if digits < 3 or value >= 0.1 else f"{value:.5f}"


def chart(parts: Sequence[Part], path: Path, title: str) -> None:
    """Plot all ratios as a PNG, one bar per row."""
    from matplotlib.figure import Figure

    rows = [row for part in parts for row in part.rows if row.ratio]
    ratios = [row.ratio or 1.0 for row in rows]
    figure = Figure(figsize=(9, 1.2 + 0.34 * len(rows)), layout="constrained")
    axes = figure.subplots()
    colors = ["#1f6f8b" if row.piece == "whole" else "#9cc5d3" for row in rows]
    bars = axes.barh(range(len(rows)), [ratio - 1 for ratio in ratios], left=1, color=colors)
    axes.bar_label(bars, [f"{ratio:.1f}" for ratio in ratios], padding=3, fontsize=8)
    axes.axvline(1, color="#b3424a", linewidth=1)
    names = [row.part if row.piece == "whole" else f"{row.part}: {row.piece}" for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(min(0.8, *ratios) * 0.8, max(ratios) * 1.6)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("times as fast as the peer (medians of alternating rounds)")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", dpi=120)
