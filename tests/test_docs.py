"""Commands and Python examples of the README and the guides run on tiny data; what needs hardware is parsed."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from maskwright.checkpoints.checkpoint import make_checkpoint, save_checkpoint
from maskwright.checkpoints.packaged import packaged_models
from maskwright.checkpoints.readers import safe_pickle, weight_file
from maskwright.cli import app
from maskwright.config import safe_yaml
from maskwright.config.recipe import load_recipe
from maskwright.data.build import open_dataset
from maskwright.data.images import multichannel, safe_pillow, tiled_tiff
from maskwright.data.storage import archives, folders
from maskwright.models import build_model
from tests import hostile_files, tiny

ROOT = Path(__file__).resolve().parents[1]
GUIDES = ("README.md", "docs/quick-start.md", "docs/own-data.md")
PAGES = (
    "docs/datasets.md",
    "docs/models.md",
    "docs/export.md",
    "docs/recipes.md",
    "docs/scale.md",
    "docs/results-for-tools.md",
)

# What makes a command small: (words that it starts with, words that are added).
SMALLER = (
    (
        "maskwright train demo",
        "train.steps=2 train.batch_size=2 train.evaluate_every=null train.progressive_resizing=[]",
    ),
    ("maskwright evaluate runs/demo/best.safetensors demo", "evaluate.max_images=1"),
    (
        "maskwright train starting.yaml",
        "train.steps=2 train.batch_size=2 train.num_workers=0 train.probe_memory=false evaluate.max_images=1",
    ),
)
PUBLISHED = {"model__backbone": "resnet18", "model__pixel_decoder_feedforward_dim": 1024}  # model_final_94dc52.pkl


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def commands(page: str) -> list[str]:
    """The commands of a page, without comments and with continued lines joined."""
    text = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    lines = (line.partition("  #")[0].strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def run(command: str, folder: Path) -> None:
    """Run one command of a guide in a folder, as a user would type it."""
    for start, added in SMALLER:
        if command.startswith(start):
            command = f"{command} {added}"
    words = shlex.split(command)
    target = None
    if ">" in words:
        words, target = words[: words.index(">")], folder / words[-1]
    assert words[0] == "maskwright", command
    done = subprocess.run(
        [sys.executable, "-m", "maskwright", *words[1:]], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    if target is not None:
        target.write_text(done.stdout, encoding="utf-8")


@pytest.fixture
def workspace(tmp_path):
    """A folder with what the guides name: photos, a dataset, and a checkpoint of detectron2."""
    tiny.write_panoptic(tmp_path / "data")
    (tmp_path / "photos").mkdir()
    for name in ("photos/a.jpg", "photos/b.jpg", "street.jpg", "cells.png"):
        Image.fromarray(tiny.scene_image(3)).save(tmp_path / name, quality=95)
    (tmp_path / "src").symlink_to(ROOT / "src")
    recipe = tiny.recipe(tmp_path / "data", **PUBLISHED)
    model = build_model(recipe.model, open_dataset(recipe, "train").categories)
    save_checkpoint(tmp_path / "model.safetensors", make_checkpoint(model, recipe, {}))
    run("maskwright convert model.safetensors model_final_94dc52.pkl --to detectron2", tmp_path)
    return tmp_path


def edit_recipes(folder: Path) -> None:
    """Do what the guides ask the reader to do with new recipes, and make their models small."""
    for name, settings in (("mine.yaml", {}), ("r50.yaml", PUBLISHED)):
        path = folder / name
        if path.exists() and "name: tiny" not in path.read_text(encoding="utf-8"):
            if name == "mine.yaml":
                shutil.copy(path, folder / "starting.yaml")
            tiny.write_recipe(path, folder / "data", train__steps=2, **settings)
            split = "{images: images, annotations: panoptic.json, masks: masks}"
            text = path.read_text(encoding="utf-8")
            path.write_text(text.replace("  train:", f"  test: {split}\n  train:", 1), encoding="utf-8")


@pytest.mark.parametrize("page", GUIDES)
def test_every_command_of_a_guide_runs(page, workspace):
    found = commands(page)
    assert len(found) >= 5
    for command in found:
        if command.startswith("make "):
            assert re.search(rf"^{command.split()[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        elif command.startswith("pip install "):
            assert re.search(r"^pretrained = ", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
        elif re.search(r"[ =]nuclei( |$)", command):  # needs the model that it has, not a small one
            if "nuclei" in packaged_models():
                run(command.replace("mine.yaml", "starting.yaml"), workspace)
        else:
            run(command, workspace)
            edit_recipes(workspace)


@pytest.mark.parametrize("page", ["README.md", "docs/quick-start.md"])
def test_every_python_example_runs(page, workspace):
    run("maskwright convert model_final_94dc52.pkl r50.safetensors", workspace)
    (workspace / "runs/demo").mkdir(parents=True)
    shutil.copy(workspace / "r50.safetensors", workspace / "runs/demo/best.safetensors")
    for block in blocks(page, "python"):
        done = subprocess.run([sys.executable, "-c", block], cwd=workspace, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert (workspace / "overlay.png").is_file()


@pytest.mark.parametrize("page", PAGES)
def test_every_other_command_parses_and_names_recipes_and_keys_that_exist(page):
    found = [line for line in commands(page) if "maskwright" in line]
    assert found
    for command in found:
        words = shlex.split(command.partition(" >")[0])
        words = words[words.index("maskwright") + 1 :]
        function, bound, _ = app.parse_args(words, print_error=False, exit_on_error=False)
        recipe = bound.arguments.get("recipe")
        if recipe and str(recipe) != "mine.yaml":
            load_recipe(str(recipe), [word for word in words if re.fullmatch(r"[a-z_.]+=.*", word)])
        assert function is not None


def test_links_between_pages_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert "://" in link or (page.parent / link).exists(), f"{page.name}: {link}"


def test_limits_of_the_security_page_are_those_of_the_code():
    limits = {
        "pixels of an image that is decoded as a whole": f"{safe_pillow.MAX_PIXELS:,}",
        "pixels of a tiled TIFF that is read by regions": f"{tiled_tiff.MAX_TILED_PIXELS:,}",
        "channels of an image": f"{multichannel._MAX_CHANNELS}",
        "instructions of a pickle; values of nested tuples in it": (
            f"{safe_pickle._MAX_INSTRUCTIONS:,}; {safe_pickle._MAX_TUPLE_VALUES:,}"
        ),
        "entries of a weight file; size of its tensors relative to the file": (
            f"{weight_file._MAX_ENTRIES:,}; {weight_file._MAX_SHARING} times"
        ),
        f"decompressed data from {archives._BOMB_BYTES >> 20} MiB on, relative to the bytes on disk": (
            f"{archives._BOMB_RATIO} times"
        ),
        "archives inside archives": f"{folders._MAX_NESTING} levels",
        "depth of YAML; characters that its aliases stand for": (
            f"{safe_yaml._MAX_DEPTH}; {safe_yaml._MAX_ALIAS_CHARACTERS:,}"
        ),
    }
    section = (ROOT / "docs/security.md").read_text(encoding="utf-8").split("### Limits")[1].split("###")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    assert dict(rows[2:]) == limits


def test_files_that_the_security_page_names_exist():
    text = (ROOT / "docs/security.md").read_text(encoding="utf-8")
    names = re.findall(r"`(tests/\w+\.py)`", text)
    assert names
    assert all((ROOT / name).is_file() for name in names)
    counts = tuple(len(files) for files in (hostile_files.IMAGES, hostile_files.LABELS, hostile_files.COCO))
    assert (*counts, len(hostile_files.PANOPTIC)) == tuple(
        map(int, re.search(r"(\d+) images, (\d+) label images, (\d+) COCO and (\d+) panoptic files", text).groups())
    )
