"""Pictures for people: a segmentation over its image, training curves, and the report of a run.

Every overlay is painted through one lookup table: the segments become one map of small numbers, each number has a
colour and an opacity, and a single blend does the rest, for three hundred segments at the cost of three. The report is
one HTML file that opens offline: its page is `report.html` beside this file, filled in here.
"""

from __future__ import annotations

import base64
import colorsys
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import PIL.Image
from PIL import ImageDraw, ImageFont

from maskwright.curves import is_share, run_figure, save_png
from maskwright.display import displayable
from maskwright.logs import read_rows
from maskwright.rle import number_map
from maskwright.runs import paint_runs
from maskwright.structures import Category, Segmentation, Target, Task

GOLDEN = 0.618034  # steps of the golden section spread hues so that near neighbours in a list differ most
MOST_LABELS = 40  # more than that cannot be read in one picture
BAND = 2**20  # pixels that are blended together
REPORT_SIDE = 1024  # pixels; the report's pictures are scaled down to it


def overlay(
    segmentation: Segmentation,
    image: np.ndarray | PIL.Image.Image | None = None,
    alpha: float = 0.5,
    least_score: float = 0.3,
) -> PIL.Image.Image:
    """The segments painted over the image, with names and scores where they fit.

    Semantic: the colours of the classes. Panoptic: the same, but the segments of one thing class differ in shade.
    Instance: every instance has its own colour; where two overlap the higher score lies on top. Both are outlined.

    Args:
        segmentation: what is painted; without segments the image comes back unchanged.
        image: (H, W, 3) RGB or (H, W) gray, uint8, of the segmentation's size; None takes `segmentation.image`, made
            visible where it has other channels.
        alpha: opacity of the segments, 0..1.
        least_score: instances below it are left out, since a model always names its best `top_k`, however weak.

    Raises:
        ValueError: there is no image, its shape does not fit, or alpha is out of range.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}, expected 0..1")
    if image is None and segmentation.image is not None:
        image = displayable(segmentation.image)
    pixels = _pixels(image, segmentation.size)
    segment_numbers = _number_map(segmentation, least_score)
    contours = segmentation.task != "semantic"
    picture = PIL.Image.fromarray(_blend(pixels, segment_numbers, _colors(segmentation), alpha, contours))
    _write_labels(picture, segmentation, segment_numbers)
    return picture


def paint_target(
    target: Target, image: np.ndarray | PIL.Image.Image, categories: Sequence[Category], task: Task
) -> PIL.Image.Image:
    """The ground truth in the look of `overlay`; pixels without an object stay bare.

    Args:
        target: id maps of the image's size, on any device.
        image: as in `overlay`.
        categories: what the target's labels mean.
        task: "semantic" paints classes, "instance" the things, "panoptic" every segment.

    Raises:
        ValueError: the image's size is not the target's.
    """
    target, categories = target.to("cpu"), tuple(categories)
    height, width = target.id_maps.shape[-2:]
    if task == "semantic":
        # Bare pixels get a number that is nobody's label.
        bare = len(categories)
        label_map = target.label_map(ignore_index=bare).numpy()
        labels = np.unique(label_map[label_map != bare])
        truth = Segmentation(task, (height, width), categories, labels, label_map=label_map)
    elif task == "panoptic":
        segment_map = target.id_maps.amax(0).numpy()
        truth = Segmentation(task, (height, width), categories, target.labels.numpy(), segment_map=segment_map)
    else:
        is_thing = [categories[label].is_thing for label in target.labels.tolist()]
        target = target.select(target.is_crowd.new_tensor(is_thing))
        masks = target.masks.numpy()
        truth = Segmentation(task, (height, width), categories, target.labels.numpy(), instance_masks=masks)
    return overlay(truth, image)


def side_by_side(pictures: Sequence[PIL.Image.Image], titles: Sequence[str]) -> PIL.Image.Image:
    """The pictures in one row, each under its title, scaled to the height of the tallest.

    Raises:
        ValueError: no picture, or another number of titles than of pictures.
    """
    if not pictures or len(pictures) != len(titles):
        raise ValueError(f"{len(pictures)} pictures and {len(titles)} titles; expected one title per picture")
    height = max(picture.height for picture in pictures)
    gap, font_size = max(8, height // 60), max(14, height // 30)
    font, strip = ImageFont.load_default(font_size), 2 * gap + font_size
    scaled = [p.convert("RGB").resize((max(1, round(p.width * height / p.height)), height)) for p in pictures]
    row = PIL.Image.new("RGB", (sum(p.width + gap for p in scaled) + gap, height + strip + gap), "white")
    pen, left = ImageDraw.Draw(row), gap
    for picture, title in zip(scaled, titles, strict=True):
        pen.text((left, strip // 2), _shorten(title, font, picture.width), "black", font, anchor="lm")
        row.paste(picture, (left, strip))
        left += picture.width + gap
    return row


def curves(log_file: Path, output: Path) -> None:
    """Draw a run's log: loss and its terms, learning rate, gradient norm and metrics over the steps, as a PNG.

    Raw values are pale, their moving average over a thirtieth of the run is strong. A run that was resumed may have
    logged a step twice: the later row counts. A last line that is still being written is left out.

    Args:
        log_file: `log.jsonl` of a run; it may hold no row yet.
        output: the PNG.
    """
    save_png(run_figure(read_rows(log_file)), output)


def report(
    run: Path,
    output: Path,
    *,
    recipe_yaml: str,
    evaluation: Mapping[str, Any],
    pictures: Sequence[tuple[Any, ...]],
    categories: Sequence[Category],
    facts: Mapping[str, Any],
) -> None:
    """Write one HTML file about a run that opens offline, on a phone and in the dark.

    Args:
        run: folder of the run, named in the title; its `log.jsonl` becomes the curves, where there is one.
        output: the HTML file.
        recipe_yaml: the resolved recipe.
        evaluation: metrics. Floats in 0..1 are shown in percent, None as no data, the first one largest; a mapping of
            mappings, such as "per_class", becomes a table. Empty: no metrics.
        pictures: (title, prediction, truth) or (title, prediction, truth, plain image), pictures of PIL; after those,
            the semantic maps of a backbone's stages, fine to coarse, in a row of their own.
        categories: for the colours beside the class names.
        facts: what else should be known of the run: device, versions, duration, git revision.
    """
    tables = {name: rows for name, rows in evaluation.items() if _is_table(rows)}
    colors = {category.name: category.color for category in categories}
    rows = read_rows(run / "log.jsonl")
    page = Template(resources.files("maskwright").joinpath("report.html").read_text(encoding="utf-8")).substitute(
        title=escape(run.resolve().name),
        headlines="".join(_headline(name, value) for name, value in evaluation.items() if name not in tables),
        curves=_section("Curves", _chart(rows) if rows else ""),
        tables="".join(_section(f"{_title(name)} (%)", _table(rows, colors)) for name, rows in tables.items()),
        pictures=_section("Pictures", "".join(_picture_row(*row) for row in pictures)),
        facts=_section("Run", _facts(facts)),
        recipe=_section("Recipe", f"<pre>{escape(recipe_yaml)}</pre>" if recipe_yaml else ""),
    )
    output.write_text(page, encoding="utf-8")


def _shorten(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    """The text, with its end replaced by an ellipsis if it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _pixels(image: np.ndarray | PIL.Image.Image | None, size: tuple[int, int]) -> np.ndarray:
    """The image as (H, W, 3) uint8 RGB, checked."""
    if image is None:
        raise ValueError("this result holds no image to paint over, expected one of its size. Pass it: overlay(image)")
    pixels = np.asarray(image.convert("RGB") if isinstance(image, PIL.Image.Image) else image)
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    if pixels.shape != (*size, 3) or pixels.dtype != np.uint8:
        raise ValueError(
            f"the image is {pixels.shape} {pixels.dtype}, but the segments need ({size[0]}, {size[1]}, 3) uint8. "
            "Pass the image that was segmented, at its original size"
        )
    return pixels


