"""Translate state dicts between another implementation's keys and ours: find its key map, then rename every entry."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from maskwright.checkpoints.key_maps.detectron2 import DETECTRON2
from maskwright.checkpoints.key_maps.easycv import EASYCV
from maskwright.checkpoints.key_maps.eomt import EOMT_KEY_MAPS
from maskwright.checkpoints.key_maps.key_map import KeyMap, State
from maskwright.checkpoints.key_maps.openmmlab import OPENMMLAB
from maskwright.checkpoints.key_maps.semask import SEMASK, SEMASK_FAPN
from maskwright.checkpoints.key_maps.transformers import TRANSFORMERS
from maskwright.errors import CheckpointError, printable_list

# The first with a matching signature counts: SeMask's models also match that of detectron2.
KEY_MAPS = (SEMASK_FAPN, SEMASK, DETECTRON2, TRANSFORMERS, OPENMMLAB, EASYCV, *EOMT_KEY_MAPS)

_QKV = ("query", "key", "value")
_INSERTED = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")  # by PyTorch, at any depth


@dataclass(frozen=True)
class Translation:
    """A foreign state dict in our names.

    Attributes:
        state: our names to tensors.
        dropped: (key, reason) of each entry dropped on purpose.
    """

    state: State
    dropped: list[tuple[str, str]]


def find_key_map(state: State, key_maps: Iterable[KeyMap] = KEY_MAPS) -> KeyMap | None:
    """Return the first key map with a signature among the keys, after any wrapper's prefix; None if none has."""
    return next((key_map for key_map in key_maps if _wrapper_prefixes(state, key_map)), None)


def translate(state: State, key_map: KeyMap) -> Translation:
    """Rename every entry of a foreign state dict.

    Prefixes of wrappers (`module.`, `model.`, ...) are removed. If a file has the model twice, as with an averaged
    copy, the plain one is used.

    Raises:
        CheckpointError: an entry has no counterpart here, or two entries have the same; all are listed.
    """
    prefix, *copies = _wrapper_prefixes(state, key_map) or [""]
    translator = _Translator(key_map)
    dropped: list[tuple[str, str]] = []
    for original, tensor in state.items():
        key = _INSERTED.sub("", original)
        if any(key.startswith(copy) for copy in copies if copy.startswith(prefix)):
            dropped.append((original, "a second copy of the weights"))
        elif not key.startswith(prefix):
            dropped.append((original, f"not of the model, which is under '{prefix}'"))
        elif reason := translator.add(key.removeprefix(prefix), tensor, original):
            dropped.append((original, reason))
    return Translation(translator.finish(), dropped)


def translate_back(state: State, key_map: KeyMap) -> State:
    """Rename, reorder and split weights of ours for another implementation, and add the buffers that it expects.

    Raises:
        CheckpointError: an entry has no counterpart there; all are listed.
    """
    remaining = dict(state)
    for buffer in key_map.buffers:
        for name in [name for name in state if re.fullmatch(buffer.pattern, name)]:
            remaining.setdefault(re.sub(buffer.pattern, buffer.name, name), buffer.make(state[name]))
    for conversion in key_map.conversions:
        for name in [name for name in remaining if re.fullmatch(conversion.pattern, name)]:
            remaining[name] = conversion.save(remaining[name])
    written: State = {}
    for foreign, ours in key_map.split_qkv:
        pattern = _pattern(f"{ours}.query", tail=_TAIL)
        for match in [match for name in state if (match := pattern.fullmatch(name))]:
            names = [f"{_fill(ours, match)}.{part}.{match['tail']}" for part in _QKV]
            written[_fill(foreign, match) + match["tail"]] = torch.cat([remaining.pop(name) for name in names])
    for foreign, parts, ours in key_map.fused_qkv:
        pattern = _pattern(ours, tail=_TAIL)
        for match in [match for name in state if (match := pattern.fullmatch(name))]:
            for part, tensor in zip(parts, remaining.pop(match.string).chunk(len(parts)), strict=True):
                written[f"{_fill(foreign, match, part)}.{match['tail']}"] = tensor
    rows = [(foreign, _pattern(ours)) for foreign, ours in key_map.prefixes]
    unmatched = []
    for name, tensor in remaining.items():
        found = next(((foreign, match) for foreign, ours in rows if (match := ours.fullmatch(name))), None)
        if found is None:
            unmatched.append(name)
        else:
            written[_fill(found[0], found[1]) + found[1]["tail"]] = tensor
    if unmatched:
        raise CheckpointError(f"{key_map.name} has no name for {len(unmatched)} weights: {printable_list(unmatched)}")
    return written


