"""Writing for other implementations: what the real transformers computes from our folders, and whole round trips."""

import json
import logging
import pickle
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pytest
import torch

from maskwright.checkpoints.checkpoint import Checkpoint, save_checkpoint
from maskwright.checkpoints.convert import convert
from maskwright.checkpoints.key_maps.detectron2 import DETECTRON2
from maskwright.checkpoints.key_maps.key_map import State
from maskwright.checkpoints.key_maps.openmmlab import OPENMMLAB
from maskwright.checkpoints.key_maps.transformers import TRANSFORMERS
from maskwright.checkpoints.key_maps.translate import translate, translate_back
from maskwright.checkpoints.load import load_model, read_checkpoint
from maskwright.config.schema import EvaluateConfig, ModelConfig
from maskwright.errors import CheckpointError, MaskwrightError
from maskwright.models import build_model
from maskwright.structures.annotations import Category
from tests import tiny
from tests.full_size import full_size
from tests.parity.fixtures import BUNDLED, SHARED
from tests.test_parity import COMPLETE_SET

SWIN = {
    "backbone": "swin_tiny_patch4_window7_224",
    "backbone_options": {"embed_dim": 24, "depths": [2, 1, 2, 1], "num_heads": [1, 2, 3, 4]},
}
MODELS = {
    "swin, window 5": SWIN
    | {"window_size": 5, "num_queries": 9, "hidden_dim": 64, "num_heads": 2, "masked_decoder_layers": 5},
    "swin, narrow blocks": SWIN
    | {"backbone_options": SWIN["backbone_options"] | {"mlp_ratio": 2.5, "qkv_bias": False}, "mask_dim": 64},
    "resnet18, frozen norms": {"backbone": "resnet18"},
    "resnet, odd depths": {"backbone": "resnet50", "backbone_options": {"layers": [1, 2, 1, 1]}, "num_heads": 4},
    "timm resnet": {"backbone": "test_resnet"},
    "timm convnext": {"backbone": "test_convnext", "backbone_norm": "sync"},
}
SMALL = {
    "num_queries": 5,
    "hidden_dim": 32,
    "pixel_decoder_layers": 1,
    "pixel_decoder_feedforward_dim": 16,
    "masked_decoder_layers": 2,
    "masked_decoder_feedforward_dim": 24,
    "pixel_mean": (127.5, 102.0, 76.5),
}
ORIGINAL = {  # what its configuration or its weight file cannot say
    "pixel_decoder_feedforward_dim": 1024,
    "pixel_mean": ModelConfig.model_fields["pixel_mean"].default,
}
CATEGORIES = (
    Category(7, "sky", False, (1, 2, 3)),
    Category(3, "größe", True, (40, 50, 60)),
    Category(9, "box", True, (200, 0, 0)),
)
EVALUATE = EvaluateConfig(task="semantic", semantic_resolution="input", short_side=96, max_side=160, top_k=7)
IMAGE = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def checkpoint_of(values: dict) -> Checkpoint:
    """Random weights, batch statistics and positions too."""
    torch.manual_seed(0)
    config = ModelConfig(**(SMALL | values))
    state = build_model(config, CATEGORIES).state_dict()
    for name, tensor in state.items():
        if "running_var" in name:
            tensor.mul_(1 + 0.2 * torch.rand_like(tensor))
        elif tensor.is_floating_point() and (tensor.ndim == 1 or "position" in name):
            tensor.add_(0.1 * torch.randn_like(tensor))
    return Checkpoint(config, CATEGORIES, EVALUATE, state)


def logits_of(checkpoint: Checkpoint) -> tuple[torch.Tensor, torch.Tensor]:
    model = build_model(checkpoint.config, checkpoint.categories).eval()
    model.load_state_dict(checkpoint.state)
    with torch.no_grad():
        final = model(IMAGE).final
    return final.class_logits, final.mask_logits()


def write(folder: Path, checkpoint: Checkpoint, destination: str, to: str) -> Path:
    save_checkpoint(folder / "ours.safetensors", checkpoint)
    convert(folder / "ours.safetensors", folder / destination, to=to)
    return folder / destination


def assert_same(state: State, other: State, besides: str = "no name has this") -> None:
    ours, theirs = ({name for name in one if besides not in name} for one in (state, other))
    assert ours == theirs
    assert all(torch.equal(state[name], other[name]) for name in ours)


