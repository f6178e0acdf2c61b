"""Between foreign names and ours: recognise a layout by its keys, and rename every entry or say which cannot be."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from maskwright.checkpoints.key_maps.detectron2 import DETECTRON2
from maskwright.checkpoints.key_maps.easycv import EASYCV
from maskwright.checkpoints.key_maps.key_map import Layout, State
from maskwright.checkpoints.key_maps.openmmlab import OPENMMLAB
from maskwright.checkpoints.key_maps.semask import SEMASK, SEMASK_FAPN
from maskwright.checkpoints.key_maps.transformers import TRANSFORMERS
from maskwright.errors import CheckpointError, printable

# The first whose mark is found: models of SeMask have those of detectron2, too.
LAYOUTS = (SEMASK_FAPN, SEMASK, DETECTRON2, TRANSFORMERS, OPENMMLAB, EASYCV)

_INSERTED = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")  # by PyTorch, at any depth


@dataclass(frozen=True)
class Translation:
    """A foreign state dict in our names.

    Attributes:
        layout: where it came from.
        state: our name to tensor.
        dropped: (key, reason) of each entry left out on purpose.
    """

    layout: str
    state: State
    dropped: list[tuple[str, str]]


def recognise(state: State, layouts: Iterable[Layout] = LAYOUTS) -> Layout | None:
    """The layout that one of the keys marks, whatever wrapper's name stands before it, or None."""
    return next((layout for layout in layouts if _prefixes(state, layout)), None)


def translate(state: State, layout: Layout) -> Translation:
    """Rename every entry of a foreign state dict.

    Names of wrappers before the keys (`module.`, `model.`, ...) are taken away. Where a file holds the model twice, as
    with an averaged copy, the plain one is taken.

    Raises:
        CheckpointError: an entry has no place here, or two entries claim the same one; all are listed.
    """
    prefix, *copies = _prefixes(state, layout) or [""]
    rules = _Rules(layout)
    dropped: list[tuple[str, str]] = []
    for original, tensor in state.items():
        key = _INSERTED.sub("", original)
        if any(key.startswith(copy) for copy in copies if copy.startswith(prefix)):
            dropped.append((original, "a second copy of the weights"))
        elif not key.startswith(prefix):
            dropped.append((original, f"not of the model, which is under '{prefix}'"))
        elif reason := rules.place(key.removeprefix(prefix), tensor, original):
            dropped.append((original, reason))
    return Translation(layout.name, rules.finish(), dropped)


def translate_back(state: State, layout: Layout) -> State:
    """Weights in our names as another implementation names, orders and splits them, with the buffers that it expects.

    Raises:
        CheckpointError: an entry has no place there; all are listed.
    """
    left = dict(state)
    for buffer in layout.buffers:
        for name in [name for name in state if re.fullmatch(buffer.beside, name)]:
            left.setdefault(re.sub(buffer.beside, buffer.name, name), buffer.make(state[name]))
    for change in layout.changes:
        left |= {name: change.undo(tensor) for name, tensor in left.items() if re.fullmatch(change.names, name)}
    written: State = {}
    for foreign, ours in layout.packed:
        pattern = _pattern(f"{ours}.query", tail=_TAIL)
        for match in [match for name in state if (match := pattern.fullmatch(name))]:
            names = [f"{_fill(ours, match)}.{part}.{match['tail']}" for part in ("query", "key", "value")]
            written[_fill(foreign, match) + match["tail"]] = torch.cat([left.pop(name) for name in names])
    for foreign, parts, ours in layout.joined:
        pattern = _pattern(ours, tail=_TAIL)
        for match in [match for name in state if (match := pattern.fullmatch(name))]:
            for part, tensor in zip(parts, left.pop(match.string).chunk(len(parts)), strict=True):
                written[f"{_fill(foreign, match, part)}.{match['tail']}"] = tensor
    rows = [(foreign, _pattern(ours)) for foreign, ours in layout.names]
    homeless = []
    for name, tensor in left.items():
        found = next(((foreign, match) for foreign, ours in rows if (match := ours.fullmatch(name))), None)
        if found is None:
            homeless.append(name)
        else:
            written[_fill(found[0], found[1]) + found[1]["tail"]] = tensor
    if homeless:
        raise CheckpointError(f"{layout.name} has no place for {len(homeless)} of its weights: {listing(homeless)}")
    return written


