"""Models in the package: found by name before anything else but files, and described by their card."""

import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from maskwright import Predictor, cli
from maskwright.checkpoints import packaged
from maskwright.checkpoints.load import load_model, read_checkpoint
from maskwright.config.recipe import load_recipe
from maskwright.errors import CheckpointError
from maskwright.evaluation.evaluate import evaluate
from tests import tiny
from tests.full_size import SAMPLE


@pytest.fixture
def cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with one model called `cards`."""
    folder = tmp_path / "package/packaged"
    folder.mkdir(parents=True)
    shutil.copy(tiny.trained_model(), folder / "cards.safetensors")
    (folder / "cards.md").write_text("# cards\n\nboxes and cards\n")
    monkeypatch.setattr(packaged, "_folder", lambda: folder)
    monkeypatch.chdir(tmp_path)
    return folder / "cards.safetensors"


def test_a_packaged_model_loads_by_its_name(cards: Path) -> None:
    assert packaged.packaged_models() == {"cards": cards}
    assert [category.name for category in load_model("cards").categories] == ["sky", "grass", "box", "card"]


def test_a_folder_of_images_may_have_the_name_of_the_model(cards: Path) -> None:
    Path("cards").mkdir()
    assert packaged.find_packaged("cards") == cards
    assert packaged.find_packaged("./cards") is None


def test_a_file_of_that_name_wins(cards: Path) -> None:
    shutil.copy(cards, "other")
    Path("other").rename("cards")
    assert packaged.find_packaged("cards") is None
    load_model("cards")


def test_other_names_are_not_found(cards: Path) -> None:
    assert packaged.find_packaged("card") is None
    with pytest.raises(CheckpointError, match="neither a file nor a published model"):
        load_model("card")


def test_the_zoo_lists_it_and_prints_its_card(
    cards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, expected in ((["zoo"], "in the package: cards"), (["zoo", "cards"], "boxes and cards")):
        monkeypatch.setattr("sys.argv", ["maskwright", *words])
        with suppress(SystemExit):
            cli.main()
        assert expected in capsys.readouterr().out


def test_nuclei_is_small_and_says_where_it_comes_from() -> None:
    path = packaged.packaged_models()["nuclei"]
    assert path.stat().st_size <= 12_000_000
    provenance = read_checkpoint("nuclei").provenance
    assert provenance["licence"] == "Apache-2.0"
    assert "CC0" in provenance["data"]
    card = path.with_suffix(".md").read_text(encoding="utf-8")
    assert all(word in card for word in ("Apache-2.0", "CC0", "maskwright predict nuclei"))


def test_nuclei_finds_the_nuclei_of_the_sample() -> None:
    """Two of the validation images, neither of which it was trained on."""
    recipe = load_recipe("demo", ["evaluate.max_images=2"])
    assert evaluate(load_model("nuclei"), recipe).scores["PQ_th"] > 0.6


@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
def test_nuclei_serves_all_three_tasks(task: str) -> None:
    image = next(iter(sorted((SAMPLE / "val").glob("*.png"))))
    result = Predictor("nuclei")(image, task=task)
    assert result.task == task
    assert "nucleus" in result.names