def meta_state(facts: dict) -> State:
    return {key: torch.empty(shape, device="meta") for key, shape in facts["keys"].items()}


def shapes(state: State) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


@pytest.fixture(scope="module")
def transformers():
    module = pytest.importorskip("transformers")
    module.logging.disable_progress_bar()
    return module


@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_our_folder_without_complaint_and_gives_the_same_logits(
    name, transformers, tmp_path, caplog
):
    checkpoint = checkpoint_of(MODELS[name])
    folder = write(tmp_path, checkpoint, "folder", "transformers")
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        kind = transformers.Mask2FormerForUniversalSegmentation
        model, loading_info = kind.from_pretrained(folder, output_loading_info=True)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert not any(loading_info.values())
    assert not [text for text in caplog.messages if "is not a supported model" not in text]
    assert model.config.id2label == {0: "sky", 1: "größe", 2: "box"}
    assert model.config.label2id == {"sky": 0, "größe": 1, "box": 2}
    assert [category["is_thing"] for category in model.config.maskwright["categories"]] == [False, True, True]
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    assert (processor.size["shortest_edge"], processor.size["longest_edge"]) == (96, 160)
    assert processor.image_mean == pytest.approx([0.5, 0.4, 0.3])
    assert (processor.ignore_index, processor.do_reduce_labels, processor.size_divisor) == (255, False, 32)
    pixels = processor(list(IMAGE), return_tensors="pt", do_resize=False)["pixel_values"]
    with torch.no_grad():
        theirs = model.eval()(pixel_values=pixels)
    classes, masks = logits_of(checkpoint)
    torch.testing.assert_close(theirs.class_queries_logits, classes, rtol=0, atol=2e-5)
    torch.testing.assert_close(theirs.masks_queries_logits, masks, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_for_transformers_comes_back_as_the_same_model(name, tmp_path):
    checkpoint = checkpoint_of(MODELS[name])
    back = read_checkpoint(write(tmp_path, checkpoint, "folder", "transformers"))
    assert_same(back.state, checkpoint.state, besides="num_batches_tracked")
    assert back.config.model_copy(update={"backbone_norm": checkpoint.config.backbone_norm}) == checkpoint.config
    assert back.categories == CATEGORIES
    assert back.evaluate == EVALUATE


def test_a_model_that_transformers_saved_again_comes_back_with_its_classes_and_new_sizes(transformers, tmp_path):
    checkpoint = checkpoint_of(MODELS["swin, window 5"])
    folder = write(tmp_path, checkpoint, "folder", "transformers")
    model = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    processor.size = {"shortest_edge": 64, "longest_edge": 99}
    processor.save_pretrained(tmp_path / "again")
    back = read_checkpoint(tmp_path / "again")
    assert_same(back.state, checkpoint.state)
    assert back.categories == CATEGORIES
    assert back.evaluate == EVALUATE.model_copy(update={"short_side": 64, "max_side": 99})
    config = json.loads((tmp_path / "again" / "config.json").read_text(encoding="utf-8"))
    config["id2label"] = {"0": "sky", "1": "tree", "2": "box"}
    (tmp_path / "again" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert [category.name for category in read_checkpoint(tmp_path / "again").categories] == ["sky", "tree", "box"]


def test_settings_of_an_image_processor_inside_those_of_a_processor_are_read(tmp_path, caplog):
    folder = write(tmp_path, checkpoint_of(SWIN), "folder", "transformers")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["maskwright"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    processor = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    processor |= {"do_resize": True, "size": {"height": 64, "width": 96}}
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": processor}), encoding="utf-8")
    (folder / "preprocessor_config.json").unlink()
    assert read_checkpoint(folder).evaluate.size == (64, 96)
    assert "published models" not in caplog.text
    (folder / "processor_config.json").unlink()
    assert read_checkpoint(folder).evaluate.size is None
    assert "no preprocessor_config.json; images are resized and normalized as those of published models" in caplog.text


def test_label_ids_from_1_are_reduced_and_no_resizing_is_kept(tmp_path):
    categories = tuple(Category(number, str(number), True, (0, 0, 0)) for number in (1, 2, 3))
    changes = {"categories": categories, "evaluate": EvaluateConfig(task="instance")}
    folder = write(tmp_path, replace(checkpoint_of(SWIN), **changes), "folder", "transformers")
    processor = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    assert processor["do_reduce_labels"]
    assert not processor["do_resize"]
    assert read_checkpoint(folder).evaluate == changes["evaluate"]


def test_weights_of_the_loss_and_its_points_are_those_of_the_recipe(tmp_path):
    recipe = tiny.recipe(
        tmp_path, "semantic", train__no_object_weight=0.25, train__num_points=99, train__dice_loss_weight=3.0
    )
    checkpoint = replace(checkpoint_of(SWIN), recipe=recipe)
    folder = write(tmp_path, checkpoint, "folder", "transformers")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert (config["no_object_weight"], config["train_num_points"], config["dice_weight"]) == (0.25, 99, 3.0)
    checkpoint = replace(checkpoint_of(SWIN | ORIGINAL), recipe=recipe)
    content = pickle.loads(write(tmp_path, checkpoint, "model.pkl", "detectron2").read_bytes())
    assert content["model"]["criterion.empty_weight"].tolist() == [1, 1, 1, 0.25]


@pytest.mark.parametrize("suffix", ["pkl", "pth"])
@pytest.mark.parametrize("name", ["swin, window 5", "resnet18, frozen norms"])
def test_a_file_for_detectron2_comes_back_as_it_was(name, suffix, tmp_path):
    checkpoint = checkpoint_of(MODELS[name] | ORIGINAL)
    path = write(tmp_path, checkpoint, f"model.{suffix}", "detectron2")
    back = read_checkpoint(path)
    assert_same(back.state, checkpoint.state)
    assert back.config == checkpoint.config
    content = pickle.loads(path.read_bytes()) if suffix == "pkl" else torch.load(path)
    assert content["__author__"].startswith("maskwright")  # else a .pkl is taken for one of Caffe2
    # Without these two, the original's hooks take the names for those of its first release, and break them.
    assert content["model"]._metadata["sem_seg_head"]["version"] == 2
    assert content["model"]._metadata["sem_seg_head.predictor"]["version"] == 2


@pytest.mark.parametrize(("to", "head"), [("mmdetection", "panoptic_head"), ("mmsegmentation", "decode_head")])
def test_a_file_for_openmmlab_comes_back_with_its_class_names(to, head, tmp_path):
    checkpoint = checkpoint_of(MODELS["swin, window 5"] | ORIGINAL | {"num_heads": 8})
    path = write(tmp_path, checkpoint, "model.pth", to)
    back = read_checkpoint(path)
    assert_same(back.state, checkpoint.state)
    assert [category.name for category in back.categories] == ["sky", "größe", "box"]
    content = torch.load(path)
    assert f"{head}.cls_embed.weight" in content["state_dict"]
    assert content["meta"]["dataset_meta"]["palette"][1] == [40, 50, 60]


def fixtures(layout: str) -> list:
    """The recorded state dicts of one implementation: those that come with the tests, and the full-size ones."""
    bundled = sorted((BUNDLED / layout).glob("*.json"))
    names = [PurePosixPath(name).name for name in COMPLETE_SET if name.startswith(f"{layout}/")]
    return [*bundled, *(full_size(SHARED / layout / f"{name}.json") for name in names)]


@pytest.mark.parametrize("path", fixtures("detectron2"), ids=lambda path: f"{path.parents[1].name}-{path.stem}")
def test_a_detectron2_file_has_the_keys_and_shapes_of_the_original_state_dict(path):
    facts = json.loads(path.read_text(encoding="utf-8"))
    ours = translate(meta_state(facts), DETECTRON2).state
    ours["criterion.empty_weight"] = torch.empty(facts["num_classes"] + 1, device="meta")
    assert shapes(translate_back(ours, DETECTRON2)) == {key: tuple(shape) for key, shape in facts["keys"].items()}


@pytest.mark.parametrize("path", fixtures("openmmlab"), ids=lambda path: path.stem)
def test_an_openmmlab_file_has_the_keys_and_shapes_of_its_state_dict(path):
    facts = json.loads(path.read_text(encoding="utf-8"))
    written = shapes(translate_back(translate(meta_state(facts), OPENMMLAB).state, OPENMMLAB))
    head = "decode_head." if "decode_head.query_feat.weight" in facts["keys"] else "panoptic_head."
    written = {key.replace("panoptic_head.", head): shape for key, shape in written.items()}
    assert written == {key: tuple(shape) for key, shape in facts["keys"].items()}


@pytest.mark.parametrize("path", fixtures("transformers"), ids=lambda path: path.stem)
def test_a_transformers_file_has_the_keys_and_shapes_that_5_x_writes(path):
    facts = json.loads(path.read_text(encoding="utf-8"))
    ours = translate(meta_state(facts), TRANSFORMERS).state
    ours["criterion.empty_weight"] = torch.empty(134, device="meta")
    written = shapes(translate_back(ours, TRANSFORMERS))
    expected = {key: tuple(shape) for key, shape in facts["keys"].items() if "relative_position_index" not in key}
    unused = {key: shape for key, shape in written.items() if "encoder.swin.layernorm" in key}
    assert len(unused) == (2 if "swin" in path.stem else 0)
    assert written == expected | unused


REFUSED = {
    "points": (
        SWIN | {"deformable_points": 2},
        "model.deformable_points=2: its deformable attention has 4 points",
        "transformers detectron2",
    ),
    "semantic layers": (
        SWIN | {"semantic_attention": ("window",) * 4},
        "cannot express model.semantic_attention=('window', 'window', 'window', 'window')",
        "all",
    ),
    "semantic FPN": (SWIN | {"family": "semantic_fpn"}, "cannot express model.family=semantic_fpn", "all"),
    "aligned features": (SWIN | {"pixel_decoder": "fapn"}, "cannot express model.pixel_decoder=fapn", "all"),
    "windows that differ": (
        ORIGINAL | {"backbone": "swin_s3_tiny_224"},
        "cannot express the backbone 'swin_s3_tiny_224'",
        "all",
    ),
    "features (h, w, channels)": (ORIGINAL | {"backbone": "mambaout_femto"}, "cannot express the backbone", "all"),
    "options": (
        ORIGINAL | {"backbone": "test_resnet", "backbone_options": {"act_layer": "silu"}},
        "with {'act_layer': 'silu'}",
        "all",
    ),
    "hidden pooling": (
        ORIGINAL | {"backbone": "resnetblur50"},
        "supports plain Swins, and ResNets of 18",
        "detectron2",
    ),
    "timm": (ORIGINAL | {"backbone": "test_convnext"}, "supports plain Swins, and", "detectron2 mmdetection"),
    "odd depths": (ORIGINAL | MODELS["resnet, odd depths"], "supports plain Swins, and", "detectron2 mmdetection"),
    "other pixel statistics": (
        SWIN | ORIGINAL | {"pixel_std": (5.0, 6.0, 7.0)},
        "cannot store model.pixel_std=[5.0, 6.0, 7.0]",
        "detectron2 mmdetection",
    ),
    "narrow encoder": (SWIN, "model.pixel_decoder_feedforward_dim=16: its pixel decoder always has 1024", "detectron2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_model_is_refused_before_anything_is_written(name, tmp_path):
    values, message, targets = REFUSED[name]
    config = ModelConfig(**(SMALL | values))
    with torch.device("meta"):
        state = build_model(config, CATEGORIES).state_dict()
    zeros = {key: torch.zeros(tensor.shape, dtype=tensor.dtype) for key, tensor in state.items()}
    save_checkpoint(tmp_path / "ours.safetensors", Checkpoint(config, CATEGORIES, EVALUATE, zeros))
    names = {"transformers": "folder", "detectron2": "model.pkl", "mmdetection": "model.pth"}
    for to in names if targets == "all" else targets.split():
        with pytest.raises(CheckpointError) as found:
            convert(tmp_path / "ours.safetensors", tmp_path / names[to], to=to)
        assert message in str(found.value)
        assert "\n" not in str(found.value)
        assert [path.name for path in tmp_path.iterdir()] == ["ours.safetensors"]


def test_a_folder_is_never_written_over_and_an_empty_one_is_taken(tmp_path):
    checkpoint = checkpoint_of(SWIN)
    save_checkpoint(tmp_path / "ours.safetensors", checkpoint)
    (tmp_path / "folder").mkdir()
    convert(tmp_path / "ours.safetensors", tmp_path / "folder", to="transformers")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "folder").iterdir()}
    assert sorted(before) == ["config.json", "model.safetensors", "preprocessor_config.json"]
    for taken in ("folder", "ours.safetensors"):
        with pytest.raises(CheckpointError, match="exists; choose a new folder, or remove it first"):
            convert(tmp_path / "ours.safetensors", tmp_path / taken, to="transformers")
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "folder").iterdir()} == before


def test_a_file_is_replaced_only_when_told_to(tmp_path):
    save_checkpoint(tmp_path / "ours.safetensors", checkpoint_of(SWIN | ORIGINAL))
    for to, name in (("maskwright", "out.safetensors"), ("detectron2", "out.pkl"), ("mmsegmentation", "out.pth")):
        (tmp_path / name).write_text("precious")
        with pytest.raises(CheckpointError, match="exists; choose a new file, or replace it with --overwrite"):
            convert(tmp_path / "ours.safetensors", tmp_path / name, to=to)
        assert (tmp_path / name).read_text() == "precious"
        convert(tmp_path / "ours.safetensors", tmp_path / name, to=to, overwrite=True)
        assert read_checkpoint(tmp_path / name).config.num_queries == 5


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As on a disk with so little room: a write beyond it fails."""
    resource = pytest.importorskip("resource")
    signalled, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, signalled)


def test_a_write_that_fails_leaves_nothing_behind(tmp_path):
    save_checkpoint(tmp_path / "ours.safetensors", checkpoint_of(SWIN | ORIGINAL))
    (tmp_path / "file").write_text("here")
    names = {"transformers": "folder", "detectron2": "model.pth", "mmdetection": "model.pth"}
    for to, name in (*names.items(), ("detectron2", "model.pkl")):
        with pytest.raises(MaskwrightError, match="cannot be written"):
            convert(tmp_path / "ours.safetensors", tmp_path / "file" / name, to=to)
        with (
            files_of_at_most(100_000),
            pytest.raises(MaskwrightError, match=r"cannot be written: .*free up disk space"),
        ):
            convert(tmp_path / "ours.safetensors", tmp_path / name, to=to)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "ours.safetensors"]


@pytest.mark.parametrize(
    ("to", "name", "message"),
    [
        ("detectron2", "model.safetensors", "must end in .pkl or .pth for detectron2"),
        ("mmdetection", "model.pkl", "must end in .pth for mmdetection"),
        ("maskwright", "model.pkl", "must end in .safetensors for maskwright"),
    ],
)
def test_the_suffix_is_checked_before_the_source_is_read(to, name, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "absent.safetensors", tmp_path / name, to=to)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_halves_the_file_and_computes_in_float32(dtype, tmp_path):
    full = checkpoint_of(MODELS["timm convnext"])
    save_checkpoint(tmp_path / "full.safetensors", full)
    convert(tmp_path / "full.safetensors", tmp_path / "half.safetensors", dtype=dtype)
    half = read_checkpoint(tmp_path / "half.safetensors")
    sizes = {name: sum(t.nbytes for t in each.state.values()) for name, each in (("full", full), ("half", half))}
    assert sizes["half"] <= 0.51 * sizes["full"]
    tolerance = {"float16": 1e-3, "bfloat16": 8e-3}[dtype]
    for key, tensor in load_model(tmp_path / "half.safetensors").state_dict().items():
        assert tensor.dtype == full.state[key].dtype
        torch.testing.assert_close(tensor, full.state[key], rtol=tolerance, atol=1e-6)
    convert(tmp_path / "half.safetensors", tmp_path / "same.safetensors")
    same = read_checkpoint(tmp_path / "same.safetensors").state
    assert all(torch.equal(same[key], tensor) for key, tensor in half.state.items())


def test_a_weight_beyond_the_range_of_float16_is_refused(tmp_path):
    checkpoint = checkpoint_of(MODELS["timm convnext"])
    name = next(iter(checkpoint.state))
    checkpoint.state[name] = checkpoint.state[name] * 0 + 1e6
    save_checkpoint(tmp_path / "large.safetensors", checkpoint)
    with pytest.raises(
        CheckpointError, match=rf"1 weights are beyond the range of torch.float16: {name}; use bfloat16"
    ):
        convert(tmp_path / "large.safetensors", tmp_path / "half.safetensors", dtype="float16")
    assert not (tmp_path / "half.safetensors").exists()
