"""The zoo: its entries are complete, each supported model can be built, and a name resolves to a checked file."""

import functools
import hashlib
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from maskwright import cli
from maskwright.checkpoints import zoo
from maskwright.checkpoints.checkpoint import Checkpoint, save_checkpoint
from maskwright.checkpoints.infer_config import infer_config, published_setting
from maskwright.checkpoints.load import load_model, read_checkpoint
from maskwright.config.recipe import load_recipe
from maskwright.data.formats.dispatch import open_annotations
from maskwright.errors import CheckpointError
from maskwright.models import build_model
from maskwright.models.backbones.build import build_backbone
from maskwright.structures.annotations import Category
from tests.full_size import SHARED, needs_full_size

ROOT = Path(__file__).resolve().parents[1]

MODELS = zoo.published_models()
BUILDABLE = [entry for entry in MODELS.values() if not entry.needs]
HEADLINE = {"panoptic": "PQ", "instance": "AP", "semantic": "mIoU"}

# Configurations per publisher, data and task: files under `configs` of facebookresearch/Mask2Former at 9b0651c without
# bases and video (47), of configs/mask2former in MMDetection 3.3.0 (11) and MMSegmentation 1.2.2 (13); EasyCV's
# panoptic one; rows of the README of Picsart-AI-Research/SeMask-Segmentation at 16539be (17); of the model zoo of
# tue-mps/eomt at 7bd19dd (21), but for its ViT of 7 billion weights, whose backbone timm does not have.
PUBLISHED = {
    ("Mask2Former", "coco", "panoptic"): 7,
    ("Mask2Former", "coco", "instance"): 7,
    ("Mask2Former", "cityscapes", "panoptic"): 6,
    ("Mask2Former", "cityscapes", "instance"): 6,
    ("Mask2Former", "cityscapes", "semantic"): 6,
    ("Mask2Former", "ade", "panoptic"): 2,
    ("Mask2Former", "ade", "instance"): 2,
    ("Mask2Former", "ade", "semantic"): 7,
    ("Mask2Former", "mapillary-vistas", "panoptic"): 2,
    ("Mask2Former", "mapillary-vistas", "semantic"): 2,
    ("MMDetection", "coco", "panoptic"): 7,
    ("MMDetection", "coco", "instance"): 4,
    ("MMSegmentation", "cityscapes", "semantic"): 6,
    ("MMSegmentation", "ade", "semantic"): 7,
    ("EasyCV", "coco", "panoptic"): 1,
    ("SeMask-FPN", "ade", "semantic"): 4,
    ("SeMask-FPN", "cityscapes", "semantic"): 4,
    ("SeMask-FPN", "coco-stuff-10k", "semantic"): 4,
    ("SeMask-MaskFormer", "ade", "semantic"): 4,
    ("SeMask-MaskFormer", "cityscapes", "semantic"): 1,
    ("EoMT", "coco", "panoptic"): 10,
    ("EoMT", "coco", "instance"): 4,
    ("EoMT", "cityscapes", "semantic"): 1,
    ("EoMT", "ade", "panoptic"): 4,
    ("EoMT", "ade", "semantic"): 2,
}

