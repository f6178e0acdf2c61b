"""The structure: who may import whom, what is light to import, and what must not be written anywhere."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import mutants

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "maskwright"

# Folders and files of the root, lowest first: each may import those of the levels before its own, never its neighbors.
FOLDERS = (
    ("errors",),
    ("structures",),
    ("runtime", "config"),
    ("models", "results"),
    ("data", "checkpoints"),
    ("inference",),
    ("evaluation", "serving"),
    ("cluster", "training"),
    ("diagnostics", "export"),
    ("cli",),
    ("__main__",),
)

# The files of each folder, lowest first, by the same rule.
FILES = {
    "structures": (("category", "id_maps", "predictions"), ("annotations",)),
    "runtime": (("atomic_write", "background", "device", "process_pool", "termination"),),
    "config": (
        ("old_names", "safe_yaml", "text"),
        ("schema.base",),
        ("schema.data", "schema.evaluate", "schema.model", "schema.train"),
        ("schema",),
        ("categories", "recipe", "recipe_keys"),
    ),
    "models": (
        ("backbones.base", "empty_init", "ops.cpu_path", "ops.deformable_attention_triton"),
        (
            "backbones.resnet_cpu",
            "backbones.swin_windows_cpu",
            "backbones.timm",
            "ops.deformable_attention_bag",
            "ops.explicit_attention",
            "ops.feedforward_cpu",
            "ops.masked_attention_cpu",
            "segmenter",
        ),
        ("backbones.resnet", "backbones.swin", "layers", "ops.deformable_attention"),
        ("backbones.semask", "backbones.vit_adapter", "masked_decoder", "pixel_decoder"),
        ("backbones.vit",),
        ("backbones.build",),
        ("blocks", "eomt", "fapn_pixel_decoder", "mask2former", "semantic_fpn"),
        ("lora",),
        ("",),  # models/__init__.py, with `build_model`
    ),
    "results": (
        ("contact_sheet", "json_list", "own_files", "segmentation"),
        ("formats.label_config", "rle", "to_supervision"),
        ("coco", "draw", "outlines"),
        ("formats.base", "save"),
        ("formats.coco", "formats.label_studio", "formats.labelme", "formats.parquet", "formats.yolo", "submission"),
        ("formats.open",),
    ),
    "data": (
        (
            "color_jitter",
            "convert.report",
            "formats.folder_names",
            "images.npy",
            "images.png",
            "images.resize",
            "images.warn",
            "problems",
            "storage.remote",
            "storage.similar_names",
        ),
        ("convert.writers", "copy_paste", "formats.folder_pairs", "storage.archives", "storage.parquet", "transforms"),
        ("storage.folders",),
        ("formats.edge_values", "images.find", "images.safe_pillow", "storage.text"),
        ("images.tiff",),
        ("formats.color_tables", "images.load", "storage.image_tables"),
        ("formats.split_lists", "images.label_images", "images.multichannel", "images.tiled_tiff"),
        ("formats.image_list",),
        ("formats.base",),
        (
            "check.previews",
            "formats.classes",
            "formats.detect_classes",
            "formats.layouts",
            "loader",
            "pixel_statistics",
            "fingerprint",
            "class_frequencies",
        ),
        ("check.examine", "formats.coco_json", "formats.detect_label_maps", "formats.label_maps"),
        (
            "check.duplicates",
            "check.statistics",
            "formats.polygon_parsers",
            "formats.camvid",
            "formats.cityscapes",
            "formats.coco_instance",
            "formats.coco_panoptic",
            "formats.coco_stuff",
            "formats.huggingface",
            "formats.instance_maps",
            "formats.voc",
        ),
        (
            "formats.mask_files",
            "formats.ade20k",
            "formats.coco_2017",
            "formats.mapillary",
            "formats.polygon_json",
            "formats.unread",
            "formats.yolo",
        ),
        ("formats.detect", "formats.dispatch"),
        ("build", "check.sanity", "check.report"),
        ("check.check", "check.html_report", "check.starting_recipe"),
        ("convert.source",),
        ("convert.convert",),
    ),
    "checkpoints": (
        ("key_maps.key_map", "key_maps.other_models", "packaged", "readers.safe_pickle", "weight_packages"),
        (
            "compare_weights",
            "infer_vit",
            "key_maps.detectron2",
            "key_maps.openmmlab",
            "key_maps.transformers",
            "key_maps.vit",
            "zoo",
        ),
        (
            "catalog",
            "infer_config",
            "key_maps.backbones",
            "key_maps.easycv",
            "key_maps.eomt",
            "key_maps.semask",
            "readers.torch_archive",
            "timm_weights",
        ),
        ("key_maps.translate", "model_sizes", "transformers_config"),
        ("readers.weight_file",),
        ("sources",),
        ("adapter_file",),
        ("checkpoint",),
        ("read_foreign",),
        ("load",),
        ("backbone", "write_foreign"),
        ("finetune", "write_eomt"),
        ("convert",),
    ),
    "inference": (
        ("blockwise_upsampling", "compile", "exported.metadata", "inputs", "mask_upsampling", "preprocess", "tiling"),
        ("exported.decisions", "exported.runtimes", "exported.settings", "merge_tiles"),
        ("exported.postprocess",),
        ("exported.predictor",),
        ("exported_model",),
        ("bitpacked_masks", "sliding_window", "test_time_augmentation"),
        ("postprocess",),
        ("blockwise_postprocess", "confidence"),
        ("blockwise_confidence",),
        ("segment",),
        ("nothing_found",),
        ("pipeline", "uncertainty"),
        ("predictor",),
        ("predict_each",),
        ("predict_workers",),
        ("predict_files",),
        ("rank",),
    ),
    "evaluation": (
        ("evaluation_targets", "metrics.base"),
        ("metrics.average_precision", "metrics.mean_iou", "metrics.panoptic_quality", "metrics.tables"),
        ("metrics.boundary", "metrics.calibration", "metrics.cityscapes_iou"),
        ("metrics.cityscapes_ap",),
        ("metrics.build",),
        ("evaluate",),
    ),
    "serving": (
        ("problem_details", "request_options", "service_options"),
        ("messages", "tensors"),
        ("encode", "metrics", "requests"),
        ("guard", "model_process", "page"),
        ("supervisor",),
        ("inference_protocol", "label_studio"),
        ("app",),
        ("server",),
    ),
    "cluster": (("ray_options", "run_folder"), ("ray_session",), ("ray_evaluate", "ray_predict")),
    "training": (
        (
            "class_balance",
            "ema",
            "hang_watchdog",
            "log_files",
            "losses.point_sampling",
            "nan_guard",
            "phase_timer",
            "preemption",
            "profiler",
            "run_lock",
            "sharded_reader",
        ),
        ("fsdp",),
        ("adapter_check", "losses.matcher", "muon", "read_logs", "trackers", "training_checkpoint"),
        ("curves", "losses.criterion", "optimizer", "run_folder"),
        ("report", "step"),
        ("memory_probe",),
        ("logger",),
        ("setup",),
        ("zero_scores",),
        ("train",),
        ("throughput",),
    ),
    "export": (("graph", "half_weights"), ("check", "trace"), ("executorch", "onnx", "pt2"), ("int8",), ("export",)),
    "diagnostics": (("compare_runs", "doctor", "plot_runs"),),
    "cli": (
        ("ray_options", "terminal"),
        ("data", "export", "machine", "models", "predict", "serve", "training"),
        ("",),
    ),
}


def _rank(levels: tuple[tuple[str, ...], ...]) -> dict[str, int]:
    return {name: rank for rank, level in enumerate(levels) for name in level}


FOLDER_RANK = _rank(FOLDERS)
FILE_RANK = {folder: _rank(levels) for folder, levels in FILES.items()}

# Imports inside functions that go up, or come back to a file that imports this one: each with its reason.
LAZY = {
    ("results.segmentation", "results.draw"): "fonts are loaded only where something is drawn",
    ("results.segmentation", "results.coco"): "hotcoco is loaded only where a mask is encoded",
    ("results.segmentation", "results.save"): "hotcoco is loaded only where a mask is encoded",
    ("results.segmentation", "results.to_supervision"): "supervision is loaded only where it is used",
    ("results.segmentation", "results.rle"): "hotcoco is loaded only where a mask is encoded",
}


def module_of(path: Path) -> str:
    """The dotted name of a file below the package: `training.losses.criterion`; a folder's own for `__init__.py`."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def folder_and_file(module: str) -> tuple[str, str]:
    folder, _, file = module.partition(".")
    return folder, file