def listing(keys: Iterable[str], most: int = 12) -> str:
    """Keys for a message: the first of them, and how many more."""
    keys = [printable(key) for key in sorted(keys)]
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def _prefixes(state: State, layout: Layout) -> list[str]:
    """What stands before the layout's mark: nothing or whole words; plain weights come before averaged ones."""
    found = set()
    for mark in layout.marks:
        for key in state:
            prefix = _INSERTED.sub("", key).removesuffix(mark)
            if prefix + mark == _INSERTED.sub("", key) and (not prefix or prefix.endswith(".")):
                found.add(prefix)
    return sorted(found, key=lambda prefix: ("ema" in prefix or "teacher" in prefix, len(prefix), prefix))


@dataclass
class _Rules:
    """The rows of one layout, made ready, and what they have placed so far."""

    layout: Layout
    ours: State = field(default_factory=dict)
    parts: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # of joined tensors that are not whole yet
    unknown: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        layout = self.layout
        self.names = [(_pattern(foreign), ours) for foreign, ours in layout.names]
        self.packed = [(_pattern(foreign, tail=_TAIL), ours) for foreign, ours in layout.packed]
        self.joined = [(_pattern(foreign, parts, _TAIL), parts, ours) for foreign, parts, ours in layout.joined]
        self.renamed = [(re.compile(pattern), replacement) for pattern, replacement in layout.renamed]

    def place(self, key: str, tensor: Tensor, original: str) -> str | None:
        """Put one entry where it belongs; returns the reason if it belongs nowhere."""
        for pattern, replacement in self.renamed:
            key = pattern.sub(replacement, key)
        if reason := next((why for pattern, why in self.layout.dropped if re.fullmatch(pattern, key)), None):
            return reason
        for pattern, ours in self.packed:
            if match := pattern.fullmatch(key):
                if not tensor.ndim or len(tensor) % 3:
                    found = tuple(tensor.shape)
                    raise CheckpointError(f"'{original}' of shape {found} is not query, key and value in one")
                for name, part in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                    self._put(f"{_fill(ours, match)}.{name}.{match['tail']}", part)
                return None
        for pattern, parts, ours in self.joined:
            if match := pattern.fullmatch(key):
                self._collect(f"{_fill(ours, match)}.{match['tail']}", parts, match["part"], tensor)
                return None
        for pattern, ours in self.names:
            if match := pattern.fullmatch(key):
                self._put(_fill(ours, match) + match["tail"], tensor)
                return None
        self.unknown.append(original)
        return None

    def finish(self) -> State:
        """Everything in our names."""
        if self.unknown:
            raise CheckpointError(
                f"{len(self.unknown)} entries of the {self.layout.name} checkpoint have no place here: "
                f"{listing(self.unknown)}"
            )
        if self.parts:
            halves = [f"{name} has only {', '.join(parts)}" for name, parts in self.parts.items()]
            raise CheckpointError(f"tensors of the {self.layout.name} checkpoint are not whole: {listing(halves)}")
        return self.ours

    def _collect(self, name: str, parts: tuple[str, ...], part: str, tensor: Tensor) -> None:
        found = self.parts.setdefault(name, {})
        if part in found:
            self._refuse_twice(name)
        found[part] = tensor
        if len(found) == len(parts):
            self._put(name, torch.cat([self.parts[name][each] for each in parts]))
            del self.parts[name]

    def _put(self, name: str, tensor: Tensor) -> None:
        if name in self.ours:
            self._refuse_twice(name)
        for change in self.layout.changes:
            if re.fullmatch(change.names, name):
                tensor = change.change(tensor)
        self.ours[name] = tensor

    def _refuse_twice(self, name: str) -> None:
        raise CheckpointError(
            f"two entries of the {self.layout.name} checkpoint become '{name}': old and new names mixed"
        )


_TAIL = r"\.?(?P<tail>weight|bias)"  # of tensors that are split or joined


def _pattern(prefix: str, parts: tuple[str, ...] = (), tail: str = r"(?P<tail>(\..*)?)") -> re.Pattern[str]:
    escaped = re.escape(prefix).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{j\}", r"(?P<j>\d+)")
    return re.compile(escaped.replace(r"\{part\}", f"(?P<part>{'|'.join(parts)})") + tail)


def _fill(template: str, match: re.Match[str], part: str = "") -> str:
    return template.format(
        part=part, **{name: value for name, value in match.groupdict().items() if name in ("i", "j")}
    )
