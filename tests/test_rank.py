"""Which images to label next: the measures, the choice, and the files of the command."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskwright.config.schema import EvaluateConfig
from maskwright.errors import ImageError, MaskwrightError
from maskwright.inference import rank
from maskwright.inference.mask_upsampling import CropPrediction
from maskwright.inference.predictor import Predictor
from maskwright.inference.rank import RankedImage, choose, least_confident, measure_images, rank_files
from maskwright.inference.uncertainty import FeatureRecorder, class_uncertainty
from maskwright.results.contact_sheet import contact_sheet
from maskwright.structures.predictions import MaskPrediction, PixelPrediction
from tests import tiny
from tests.in_process import run_command
from tests.test_postprocess import CATEGORIES

COUNT = 8


@pytest.fixture(scope="module")
def predictor():
    return Predictor(tiny.trained_model(), device="cpu")


@pytest.fixture
def folder(tmp_path):
    """Scenes that the model knows, one of noise, one that is damaged."""
    (tmp_path / "photos").mkdir()
    for number in range(COUNT - 2):
        Image.fromarray(tiny.scene_image(number)).save(tmp_path / f"photos/{number}.png")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photos/noise.png")
    (tmp_path / "photos/damaged.png").write_bytes((tmp_path / "photos/0.png").read_bytes()[:90])
    return tmp_path


def command(monkeypatch, capsys, *arguments):
    """`maskwright rank` with the trained model."""
    return run_command(monkeypatch, capsys, "rank", tiny.trained_model(), *arguments, "--device", "cpu")


def rows(file):
    with file.open(encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened))


# Measures


def sure_query(scores):
    """Predictions of one query for each score, all of the first class, with masks that are certain."""
    logits = torch.full((1, len(scores), len(CATEGORIES) + 1), -100.0)
    values = torch.tensor(scores)
    logits[0, :, 0], logits[0, :, -1] = values.log(), (1 - values).log()
    prediction = MaskPrediction(logits, torch.full((1, len(scores), 1), 20.0), torch.ones(1, 1, 8, 8))
    return [CropPrediction(prediction, (32, 32), (32, 32))]


@pytest.mark.parametrize("task", ["instance", "panoptic"])
@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ((0.999, 0.999), 0.001),  # two sure objects
        ((0.5, 0.5), 0.5),  # two that may be wrong
        ((0.9, 0.5), (0.09 + 0.25) / 1.4),
        ((0.001, 0.001), 0.002),  # surely nothing
        ((0.05,) * 100, 0.95),  # many traces of objects
    ],
)
def test_uncertainty_of_segments_is_the_expected_share_of_wrong_ones(task, scores, expected):
    shares = class_uncertainty(sure_query(scores), (32, 32), CATEGORIES, EvaluateConfig(task=task, top_k=500))
    assert shares.sum() == pytest.approx(expected, abs=2e-3)
    assert shares.argmax() == 0


def test_panoptic_uncertainty_counts_stuff_and_instance_does_not():
    (crop,) = sure_query((0.5, 0.5))
    crop.prediction.class_logits[..., 1] = crop.prediction.class_logits[..., 0]  # as stuff
    crop.prediction.class_logits[..., 0] = -100
    panoptic, instance = (
        class_uncertainty([crop], (32, 32), CATEGORIES, EvaluateConfig(task=task)) for task in ("panoptic", "instance")
    )
    assert panoptic.argmax() == 1
    assert panoptic.sum() == pytest.approx(0.5, abs=1e-3)
    assert instance.sum() < 1e-6


def test_semantic_uncertainty_is_the_mean_doubt_of_the_pixels():
    for logit, expected in ((0.0, 1 - 1 / len(CATEGORIES)), (100.0, 0.0)):
        logits = torch.zeros(1, len(CATEGORIES), 8, 8)
        logits[:, 2] = logit
        crop = CropPrediction(PixelPrediction(logits), (32, 32), (32, 32))
        shares = class_uncertainty([crop], (32, 32), CATEGORIES, EvaluateConfig(task="semantic"))
        assert shares.sum() == pytest.approx(expected, abs=1e-6)


def test_features_are_unit_vectors_without_padding(predictor):
    recorder = FeatureRecorder(predictor.model)
    image = torch.from_numpy(tiny.scene_image(1)).permute(2, 0, 1)[None]
    none, right = torch.zeros(1, 64, 64, dtype=torch.bool), torch.zeros(1, 64, 128, dtype=torch.bool)
    right[..., 64:] = True
    with torch.no_grad():
        plain = predictor.model(image, none).final
        kept = recorder(image, none)
        first = recorder.take()
        recorder(torch.nn.functional.pad(image, (0, 64)), right)
    assert torch.equal(kept.class_logits, plain.class_logits)
    assert np.linalg.norm(first) == pytest.approx(1, abs=1e-5)
    assert first @ recorder.take() > 0.9
    assert not predictor.model.backbone._forward_hooks


@pytest.mark.parametrize(
    "options", [{}, {"task": "semantic", "window_size": (32, 32)}, {"task": "instance", "flip": True}]
)
def test_measures_do_not_depend_on_the_other_images(predictor, folder, options):
    pipeline = predictor.pipeline(**options)
    paths = sorted((folder / "photos").glob("[0-9].png"))
    together = dict(measure_images(pipeline, paths))
    for path in paths[::3]:
        ((_, alone),) = measure_images(pipeline, [path])
        assert together[path].uncertainty == alone.uncertainty
        np.testing.assert_array_equal(together[path].feature, alone.feature)


def test_an_image_in_tiles_is_the_mean_of_its_tiles(predictor, tmp_path):
    left, right = tiny.scene_image(1), tiny.scene_image(4)
    for name, pixels in {"a": np.concatenate([left, right], 1), "b": left, "c": right}.items():
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    measured = measure_images(predictor.pipeline(tile_size=64), sorted(tmp_path.iterdir()))
    both, *parts = (image.uncertainty for _, image in measured)
    assert both == pytest.approx(sum(parts) / 2)


# The choice


def image(name, uncertainty, feature):
    return RankedImage(Path(name), uncertainty, "box", np.array(feature, np.float32))


def test_the_choice_covers_the_candidates_and_keeps_their_order():
    images = [image("a", 0.9, (1, 0)), image("b", 0.8, (1, 0.1)), image("c", 0.7, (0, 1)), image("d", 0.6, (-1, 0))]
    chosen = choose(images, 3)
    assert [one.path.name for one in chosen] == ["a", "c", "d"], "b looks like a"
    assert [one.distance for one in chosen] == pytest.approx([2**0.5, 2**0.5, 2**0.5])
    assert [one.path.name for one in choose(images, 2)] == ["a", "d"]
    assert [one.path.name for one in choose(images, 9)] == ["a", "b", "c", "d"]
    assert choose(images[:1], 3)[0].distance is None
    assert choose([], 3) == []


def test_equal_images_are_all_chosen_once_and_in_order_of_their_names():
    images = [image(name, 0.5, (1, 0)) for name in "cab"]
    assert [one.path.name for one in choose(least_confident(images, 3), 3)] == ["a", "b", "c"]


def test_candidates_are_few_however_many_images_there_are(predictor, folder, monkeypatch):
    sizes = []
    original = rank.least_confident

    def record(images, count):
        sizes.append(len(images))
        return original(images, count)

    monkeypatch.setattr(rank, "least_confident", record)
    monkeypatch.setattr(rank, "CANDIDATES", 2)
    ranking = rank_files(predictor, [str(folder / "photos")], folder / "rank", count=1)
    assert max(sizes) == 3
    assert ranking.done == COUNT - 1


# The command


@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
def test_command_writes_a_table_and_a_contact_sheet(task, folder, monkeypatch, capsys):
    arguments = (folder / "photos", "--output", folder / "rank", "--count", 3, "--task", task)
    status, out, err = command(monkeypatch, capsys, *arguments)
    assert status == 1, "one image is damaged"
    assert err.count("failed: ") == 1
    assert "damaged.png" in err
    assert out == f"3 of 7 images -> {folder}/rank/rank.csv, {folder}/rank/rank.png\n"
    table = rows(folder / "rank/rank.csv")
    assert list(table[0]) == ["rank", "file", "uncertainty", "distance", "unsure_of"]
    assert [row["rank"] for row in table] == ["1", "2", "3"]
    unsure = [float(row["uncertainty"]) for row in table]
    assert unsure == sorted(unsure, reverse=True)
    assert all(Path(row["file"]).is_file() and float(row["distance"]) > 0 for row in table)
    assert {row["unsure_of"] for row in table} <= {"sky", "grass", "box", "card"}
    with Image.open(folder / "rank/rank.png") as sheet:
        assert len(sheet.convert("RGB").getcolors(2**24)) > 100, "the images are shown"
    before = [(folder / f"rank/rank.{suffix}").read_bytes() for suffix in ("csv", "png")]
    command(monkeypatch, capsys, folder, *arguments[1:])
    assert [(folder / f"rank/rank.{suffix}").read_bytes() for suffix in ("csv", "png")] == before, "run again"
    assert len(list((folder / "rank").iterdir())) == 2


def test_the_image_that_the_model_does_not_know_comes_first(folder, monkeypatch, capsys):
    command(monkeypatch, capsys, folder / "photos", "--output", folder / "rank", "--task", "semantic")
    table = rows(folder / "rank/rank.csv")
    assert Path(table[0]["file"]).name == "noise.png"
    assert len(table) == COUNT - 1, "no more than there are"


def test_other_files_are_not_replaced(folder, monkeypatch, capsys):
    (folder / "rank").mkdir()
    (folder / "rank/rank.csv").write_text("mine")
    status, _, err = command(monkeypatch, capsys, folder / "photos", "--output", folder / "rank")
    assert status == 1
    assert "rank.csv: exists, and is not a result of maskwright" in err
    assert (folder / "rank/rank.csv").read_text() == "mine"


def test_without_a_readable_image_nothing_is_written(folder, monkeypatch, capsys):
    status, out, err = command(monkeypatch, capsys, folder / "photos/damaged.png", "--output", folder / "rank")
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    assert not (folder / "rank").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no images to rank; name files"),
        (("absent",), "absent: no such file or folder"),
        ((".", "--count", "0"), "--count: found 0, expected at least 1"),
        ((".", "--top-k", "0"), "top_k: input should be greater than 0"),
    ],
)
def test_mistakes_are_named_in_one_line(arguments, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    status, _, err = command(monkeypatch, capsys, *arguments)
    assert status == 1
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_from_python(predictor, folder):
    seen = []
    ranking = rank_files(
        predictor,
        [str(folder / "photos")],
        folder / "rank",
        count=2,
        on_image=lambda path, total: seen.append((path.name, total)),
    )
    assert len(seen) == COUNT
    assert {total for _, total in seen} == {COUNT}
    assert [path.name for path, _ in ranking.failures] == ["damaged.png"]
    with pytest.raises(MaskwrightError, match="count: found 0, expected at least 1 image"):
        rank_files(predictor, [str(folder)], folder / "rank", count=0)
    with pytest.raises(ImageError, match="holds only results"):
        rank_files(predictor, [str(folder / "rank")], folder / "other")


def test_captions_that_are_too_long_are_shortened():
    small = Image.new("RGB", (10, 10), "red")
    one = contact_sheet([small], [("x" * 500, "\udcff")])
    many = contact_sheet([small] * 5, [("short", "")] * 5)
    assert many.width > 3 * one.width
    assert many.height > 1.5 * one.height