# Floating point values in the state dict that the original code produces, running statistics included, the loss's own
# class weights not; counted from the key lists of `parity` in the shared data folder.
WEIGHTS = {
    "detectron2/ade20k_semantic_r101": ("mask2former-resnet101-ade-semantic", 63138839),
    "detectron2/ade20k_semantic_r50": ("mask2former-resnet50-ade-semantic", 44094487),
    "detectron2/cityscapes_semantic_r50": ("mask2former-resnet50-cityscapes-semantic", 44060820),
    "detectron2/cityscapes_semantic_swin_base": ("mask2former-swin-base-IN21k-cityscapes-semantic", 106888524),
    "detectron2/coco_instance_r50": ("mask2former-resnet50-coco-instance", 44076497),
    "detectron2/coco_panoptic_r50": ("mask2former-resnet50-coco-panoptic", 44090118),
    "detectron2/coco_panoptic_swin_large": ("mask2former-swin-large-coco-panoptic", 215535610),
    "detectron2/coco_panoptic_swin_tiny": ("mask2former-swin-tiny-coco-panoptic", 47435264),
    "openmmlab/mmdet_r50_coco_panoptic": ("mask2former_r50_8xb2-lsj-50e_coco-panoptic", 44090118),
    "openmmlab/mmseg_r50_ade20k": ("mask2former_r50_8xb2-160k_ade20k-512x512", 44094487),
    "openmmlab/mmseg_swin_b_in22k_cityscapes": (
        "mask2former_swin-b-in22k-384x384-pre_8xb2-90k_cityscapes-512x1024",
        106888524,
    ),
    "semask/fpn_swin_t_ade20k": ("semask-fpn-swin-tiny-ade-semantic", 34659332),
    "semask/fpn_swin_s_ade20k": ("semask-fpn-swin-small-ade-semantic", 55977236),
    "semask/fpn_swin_b_ade20k": ("semask-fpn-swin-base-IN21k-ade-semantic", 96489410),
    "semask/fpn_swin_l_ade20k": ("semask-fpn-swin-large-ade-semantic", 210795518),
    "semask/fpn_swin_t_cityscapes": ("semask-fpn-swin-tiny-cityscapes-semantic", 34247337),
    "semask/fpn_swin_s_cityscapes": ("semask-fpn-swin-small-cityscapes-semantic", 55565241),
    "semask/fpn_swin_b_cityscapes": ("semask-fpn-swin-base-IN21k-cityscapes-semantic", 95951655),
    "semask/fpn_swin_l_cityscapes": ("semask-fpn-swin-large-cityscapes-semantic", 210006243),
    "semask/mask2former_swin_l_ade20k": ("semask-mask2former-swin-large-ade-semantic", 222632383),
    "semask/mask2former_swin_l_cityscapes": ("semask-mask2former-swin-large-cityscapes-semantic", 221843108),
    "semask/mask2former_fapn_swin_l_ade20k": ("semask-mask2former-fapn-swin-large-ade-semantic", 226745479),
    "semask/mask2former_msfapn_swin_l_ade20k": ("semask-mask2former-msfapn-swin-large-ade-semantic", 223851415),
}


def publisher(entry):
    return entry.source.title.split()[0]


@functools.cache
def recipe_of(name):
    return load_recipe(name)


def count_of(model):
    return sum(tensor.numel() for tensor in model.state_dict().values() if tensor.is_floating_point())


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MASKWRIGHT_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def tiny_entry(cache, monkeypatch):
    """A published model of 80 classes whose file, a tiny one in our own format, is in the cache."""
    config = load_recipe("demo").model
    classes = tuple(Category(number, f"class {number}", True, (0, 0, 0)) for number in range(80))
    guessed = load_recipe("demo").evaluate
    file = cache / "tiny.safetensors"
    save_checkpoint(file, Checkpoint(config, classes, guessed, build_model(config, classes).state_dict()))
    digest = hashlib.md5(file.read_bytes()).hexdigest()[:6]
    entry = MODELS["mask2former-resnet50-coco-instance"].model_copy(update={"file": file.name, "md5": digest})
    monkeypatch.setattr(zoo, "published_models", lambda: {entry.name: entry})
    return entry


def test_every_published_configuration_has_an_entry():
    assert Counter((publisher(entry), entry.data, entry.task) for entry in MODELS.values()) == PUBLISHED


def test_every_entry_has_score_table_license_and_file():
    for entry in MODELS.values():
        assert next(iter(entry.scores)) == HEADLINE[entry.task], entry.name
        assert all(0 < score < 100 for score in entry.scores.values()), entry.name
        assert entry.table, entry.name
        assert all((entry.source.tables, entry.source.code_licence, entry.source.weights_licence)), entry.name
        assert entry.address.startswith(("https://", "http://pai-vision-data")), entry.name
        assert bool(entry.recipe) != bool(entry.needs), entry.name
        assert bool(entry.recipe) == bool(entry.parameters), entry.name


def test_file_names_are_unique_and_contain_their_digest():
    named = [entry for entry in BUILDABLE if entry.file]
    nameless = {publisher(entry) for entry in BUILDABLE if not entry.file}
    assert nameless == {"EasyCV", "EoMT", "SeMask-FPN", "SeMask-MaskFormer"}
    assert len({entry.file for entry in named}) == len(named)
    for entry in named:
        assert entry.address.endswith(f"/{entry.file}"), entry.name
        assert (entry.md5 or entry.sha256) in entry.file, entry.name