def _wrapper_prefixes(state: State, key_map: KeyMap) -> list[str]:
    """Return the prefixes, empty or whole words, before the signatures of a key map; averaged weights come last."""
    found = set()
    for signature in key_map.signatures:
        for key in state:
            plain = _INSERTED.sub("", key)
            prefix = plain.removesuffix(signature)
            if prefix + signature == plain and (not prefix or prefix.endswith(".")):
                found.add(prefix)
    return sorted(found, key=lambda prefix: ("ema" in prefix or "teacher" in prefix, len(prefix), prefix))


class _Translator:
    """The compiled rows of one key map, and the entries translated so far."""

    def __init__(self, key_map: KeyMap) -> None:
        self.key_map = key_map
        self.state: State = {}
        self.incomplete: dict[str, dict[str, Tensor]] = {}  # parts of fused tensors
        self.unknown: list[str] = []
        self.prefixes = [(_pattern(foreign), ours) for foreign, ours in key_map.prefixes]
        self.split_qkv = [(_pattern(foreign, tail=_TAIL), ours) for foreign, ours in key_map.split_qkv]
        self.fused_qkv = [(_pattern(foreign, parts, _TAIL), parts, ours) for foreign, parts, ours in key_map.fused_qkv]
        self.renames = [(re.compile(pattern), replacement) for pattern, replacement in key_map.renames]

    def add(self, key: str, tensor: Tensor, original: str) -> str | None:
        """Translate one entry; return the reason if it is dropped on purpose."""
        for pattern, replacement in self.renames:
            key = pattern.sub(replacement, key)
        if reason := next((why for pattern, why in self.key_map.dropped if re.fullmatch(pattern, key)), None):
            return reason
        for pattern, ours in self.split_qkv:
            if match := pattern.fullmatch(key):
                self._split(f"{_fill(ours, match)}.{{}}.{match['tail']}", tensor, original)
                return None
        for pattern, parts, ours in self.fused_qkv:
            if match := pattern.fullmatch(key):
                self._fuse(f"{_fill(ours, match)}.{match['tail']}", parts, match["part"], tensor)
                return None
        for pattern, ours in self.prefixes:
            if match := pattern.fullmatch(key):
                self._put(_fill(ours, match) + match["tail"], tensor)
                return None
        self.unknown.append(original)
        return None

    def finish(self) -> State:
        """Return all weights in our names."""
        if self.unknown:
            raise CheckpointError(
                f"{len(self.unknown)} entries of the {self.key_map.name} checkpoint are unknown: "
                f"{printable_list(self.unknown)}"
            )
        if self.incomplete:
            found = [f"{name} has only {', '.join(parts)}" for name, parts in self.incomplete.items()]
            raise CheckpointError(f"the {self.key_map.name} checkpoint is incomplete: {printable_list(found)}")
        return self.state

    def _split(self, name: str, tensor: Tensor, original: str) -> None:
        if not tensor.ndim or len(tensor) % 3:
            raise CheckpointError(
                f"'{original}' of shape {tuple(tensor.shape)} is not query, key and value concatenated"
            )
        for part, values in zip(_QKV, tensor.chunk(3), strict=True):
            self._put(name.format(part), values)

    def _fuse(self, name: str, parts: tuple[str, ...], part: str, tensor: Tensor) -> None:
        found = self.incomplete.setdefault(name, {})
        if part in found:
            self._refuse_twice(name)
        found[part] = tensor
        if len(found) == len(parts):
            self._put(name, torch.cat([found[each] for each in parts]))
            del self.incomplete[name]

    def _put(self, name: str, tensor: Tensor) -> None:
        if name in self.state:
            self._refuse_twice(name)
        for conversion in self.key_map.conversions:
            if re.fullmatch(conversion.pattern, name):
                tensor = conversion.load(tensor)
        self.state[name] = tensor

    def _refuse_twice(self, name: str) -> None:
        raise CheckpointError(
            f"two entries of the {self.key_map.name} checkpoint become '{name}': old and new names are mixed"
        )


_TAIL = r"\.?(?P<tail>weight|bias)"  # of tensors that are split or fused


def _pattern(prefix: str, parts: tuple[str, ...] = (), tail: str = r"(?P<tail>(\..*)?)") -> re.Pattern[str]:
    escaped = re.escape(prefix).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{j\}", r"(?P<j>\d+)")
    return re.compile(escaped.replace(r"\{part\}", f"(?P<part>{'|'.join(parts)})") + tail)


def _fill(template: str, match: re.Match[str], part: str = "") -> str:
    """Fill the placeholders of a prefix with the groups of `match`."""
    numbers = {name: value for name, value in match.groupdict().items() if name in ("i", "j")}
    return template.format(part=part, **numbers)
