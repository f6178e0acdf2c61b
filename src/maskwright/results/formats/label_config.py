"""Label Studio's labeling configuration: written for a model, and read for the control that shows its results.

Format: https://labelstud.io/tags. A label may name the classes it stands for in `predicted_values`, as in Label
Studio's own model backends: `<Label value="Vehicle" predicted_values="car,bus"/>`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple, get_args
from xml.etree import ElementTree
from xml.sax.saxutils import quoteattr

from maskwright.errors import MaskwrightError, printable
from maskwright.results.own_files import XML_MARK
from maskwright.structures.category import Category

ControlKind = Literal["BrushLabels", "PolygonLabels"]

_WHERE = "the labeling config"


class Control(NamedTuple):
    """A tag that shows masks as regions with labels.

    Attributes:
        kind: name of the tag.
        name: of the control.
        to_name: of the image that it labels.
        labels: the label of each class that has one, by the name of the class.
        image_key: of the image in the data of a task.
    """

    kind: ControlKind
    name: str
    to_name: str
    labels: dict[str, str]
    image_key: str = "image"


def write_config(categories: Iterable[Category], control: ControlKind) -> str:
    """Return a labeling configuration with the classes and colors of a model."""
    labels = "".join(
        f'    <Label value={quoteattr(category.name)} background="#{bytes(category.color).hex()}"/>\n'
        for category in categories
    )
    image = '  <Image name="image" value="$image"/>\n'
    return f'{XML_MARK}<View>\n{image}  <{control} name="segments" toName="image">\n{labels}  </{control}>\n</View>\n'


def read_control(config: str) -> Control:
    """Return the first `BrushLabels` of a labeling configuration or, without one, the first `PolygonLabels`.

    Raises:
        MaskwrightError: it is not XML, or has no such control for an image.
    """
    if "<!DOCTYPE" in config.upper():
        raise MaskwrightError("has a document type", where=_WHERE, remedy="remove <!DOCTYPE>")
    try:
        root = ElementTree.fromstring(config)
    except (ElementTree.ParseError, ValueError):
        raise MaskwrightError("is not valid XML", where=_WHERE) from None
    images = {image.get("name"): image.get("value", "") for image in root.iter("Image")}
    for kind in get_args(ControlKind):
        for tag in root.iter(kind):
            name, to_name = tag.get("name"), tag.get("toName")
            key = images.get(to_name, "")
            if name and to_name and key.startswith("$"):
                return Control(kind, name, to_name, _read_labels(tag), key[1:])
    raise MaskwrightError(
        f"has no {' or '.join(get_args(ControlKind))} for an image",
        where=_WHERE,
        remedy="add one, such as that of `maskwright predict --format label-studio`",
    )


def _read_labels(tag: ElementTree.Element) -> dict[str, str]:
    """Return the label of each class.

    Raises:
        MaskwrightError: a class has two labels.
    """
    labels: dict[str, str] = {}
    for label in tag.iter("Label"):
        value = label.get("value", "")
        aliases = (alias.strip() for alias in label.get("predicted_values", "").split(","))
        for name in {value, *aliases} - {""}:
            if labels.setdefault(name, value) != value:
                raise MaskwrightError(f"two labels stand for the class {printable(name)}", where=_WHERE)
    return labels