def test_recipes_of_entries_agree_with_their_data_task_and_classes():
    for entry in BUILDABLE:
        recipe = recipe_of(entry.name)
        assert recipe.data.task == recipe.evaluate.task == entry.task, entry.name
        assert recipe.data.categories in (None, entry.categories), entry.name
        assert entry.recipe.startswith(entry.data.split("-")[0]), entry.name


def test_every_entry_builds_on_the_meta_device_with_as_many_weights_as_published(monkeypatch):
    backbones = {}

    def build_once(name, **arguments):  # most of the time goes into backbones, and few of them differ
        key = (name, repr(arguments))
        if key not in backbones:
            backbones[key] = build_backbone(name, **arguments)
        return backbones[key]

    monkeypatch.setattr("maskwright.models.build_backbone", build_once)
    counts = {}
    for entry in BUILDABLE:
        config, categories = recipe_of(entry.name).model, zoo.entry_categories(entry)
        key = (config.model_dump_json(), len(categories))
        if key not in counts:
            with torch.device("meta"):
                counts[key] = count_of(build_model(config, categories))
        expected = [count for name, count in WEIGHTS.values() if name == entry.name]
        assert expected in ([], [counts[key]]), entry.name
        assert entry.parameters == round(counts[key] / 1e6), entry.name


@needs_full_size
@pytest.mark.parametrize("fixture", WEIGHTS)
def test_weights_are_counted_from_the_state_dict_of_the_original(fixture):
    facts = json.loads((SHARED / "parity" / f"{fixture}.json").read_text(encoding="utf-8"))
    left_out = {*facts["integer_keys"], *(key for key in facts["keys"] if key.endswith("empty_weight"))}
    left_out |= {key for group in facts.get("shared_keys", ()) for key in group[1:]}  # other names of one tensor
    count = sum(math.prod(shape) for key, shape in facts["keys"].items() if key not in left_out)
    assert count == WEIGHTS[fixture][1]


@needs_full_size
def test_entries_of_openmmlab_state_the_published_file_and_scores():
    published = json.loads((SHARED / "parity/openmmlab/published.json").read_text(encoding="utf-8"))
    for name, facts in published.items():
        assert MODELS[name].file == facts["published_file"]
        assert sorted(MODELS[name].scores.values()) == sorted(facts["published_metrics"].values())


@needs_full_size
@pytest.mark.parametrize(
    ("recipe", "folder", "classes"),
    [
        ("cityscapes-panoptic-r50", "camvid_cityscapes_layout", 19),
        ("cityscapes-instance-r50", "camvid_cityscapes_layout", 8),
        ("ade20k-panoptic-r50", "ade20k_sample", 150),
    ],
)
def test_recipes_read_their_data_sets_as_the_original_prepares_them(recipe, folder, classes):
    data = open_annotations(load_recipe(recipe, [f"data.root={SHARED / 'data' / folder}"]).data, "train")
    assert len(data.categories) == classes
    assert len(data.target(0).labels) > 0
    assert Path(str(data.file(0))).is_file()


def test_error_for_an_unsupported_model_names_the_missing_feature(cache):
    (waiting,) = [entry for entry in MODELS.values() if entry.needs]
    with pytest.raises(CheckpointError, match=f"{waiting.name} needs 'maskformer', which this version"):
        load_model(waiting.name)


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("semask") and not MODELS[name].needs])
def test_inferred_semask_configuration_agrees_with_the_recipe(name):
    config = recipe_of(name).model
    with torch.device("meta"):
        state = build_model(config, zoo.entry_categories(MODELS[name])).state_dict()
    found, _ = infer_config(state)
    for key in (
        "family",
        "pixel_decoder",
        "semantic_attention",
        "semantic_window_size",
        "backbone_options",
        "hidden_dim",
        "num_queries",
    ):
        assert getattr(found, key) == getattr(config, key), key
    assert found.backbone == config.backbone.split(".")[0]
    _, guessed = published_setting(len(zoo.entry_categories(MODELS[name])), found)
    assert (guessed.short_side, guessed.max_side) == (
        recipe_of(name).evaluate.short_side,
        recipe_of(name).evaluate.max_side,
    )


def test_error_for_a_misspelt_name_lists_similar_names():
    with pytest.raises(
        CheckpointError, match=r"neither a file nor a published model; nearest.*swin-tiny-coco-panoptic"
    ):
        read_checkpoint("mask2former-swin-tny-coco-panoptic")