def _number_map(segmentation: Segmentation, least_score: float) -> np.ndarray:
    """(H, W) int32: 0 is bare, n is segment number n-1; overlapping instances go by score."""
    if segmentation.task != "instance":
        return number_map(segmentation)
    numbers = np.zeros(segmentation.size, np.int32)
    scores = np.ones(len(segmentation)) if segmentation.scores is None else segmentation.scores
    boxes = segmentation.boxes.astype(int)
    for i in np.argsort(scores, kind="stable"):
        if scores[i] >= least_score:
            x0, y0, x1, y1 = boxes[i]
            if segmentation.instance_runs is not None:
                mask = paint_runs(segmentation.instance_runs[i], (y0, x0, y1, x1), segmentation.size[0])
            else:
                mask = segmentation.masks[i, y0:y1, x0:x1]
            numbers[y0:y1, x0:x1][mask] = i + 1
    return numbers


def _colors(segmentation: Segmentation) -> np.ndarray:
    """(N, 3) uint8 RGB, one colour per segment."""
    colors, seen = np.zeros((len(segmentation), 3), np.uint8), {}
    for i, label in enumerate(segmentation.labels.tolist()):
        category = segmentation.categories[label]
        number = seen[label] = seen.get(label, -1) + 1
        if segmentation.task == "instance":
            colors[i] = _distinct(i)
        elif segmentation.task == "panoptic" and category.is_thing:
            colors[i] = _shade(category.color, number)
        else:
            colors[i] = category.color
    return colors