def is_documented_package(path: Path) -> bool:
    """Whether this is an `__init__.py` that holds nothing but a docstring."""
    return path.name == "__init__.py" and len(ast.parse(path.read_text(encoding="utf-8")).body) == 1


def is_upward(own: str, other: str) -> bool:
    """Whether importing `other` in `own` goes up or sideways."""
    (folder, file), (other_folder, other_file) = folder_and_file(own), folder_and_file(other)
    if folder != other_folder:
        return FOLDER_RANK[other_folder] >= FOLDER_RANK[folder]
    return FILE_RANK[folder][other_file] >= FILE_RANK[folder][file]


def sources() -> list[Path]:
    """Every Python file of the package but its own `__init__.py`."""
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def modules() -> set[str]:
    return {module_of(path) for path in sources()}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node that runs; imports for type checkers do not."""
    for child in ast.iter_child_nodes(tree):
        if not is_type_checking(child):
            yield child
            yield from nodes(child)


def imported(path: Path, known: set[str]) -> Iterator[tuple[int, str, bool]]:
    """(line, module, whether inside a function) of each module of the package that a file imports."""
    for node in nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            inner = name.removeprefix("maskwright.")
            if inner == name:
                continue
            if inner not in known:
                inner = inner.rpartition(".")[0]
            if inner in known:
                yield node.lineno, inner, node.col_offset > 0


def test_every_file_has_a_place_in_the_tables():
    placed = {f"{folder}.{file}".rstrip(".") for folder, levels in FILES.items() for level in levels for file in level}
    bare = {module_of(path) for path in sources() if is_documented_package(path)}
    assert modules() - bare == placed | {"errors", "__main__"}


def test_the_root_has_few_rooms():
    entries = {path.name for path in PACKAGE.iterdir()} - {"__init__.py", "__main__.py", "__pycache__"}
    assert entries == {"errors.py", *FILES}
    assert len(entries) <= 16


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_strictly_downward(path):
    own, known = module_of(path), modules()
    if is_documented_package(path):
        return
    wrong = [
        f"line {line}: {own} imports {other}"
        for line, other, lazy in imported(path, known)
        if other != own and is_upward(own, other) and not (lazy and (own, other) in LAZY)
    ]
    assert not wrong


def test_the_tables_would_notice(tmp_path):
    lines = (
        "from maskwright import __version__, errors",
        "if TYPE_CHECKING:",
        "    from maskwright.training.train import train",
        "def later():",
        "    import maskwright.cli",
        "    from maskwright.data.images.load import load_image",
    )
    (tmp_path / "any.py").write_text("\n".join(lines), encoding="utf-8")
    found = list(imported(tmp_path / "any.py", modules()))
    assert found == [(1, "errors", False), (5, "cli", True), (6, "data.images.load", True)]
    assert is_upward("inference.tiling", "inference.postprocess")
    assert is_upward("inference.tiling", "inference.preprocess")
    assert is_upward("data.build", "inference.tiling")
    assert not is_upward("cli.models", "inference.predictor")


HEAVY = (
    "torch",
    "torchvision",
    "timm",
    "accelerate",
    "numpy",
    "scipy",
    "pycocotools",
    "hotcoco",
    "matplotlib",
    "fastapi",
    "starlette",
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


def test_prediction_loads_nothing_that_takes_long_and_is_not_used():
    assert loaded_after("import maskwright.inference.predict_files") == {"torch", "numpy"}


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
    [path for path in sources() if module_of(path) != "runtime.device"],
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
    if not module_of(path).startswith("cli"):
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


def test_the_table_of_mutants_follows_the_code():
    assert not mutants.find_faults(mutants.MUTANTS)
