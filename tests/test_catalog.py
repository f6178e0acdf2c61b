"""The list of what can be trained by name, what it promises, and the pages that repeat it."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from maskwright.checkpoints import catalog, zoo
from maskwright.config.recipe import load_recipe, parse_recipe, recipe_names, recipe_text
from maskwright.training.optimizer import describe_schedule, learning_rate_advice
from tests.in_process import run_command

ROOT = Path(__file__).resolve().parents[1]
ENTRIES = catalog.catalog_entries()
PUBLISHED = [entry for entry in ENTRIES if entry.parameters]
PAGE = ROOT / "docs" / "recipes.md"
pytestmark = pytest.mark.filterwarnings("ignore:Cyclopts application invoked without tokens")


@pytest.fixture
def say(monkeypatch, capsys):
    """`say("recipes")` runs a command: its exit status, output and errors."""
    return lambda *arguments: run_command(monkeypatch, capsys, *arguments)


def test_every_recipe_and_every_published_model_that_can_be_built_is_listed_once():
    buildable = [name for name, entry in zoo.published_models().items() if not entry.needs]
    assert sorted(entry.name for entry in ENTRIES) == sorted([*recipe_names(), *buildable])


def test_each_published_model_stands_below_its_recipe_with_the_same_data_and_task():
    above = None
    for entry in ENTRIES:
        above = entry if entry.parameters is None else above
        assert entry.recipe == above.name
        assert entry.task == above.task


def test_scores_and_costs_are_those_of_the_zoo_and_of_the_recipe():
    for entry in PUBLISHED:
        published, recipe = zoo.get_entry(entry.name), load_recipe(entry.name)
        assert (entry.data, entry.model, entry.scores) == (published.data, published.backbone, published.scores)
        assert (entry.steps, entry.batch_size, entry.crop) == (
            recipe.train.steps, recipe.train.batch_size, recipe.train.augment.crop_size,
        )  # fmt: skip
    assert next(entry for entry in ENTRIES if entry.name == "cityscapes-semask-fpn").scores["mIoU"] == 74.92
    assert not next(entry for entry in ENTRIES if entry.name == "camvid-small").scores


def test_the_list_fits_120_columns_and_has_a_line_for_each_name(say):
    status, out, _ = say("recipes")
    assert status == 0
    lines = out.splitlines()
    assert max(map(len, lines)) <= 120
    assert [line.split()[0].rstrip(":") for line in lines[lines.index("") + 1 :]] == [entry.name for entry in ENTRIES]
    (line,) = [line for line in lines if line.startswith("  mask2former-swin-large-ade-semantic ")]
    assert line.split()[1:] == ["Swin-L", "(22k)", "mIoU", "56.1", "160000", "x", "16", "215M", "640x640"]
    assert "nuclei-small: nuclei, panoptic, ResNet-18 from random weights; 20 minutes on 2 CPU cores; 1000 x 4" in out


def test_the_list_as_json_has_the_same_rows(say):
    rows = json.loads(say("recipes", "--json")[1])
    assert [entry["name"] for entry in rows] == [entry.name for entry in ENTRIES]
    assert rows[1]["scores"] == {"AP": 26.4}
    assert {"data", "task", "model", "steps", "batch_size", "crop", "parameters"} <= rows[1].keys()


@pytest.mark.parametrize("name", ["nuclei-small", *(entry.name for entry in PUBLISHED[::9])])
def test_a_printed_recipe_is_a_file_that_trains_the_same(name, say):
    status, out, _ = say("recipes", name)
    assert (status, out) == (0, recipe_text(name))
    assert parse_recipe(yaml.safe_load(out), name) == load_recipe(name)


def test_a_recipe_that_is_not_there_is_refused_in_a_line(say):
    status, out, err = say("recipes", "nuclei-smal")
    assert (status, out) == (1, "")
    assert err.startswith("error: no recipe 'nuclei-smal'")
    assert err.count("\n") == 1


def test_listing_imports_no_torch():
    program = (
        "import sys; from maskwright.checkpoints import catalog; catalog.terminal_table(catalog.catalog_entries())"
    )
    program += "; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# The page


def test_the_table_of_the_page_is_what_the_command_writes():
    assert catalog.markdown_table(ENTRIES) in PAGE.read_text(encoding="utf-8"), "paste: maskwright recipes --markdown"


def test_every_command_of_the_page_names_a_recipe_and_values_that_exist():
    page = PAGE.read_text(encoding="utf-8")
    commands = [shlex.split(line) for line in re.findall(r"maskwright (?:train|evaluate) [^`|\n#]+", page)]
    assert len(commands) > 8
    for _, verb, *words in commands:
        source, *overrides = words[1:] if verb == "evaluate" else words
        if source.isupper() or source == "...":
            continue
        name = "demo" if source == "mine.yaml" else source
        load_recipe(name, [word for word in overrides if re.match(r"[a-z_]+\.[a-z_.]+=", word)])


def test_the_predecessors_of_the_page_are_told_their_published_settings():
    """Size, batch and steps of the systems that are replaced, as their users know them."""
    page = PAGE.read_text(encoding="utf-8")
    known = {
        "mask2former_r50_8xb2-160k_ade20k-512x512": ((512, 512), 16, 160000),
        "mask2former_swin-b-in22k-384x384-pre_8xb2-90k_cityscapes-512x1024": ((512, 1024), 16, 90000),
        "mask2former-resnet50-cityscapes-semantic": ((512, 1024), 16, 90000),
        "easycv_r50_coco-panoptic": ((1024, 1024), 16, 368750),
        "semask-fpn-swin-small-cityscapes-semantic": ((768, 768), 8, 80000),
    }
    for name, (crop, batch, steps) in known.items():
        assert f"maskwright train {name} data.root=" in page
        train = load_recipe(name).train
        assert (train.augment.crop_size, train.batch_size, train.steps) == (crop, batch, steps)


def test_the_page_shows_what_a_training_says_about_its_steps():
    page = PAGE.read_text(encoding="utf-8")
    train = load_recipe("mask2former-resnet50-cityscapes-semantic", ["train.batch_size=2"]).train
    assert f"{describe_schedule(train, 2975)}\n{learning_rate_advice(train)}\n" in page


def test_the_page_counts_what_there_is():
    page = PAGE.read_text(encoding="utf-8")
    counts = {title: sum(zoo.get_entry(entry.name).source.title.startswith(title) for entry in PUBLISHED)
              for title in ("Mask2Former", "MMDetection", "MMSegmentation", "EasyCV", "SeMask")}  # fmt: skip
    assert list(counts.values()) == [47, 11, 13, 1, 16]
    assert "47 image configurations" in page