def _distinct(number: int) -> tuple[int, int, int]:
    """Colour `number` of an endless list of vivid ones."""
    return _rgb(0.58 + number * GOLDEN, (0.85, 0.62, 1.0)[number % 3], (1.0, 0.85)[number // 3 % 2])


def _shade(color: tuple[int, int, int], number: int) -> tuple[int, int, int]:
    """The class's own colour for number 0, then neighbours of it in hue, strength and brightness."""
    if number == 0:
        return color
    hue, strength, brightness = colorsys.rgb_to_hsv(*(channel / 255 for channel in color))
    sway = number * GOLDEN % 1 - 0.5
    step = (0.75, 1.0, 0.85, 0.65)[number % 4]
    return _rgb(hue + 0.16 * sway, max(0.35, strength * (1 - 0.4 * abs(sway))), max(0.4, brightness) * step)


def _rgb(hue: float, strength: float, brightness: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, strength, brightness)
    return round(255 * red), round(255 * green), round(255 * blue)


def _blend(pixels: np.ndarray, numbers: np.ndarray, colors: np.ndarray, alpha: float, contours: bool) -> np.ndarray:
    """(H, W, 3) uint8. The table holds bare, the segments' insides, bare again, and the segments' contours."""
    count = len(colors) + 1
    weights = np.zeros(2 * count, np.uint16)  # of 256
    weights[1:count], weights[count + 1 :] = round(256 * alpha), 256
    paint = np.zeros((2 * count, 3), np.uint16)
    paint[1:count] = paint[count + 1 :] = colors
    paint *= weights[:, None]
    blended, height = np.empty_like(pixels), max(1, BAND // max(1, numbers.shape[1]))
    for start in range(0, len(numbers), height):
        band, above = slice(start, start + height), min(start, 1)
        entries = numbers[band].astype(np.int64)
        if contours:
            edges = _edges(numbers[start - above : start + height + 1])[above:]
            entries += count * edges[: len(entries)]
        blended[band] = (pixels[band] * (256 - weights[entries])[..., None] + paint[entries]) >> 8
    return blended


def _edges(numbers: np.ndarray) -> np.ndarray:
    """(H, W) bool: painted pixels that touch another segment or a bare pixel."""
    edges = np.zeros(numbers.shape, bool)
    across, down = numbers[:, 1:] != numbers[:, :-1], numbers[1:] != numbers[:-1]
    edges[:, 1:] |= across
    edges[:, :-1] |= across
    edges[1:] |= down
    edges[:-1] |= down
    return edges & (numbers > 0)


def _write_labels(picture: PIL.Image.Image, segmentation: Segmentation, numbers: np.ndarray) -> None:
    """Write names into the largest segments, in place, where the text lies mostly inside and the place is free."""
    font_size = max(11, min(picture.size) // 42)  # pixels
    font = ImageFont.load_default(font_size)
    pen = ImageDraw.Draw(picture, "RGBA")
    step = max(1, max(numbers.shape) // 256)  # places are sought on a coarse map
    coarse = numbers[::step, ::step]
    areas = np.bincount(coarse.ravel(), minlength=len(segmentation) + 1)[1:] * step**2
    taken: list[tuple[float, float, float, float]] = []
    for i in np.argsort(-areas, kind="stable")[:MOST_LABELS]:
        if areas[i] < 4 * font_size**2:
            break
        inside = coarse == i + 1
        for text in _texts(segmentation, i):
            width, height = font.getlength(text) + 6, 1.3 * font_size
            place = _roomiest(inside, height / step, width / step)
            if place is None:
                continue
            x, y = place[1] * step - width / 2, place[0] * step - height / 2
            x, y = max(0, min(x, picture.width - width)), max(0, min(y, picture.height - height))
            if any(x < x1 and x0 < x + width and y < y1 and y0 < y + height for x0, y0, x1, y1 in taken):
                continue
            taken.append((x, y, x + width, y + height))
            pen.rounded_rectangle(taken[-1], 3, fill=(0, 0, 0, 160))
            pen.text((x + width / 2, y + height / 2), text, "white", font, anchor="mm")
            break


def _roomiest(inside: np.ndarray, height: float, width: float) -> tuple[float, float] | None:
    """The centre (row, column) of a box of that size, or larger, that lies inside; None where most of none does.

    Of boxes up to four times as large the largest that fits tells where there is most room.
    """
    sums = np.zeros((inside.shape[0] + 1, inside.shape[1] + 1), np.int64)
    sums[1:, 1:] = inside.cumsum(0).cumsum(1)
    for factor, share in ((4, 1.0), (3, 1.0), (2, 1.0), (1.5, 1.0), (1, 1.0), (1, 0.85)):
        rows, columns = max(1, round(factor * height)), max(1, round(factor * width))
        if rows > inside.shape[0] or columns > inside.shape[1]:
            continue
        whole = sums[rows:, columns:] - sums[:-rows, columns:] - sums[rows:, :-columns] + sums[:-rows, :-columns]
        tops, lefts = np.nonzero(whole >= share * rows * columns)
        if len(tops):
            nearest = ((tops - tops.mean()) ** 2 + (lefts - lefts.mean()) ** 2).argmin()
            return tops[nearest] + rows / 2, lefts[nearest] + columns / 2
    return None


def _texts(segmentation: Segmentation, i: int) -> list[str]:
    """What may be written into segment i, the most telling first."""
    name = segmentation.names[i]
    return [name] if segmentation.scores is None else [f"{name} {segmentation.scores[i]:.0%}", name]


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(row, Mapping) for row in value.values())


def _figure_text(value: Any) -> str:
    """A metric as people read it."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if is_share(value):
        return f"{100 * value:.1f}"
    return f"{value:.4g}" if isinstance(value, float) else escape(str(value))


def _title(key: str) -> str:
    return escape(key.replace("_", " ").capitalize())


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def _headline(name: str, value: Any) -> str:
    unit = "<small>%</small>" if is_share(value) else ""
    return f'<div class="headline"><b>{_figure_text(value)}{unit}</b><span>{escape(name)}</span></div>'


def _table(rows: Mapping[str, Mapping[str, Any]], colors: Mapping[str, tuple[int, int, int]]) -> str:
    """A table with one row per class; cells with a share carry a bar."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join(
        f'<tr><th scope="row">{_swatch(colors.get(name))}{escape(str(name))}</th>'
        + "".join(_cell(row.get(column)) for column in columns)
        + "</tr>"
        for name, row in rows.items()
    )
    head = f'<thead><tr><th scope="col">class</th>{head}</tr></thead>'
    return f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>'


def _swatch(color: tuple[int, int, int] | None) -> str:
    return "" if color is None else '<i class="swatch" style="background:rgb({},{},{})"></i>'.format(*color)


def _cell(value: Any) -> str:
    if not is_share(value):
        return f"<td>{_figure_text(value)}</td>"
    return f'<td class="bar" style="--share:{100 * value:.1f}%">{_figure_text(value)}</td>'


def _picture_row(title: str, *pictures: PIL.Image.Image) -> str:
    """One image of the data set: each of its pictures with a caption."""
    stages = [f"semantic map of stage {number}" for number, _ in enumerate(pictures[3:], 1)]
    rows = (zip(("prediction", "truth", "image"), pictures, strict=False), zip(stages, pictures[3:], strict=True))
    figures = ("".join(_figure(title, caption, picture) for caption, picture in row) for row in rows)
    return f"<h3>{escape(title)}</h3>" + "".join(f'<div class="pictures">{row}</div>' for row in figures if row)


def _figure(title: str, caption: str, picture: PIL.Image.Image) -> str:
    image = f'<img alt="{caption} of {escape(title)}" src="{_picture_data(picture)}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _facts(facts: Mapping[str, Any]) -> str:
    items = "".join(f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items())
    return f"<dl>{items}</dl>" if items else ""


def _chart(rows: list[dict[str, Any]]) -> str:
    buffer = io.BytesIO()
    save_png(run_figure(rows), buffer, dots_per_inch=130)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<div class="wide"><img class="chart" alt="training curves" src="data:image/png;base64,{data}"></div>'


def _picture_data(picture: PIL.Image.Image) -> str:
    buffer, small = io.BytesIO(), picture.convert("RGB")
    small.thumbnail((REPORT_SIDE, REPORT_SIDE))
    small.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