@pytest.mark.parametrize("source", ["missing.safetensors", "folder/mask2former-swin-tiny-coco-panoptic", "owner/name"])
def test_paths_and_hub_ids_are_not_names(source):
    assert zoo.find_entry(source) is None


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("MASKWRIGHT_CACHE", raising=False)
    assert zoo.cache_folder() == tmp_path / ".cache/maskwright"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "else"))
    assert zoo.cache_folder() == tmp_path / "else/maskwright"
    monkeypatch.setenv("MASKWRIGHT_CACHE", str(tmp_path / "mine"))
    assert zoo.cache_folder() == tmp_path / "mine"


@pytest.mark.filterwarnings("ignore:Cyclopts application invoked without tokens")
def test_predict_without_the_file_says_in_one_line_what_to_download(cache, monkeypatch, capsys):
    entry = MODELS["mask2former-swin-tiny-coco-panoptic"]
    monkeypatch.setattr(sys, "argv", ["maskwright", "predict", entry.name, "image.jpg"])
    with pytest.raises(SystemExit) as ending:
        cli.main()
    message = capsys.readouterr().err
    assert ending.value.code == 1
    assert message.count("\n") == 1
    assert all(text in message for text in (entry.file, entry.address, str(cache), "CC BY-NC 4.0"))


def test_the_license_of_dinov3_is_said_before_a_download(cache, capsys):
    """EoMT's files with DINOv3 are differences to weights that only Meta may pass on."""
    name = "eomt-dinov3-large-640-coco-panoptic"
    with pytest.raises(CheckpointError, match=r"no file .*license of the weights: DINOv3 License of Meta"):
        load_model(name)
    assert "weights DINOv3 License of Meta" in zoo.describe(MODELS[name])
    assert f"convert {name} complete.safetensors --base facebook/dinov3-vitl16" in zoo.describe(MODELS[name])


@pytest.mark.parametrize(
    ("name", "kind"),
    [("mask2former-swin-tiny-coco-panoptic", "md5"), ("mask2former_r50_8xb2-lsj-50e_coco-panoptic", "sha256")],
)
def test_a_file_with_another_digest_is_refused(cache, name, kind):
    (cache / MODELS[name].file).write_bytes(b"half of a download")
    with pytest.raises(CheckpointError, match=f"{kind} starts with [0-9a-f]+, that of {name} with .*download it again"):
        zoo.find_in_cache(name)


def test_a_name_loads_the_cached_file_with_the_classes_and_evaluation_of_its_entry(tiny_entry):
    checkpoint = read_checkpoint(tiny_entry.name)
    assert [category.name for category in checkpoint.categories[:2]] == ["person", "bicycle"]
    assert checkpoint.evaluate == load_recipe("coco-instance-r50").evaluate
    assert checkpoint.provenance["weights_licence"] == "CC BY-NC 4.0"
    assert len(load_model(tiny_entry.name).categories) == 80


def test_a_cached_file_of_another_model_is_refused(tiny_entry, monkeypatch):
    other = tiny_entry.model_copy(update={"categories": "cityscapes"})
    monkeypatch.setattr(zoo, "published_models", lambda: {other.name: other})
    with pytest.raises(CheckpointError, match="has 80 classes, but mask2former-resnet50-coco-instance has 8; download"):
        read_checkpoint(other.name)


def test_table_has_one_line_per_model_and_description_has_all_details(cache):
    lines = zoo.terminal_table(MODELS.values()).splitlines()
    assert len(lines) == 1 + len(MODELS)
    assert lines[1].split()[:2] == ["mask2former-resnet50-coco-panoptic", "coco"]
    entry = MODELS["mask2former-swin-large-coco-panoptic"]
    text = zoo.describe(entry)
    assert "PQ 57.8, AP 48.6, mIoU 67.4 (MODEL_ZOO.md: COCO Model Zoo, Panoptic Segmentation)" in text
    assert "model.num_queries=200" in text
    assert all(part in text for part in (entry.address, str(cache / entry.file), "md5 f07440", "CC BY-NC 4.0"))
    assert "(present)" not in text
    (cache / entry.file).touch()
    assert "(present)" in zoo.describe(entry)


def test_the_documented_list_is_what_the_command_writes():
    written = (ROOT / "docs" / "zoo.md").read_text(encoding="utf-8")
    assert written == zoo.markdown() + "\n", "run: maskwright zoo --markdown > docs/zoo.md"


def test_listing_imports_no_torch():
    program = "import sys; from maskwright.checkpoints import zoo; zoo.markdown(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
