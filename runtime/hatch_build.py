"""Collect the files of maskwright-runtime: modules of maskwright that need no PyTorch, under another name.

They are the modules that `maskwright_runtime/*.py` beside this file import, directly or not. In the copies, imports of
`maskwright` become imports of `maskwright_runtime`, so that both packages can be installed together.
"""

from __future__ import annotations

import ast
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NAME = "maskwright_runtime"
_IMPORT = re.compile(r"^(\s*)(from|import) maskwright\b", re.MULTILINE)


class CollectModules(BuildHookInterface):
    """Adds the files to a wheel, and to a source distribution, from which wheels are then built."""

    def initialize(self, version: str, build_data: dict) -> None:
        """Write the copies to a temporary folder, and add that."""
        root = Path(self.root)
        source = root.parent / "src"
        if not (source / "maskwright").is_dir():  # in a source distribution, which has the copies
            return
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        for path, target in collect(root / NAME, source).items():
            copy = folder / target
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(_IMPORT.sub(rf"\1\2 {NAME}", path.read_text(encoding="utf-8")), encoding="utf-8")
            build_data["force_include"][str(copy)] = target
        build_data["force_include"][str(root.parent / "LICENSE")] = f"{NAME}/LICENSE"

    def finalize(self, version: str, build_data: dict, artifact_path: str) -> None:
        """Remove the temporary folder."""
        if hasattr(self, "_folder"):
            self._folder.cleanup()


def collect(package: Path, source: Path) -> dict[Path, str]:
    """Return where each file of the distribution comes from.

    Args:
        package: the folder with the distribution's own modules.
        source: the folder with `maskwright`.
    """
    found = {path: f"{NAME}/{path.name}" for path in sorted(package.glob("*.py"))}
    waiting = list(found)
    while waiting:
        for module in _imports(waiting.pop()):
            for path in _files(module, source):
                if path not in found:
                    found[path] = f"{NAME}/{path.relative_to(source / 'maskwright').as_posix()}"
                    waiting.append(path)
    return found


def _imports(path: Path) -> Iterator[str]:
    """Yield the names of maskwright that a file imports, also inside functions, but not for type checkers."""
    for node in _nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "maskwright":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(tree):
        if not (isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING"):
            yield child
            yield from _nodes(child)


def _files(name: str, source: Path) -> Iterator[Path]:
    """Yield the file of a module, or of the module that a name is in, and the `__init__.py` of its folders."""
    path = source.joinpath(*name.split("."))
    if not path.with_suffix(".py").is_file():
        path = path.parent
    yield path.with_suffix(".py")
    for folder in path.parents:
        if folder == source / "maskwright":
            return
        yield folder / "__init__.py"
