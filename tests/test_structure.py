"""The house: who may import whom, what is light to import, and what must not be written anywhere."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "maskwright"

# Each level may import the levels before it, never its own. A package (data, models, layouts) is one module here.
LEVELS = (
    ("errors", "runs", "stretches", "tiles", "block_masks", "log_files", "recipe_sections"),
    ("structures", "recipe", "device", "logs", "whole_files"),
    ("rle", "views", "bit_blocks", "display", "curves", "finite", "stopwatch"),
    ("models", "losses", "data", "postprocess", "results", "metrics", "draw", "layouts", "mosaics"),
    ("pickles", "average", "sharding", "timm_weights"),
    ("torch_files", "muon"),
    ("optimizer",),
    ("weight_files", "transformers_config", "submission"),
    ("sources",),
    ("zoo",),
    ("checkpoint", "catalog"),
    ("resumable", "destinations", "backbone_weights", "inference", "compiled", "step", "stall", "profiling"),
    (
        "run_folder",
        "evaluate",
        "predict",
        "convert",
        "check",
        "initial_weights",
        "compare",
        "plot",
        "doctor",
        "estimate",
        "interruption",
        "trackers",
    ),
    ("journal",),
    ("session",),
    ("train",),
    ("bench", "benchmark"),
    ("cli",),
    ("__main__",),
)
LEVEL = {module: number for number, level in enumerate(LEVELS) for module in level}

# What a result does with itself (`overlay`, `to_json`, `save`) lives above it and is imported when it is asked for.
EXCEPTIONS = {("structures", "draw"), ("structures", "results"), ("structures", "rle")}


def module_of(path: Path) -> str:
    """The module a file belongs to, as the table names it."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def sources() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node that runs; imports for type checkers do not."""
    for child in ast.iter_child_nodes(tree):
        if not is_type_checking(child):
            yield child
            yield from nodes(child)


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of each module of the package that a file imports, inside functions too."""
    for node in nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: a relative import"
            names = [node.module or ""]
            if node.module == "maskwright":
                names = [f"maskwright.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            first, _, rest = name.partition(".")
            if first == "maskwright" and rest.split(".")[0] in LEVEL:
                yield node.lineno, rest.split(".")[0]


def test_every_module_has_a_place_in_the_table():
    assert {module_of(path) for path in sources()} <= LEVEL.keys()


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_strictly_downward(path):
    own = module_of(path)
    wrong = [
        f"line {line}: {own} imports {other}"
        for line, other in imported(path)
        if other != own and LEVEL[other] >= LEVEL[own] and (own, other) not in EXCEPTIONS
    ]
    assert not wrong


def test_the_exceptions_are_inside_functions():
    tree = ast.parse((PACKAGE / "structures.py").read_text(encoding="utf-8"))
    top = [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert not [module for module in top if module and module.startswith("maskwright")]


def test_the_table_would_notice(tmp_path):
    lines = (
        "from maskwright import __version__, draw",
        "if TYPE_CHECKING:",
        "    from maskwright.train import train",
        "def later():",
        "    import maskwright.cli",
        "    from maskwright.data.image import load_image",
    )
    (tmp_path / "errors.py").write_text("\n".join(lines), encoding="utf-8")
    assert list(imported(tmp_path / "errors.py")) == [(1, "draw"), (5, "cli"), (6, "data")]


HEAVY = (
    "torch",
    "torchvision",
    "timm",
    "accelerate",
    "numpy",
    "pycocotools",
    "hotcoco",
    "matplotlib",
    "fastapi",
    "uvicorn",
)


def loaded_after(code: str) -> set[str]:
    """Which of the heavy packages a fresh Python has loaded after running the code."""
    report = f"{code}\nimport sys\nprint('loaded:', *[name for name in {HEAVY!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True)
    _, found, names = run.stdout.rpartition("loaded:")
    assert found, run.stdout
    return set(names.split())


@pytest.mark.parametrize(
    "code",
    [
        "import maskwright; maskwright.__version__; dir(maskwright)",
        "from maskwright import Recipe, load_recipe; load_recipe('demo')",
        "from maskwright.cli import app; app(['--help'], result_action='return_value', exit_on_error=False)",
    ],
    ids=["the package", "recipes", "--help"],
)
def test_light_things_load_nothing_heavy(code):
    assert loaded_after(code) == set()


def test_the_public_names_are_there():
    import maskwright

    assert maskwright.__all__ == ["Predictor", "Recipe", "Segmentation", "load_model", "load_recipe"]
    assert all(getattr(maskwright, name) is not None for name in maskwright.__all__)
    assert set(maskwright.__all__) <= set(dir(maskwright))
    with pytest.raises(AttributeError, match="no attribute 'load_modle'"):
        _ = maskwright.load_modle


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize(
    "path",
    [path for path in sources() if module_of(path) != "device"],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_only_device_py_names_a_vendor(path):
    vendors = {f"torch.{vendor}" for vendor in ("cuda", "npu", "mps", "xpu", "hpu", "mlu", "musa", "sdaa")}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = {dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    imports = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not (found | imports) & vendors
    moved = {
        node.func.attr for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }
    assert not moved & {"cuda", "npu", "mlu", "sdaa", "musa", "xpu"}  # tensor.cuda() and its like


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_says_what_it_is_for_and_printing_is_left_to_the_command_line(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree) or path.name == "__main__.py"
    if module_of(path) != "cli":
        prints = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Call) and dotted(node.func) == "print"]
        assert not prints


def texts() -> list[Path]:
    """Every text file that is or may be committed."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    names = listed.stdout.splitlines() or [str(path) for path in (*PACKAGE.rglob("*"), *ROOT.glob("tests/**/*"))]
    binary = (".png", ".jpg", ".npz", ".safetensors", ".ico", ".pyc")
    return [ROOT / name for name in names if (ROOT / name).is_file() and not name.endswith(binary)]


# In two parts, so that this file does not find itself.
PRIVATE = re.compile("(?<![\\w.])/(" + "work" + r"/[a-z.]|home" + r"/[a-z]+/|root" + r"/[a-z.]|Users" + r"/[A-Za-z]+/)")
REGISTRY = re.compile(
    r"https?://[^\s/]*(" + "py" + "pi|artifac" + "tory|nex" + r"us|mir" + r"ror)[^\s]*", re.IGNORECASE
)


@pytest.mark.parametrize(("pattern", "what"), [(PRIVATE, "a developer's machine"), (REGISTRY, "a registry")])
def test_nothing_in_the_tree_names(pattern, what):
    found = []
    for path in texts():
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if match := pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match[0]} names {what}")
    assert not found
