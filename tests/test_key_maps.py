"""Tiny models written with the keys, wrappers and metadata of other implementations are read."""

import json
import pickle
import re
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import torch

from maskwright.checkpoints.infer_config import infer_config
from maskwright.checkpoints.key_maps.detectron2 import DETECTRON2
from maskwright.checkpoints.key_maps.easycv import EASYCV
from maskwright.checkpoints.key_maps.key_map import KeyMap, State
from maskwright.checkpoints.key_maps.openmmlab import OPENMMLAB, concatenated_to_unfolded, unfolded_to_concatenated
from maskwright.checkpoints.key_maps.semask import SEMASK, SEMASK_FAPN
from maskwright.checkpoints.key_maps.transformers import TRANSFORMERS
from maskwright.checkpoints.key_maps.translate import KEY_MAPS, find_key_map, translate, translate_back
from maskwright.checkpoints.load import load_model, read_checkpoint
from maskwright.checkpoints.read_foreign import _resolve_categories
from maskwright.checkpoints.zoo import published_models
from maskwright.config.categories import load_categories
from maskwright.config.schema import EvaluateConfig, ModelConfig
from maskwright.errors import CheckpointError
from maskwright.inference.preprocess import resize_for_network
from maskwright.models import build_model
from maskwright.structures.annotations import Category
from tests.full_size import PARITY, needs_full_size

SWIN = {
    "backbone": "swin_tiny_patch4_window7_224",
    "backbone_options": {"embed_dim": 24, "depths": [2, 1, 2, 1], "num_heads": [1, 2, 3, 4]},
    "window_size": 5,
}
RESNET = {"backbone": "resnet18"}
WINDOWS = SWIN | {"semantic_attention": ["window"] * 4}
HALF_GLOBAL = SWIN | {"semantic_attention": ["window", "window", "global", "global"]}
SMALL = {
    "num_queries": 5,
    "hidden_dim": 32,
    "pixel_decoder_layers": 1,
    "pixel_decoder_feedforward_dim": 16,
    "masked_decoder_layers": 2,
    "masked_decoder_feedforward_dim": 24,
}
MODELS = {
    "detectron2 swin": (DETECTRON2, SWIN),
    "detectron2 resnet": (DETECTRON2, RESNET),
    "transformers swin": (TRANSFORMERS, SWIN),
    "transformers resnet": (TRANSFORMERS, RESNET | {"backbone_norm": "sync"}),
    "openmmlab swin": (OPENMMLAB, SWIN),
    "openmmlab resnet": (OPENMMLAB, RESNET),
    "easycv resnet": (EASYCV, RESNET),
    "semask fpn": (SEMASK, WINDOWS | {"family": "semantic_fpn"}),
    "semask mask2former": (SEMASK, WINDOWS),
    "semask mask2former, msfapn": (SEMASK, HALF_GLOBAL | {"pixel_decoder": "msfapn"}),
    "semask mask2former, fapn": (SEMASK_FAPN, HALF_GLOBAL | {"pixel_decoder": "fapn"}),
}
FEWER = {
    "semantic_fpn": {"hidden_dim": 32},
    "fapn": {"num_queries": 5, "hidden_dim": 32, "masked_decoder_layers": 2, "masked_decoder_feedforward_dim": 24},
}
IMAGE = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def tiny_model(backbone: dict, num_classes: int = 3) -> torch.nn.Module:
    torch.manual_seed(0)
    categories = [Category(number, f"class {number}", True, (0, 0, 0)) for number in range(num_classes)]
    small = FEWER.get(backbone.get("family")) or FEWER.get(backbone.get("pixel_decoder")) or SMALL
    return build_model(ModelConfig(**backbone, **small), categories).eval()


def written_by(key_map: KeyMap, state: State) -> State:
    """The weights as the other implementation would write them, without the buffers that older files lack."""
    return translate_back(state, replace(key_map, buffers=()))


def unfolded(tensor: torch.Tensor) -> torch.Tensor:
    """Merged channels in the order of `torch.nn.functional.unfold`, one channel at a time."""
    channels = tensor.shape[-1] // 4
    order = [
        ((column * 2 + row) * channels + channel) for channel in range(channels) for row in (0, 1) for column in (0, 1)
    ]
    return tensor[..., order]


def test_the_order_of_merged_channels_changes_there_and_back():
    tensor = torch.arange(24.0).view(2, 12)
    torch.testing.assert_close(concatenated_to_unfolded(tensor), unfolded(tensor), rtol=0, atol=0)
    torch.testing.assert_close(unfolded_to_concatenated(unfolded(tensor)), tensor, rtol=0, atol=0)


def save_and_read(path: Path, content: object):
    torch.save(content, path)
    return read_checkpoint(path)


def assert_same(state: State, other: State) -> None:
    assert state.keys() == other.keys()
    assert all(torch.equal(state[key], other[key]) for key in state)


@pytest.fixture(scope="module")
def mmdet() -> tuple[State, State]:
    """Weights of a tiny model in our names and in OpenMMLab's."""
    state = tiny_model(SWIN).state_dict()
    return state, written_by(OPENMMLAB, state)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_each_layout_comes_back_as_it_was(name, tmp_path):
    key_map, backbone = MODELS[name]
    model = tiny_model(backbone)
    checkpoint = save_and_read(tmp_path / "foreign.pth", {"state_dict": written_by(key_map, model.state_dict())})
    assert checkpoint.provenance["layout"] == key_map.name
    assert_same(checkpoint.state, model.state_dict())
    assert checkpoint.config == model.config


@pytest.mark.parametrize("name", ["semask mask2former, msfapn", "semask mask2former, fapn"])
def test_last_of_two_copies_of_a_norm_is_used(name, tmp_path):
    key_map, backbone = MODELS[name]
    model = tiny_model(backbone)
    written = written_by(key_map, model.state_dict())
    for key in [key for key in written if re.search(r"layer_[123]\.norm", key)]:
        written[key.replace("layer_", "align_").replace(".norm", ".offset.norm")] = torch.full_like(written[key], 7.0)
    checkpoint = save_and_read(tmp_path / "foreign.pth", {"model": written})
    assert_same(checkpoint.state, model.state_dict())
    assert "the same norm" in dict(checkpoint.dropped)["sem_seg_head.pixel_decoder.align_1.offset.norm.weight"]


@pytest.mark.parametrize(
    ("changes", "classes", "scope", "window"),
    [
        ({"family": "semantic_fpn"}, 19, "wwww", None),
        ({"family": "semantic_fpn"}, 20, "wwgg", None),
        ({}, 19, "wwww", 7),
        ({}, 150, "wwwg", None),
        ({}, 7, "wwww", None),
        ({"pixel_decoder": "fapn"}, 19, "wwgg", None),
        ({"pixel_decoder": "msfapn"}, 19, "wwgg", None),
    ],
)
def test_semantic_attention_of_published_models_follows_from_family_and_number_of_classes(
    changes, classes, scope, window
):
    state = tiny_model(WINDOWS | changes, classes).state_dict()
    config, found = infer_config(state, heads=8)
    assert (found, "".join(stage[0] for stage in config.semantic_attention), config.semantic_window_size) == (
        classes,
        scope,
        window,
    )


def test_assumed_semantic_attention_is_logged_unless_the_file_is_a_published_one(tmp_path, caplog):
    model = tiny_model(WINDOWS | {"family": "semantic_fpn"})
    state = {"state_dict": written_by(SEMASK, model.state_dict())}
    save_and_read(tmp_path / "foreign.pth", state)
    assert "[window, window, window, window] is assumed for the 4 stages" in caplog.text
    caplog.clear()
    published = next(entry for entry in published_models().values() if "semask" in entry.name and not entry.needs)
    save_and_read(tmp_path / f"{published.name}.pth", state)
    assert "is assumed for the 4 stages" not in caplog.text


@pytest.mark.parametrize("key_map", KEY_MAPS, ids=lambda key_map: key_map.name)
def test_no_prefix_has_two_rows(key_map):
    foreign = [row for row, _ in (*key_map.prefixes, *key_map.split_qkv)]
    foreign += [row for row, _, _ in key_map.fused_qkv]
    assert len(set(foreign)) == len(foreign)


@pytest.mark.parametrize("prefix", ["module.", "model.", "module.model.", "student.", "_orig_mod.", "model._orig_mod."])
def test_prefixes_of_wrappers_are_removed(prefix, mmdet):
    ours, theirs = mmdet
    wrapped = {prefix + key: tensor for key, tensor in theirs.items()}
    assert_same(translate(wrapped, find_key_map(wrapped)).state, ours)


@pytest.mark.parametrize(
    "wrappers", [["model"], ["state_dict"], ["ema"], ["ema", "module"], ["model", "state_dict"], ["best_net"]]
)
def test_dictionaries_around_the_weights_are_unwrapped(wrappers, mmdet, tmp_path):
    ours, content = mmdet
    for wrapper in reversed(wrappers):
        content = {wrapper: content, "epoch": 3}
    assert_same(save_and_read(tmp_path / "wrapped.pth", content).state, ours)


def test_plain_copy_of_the_weights_is_used_and_the_averaged_one_reported(mmdet, tmp_path):
    ours, theirs = mmdet
    averaged = {key: tensor + 1 for key, tensor in theirs.items()}
    checkpoint = save_and_read(tmp_path / "two.pth", {"ema_state_dict": averaged, "state_dict": theirs})
    assert_same(checkpoint.state, ours)
    assert ("ema_state_dict", "a second copy of the weights") in checkpoint.dropped
    both = theirs | {f"ema_model.{key}": tensor for key, tensor in averaged.items()}
    translation = translate(both, find_key_map(both))
    assert_same(translation.state, ours)
    assert len(translation.dropped) == len(theirs)


def test_mmsegmentation_and_the_names_before_mmdetection_3_load_as_well(mmdet):
    ours, theirs = mmdet
    older = {}
    for key, tensor in theirs.items():
        key = re.sub(r"(encoder\.layers\.\d+)\.self_attn\.", r"\1.attentions.0.", key)
        key = re.sub(r"(transformer_decoder\.layers\.\d+)\.cross_attn\.", r"\1.attentions.0.", key)
        key = re.sub(r"(transformer_decoder\.layers\.\d+)\.self_attn\.", r"\1.attentions.1.", key)
        older[re.sub(r"(panoptic_head\..*)\.ffn\.", r"\1.ffns.0.", key)] = tensor
    assert older.keys() != theirs.keys()
    assert_same(translate(older, find_key_map(older)).state, ours)
    segmentation = {key.replace("panoptic_head.", "decode_head."): tensor for key, tensor in theirs.items()}
    assert_same(translate(segmentation, find_key_map(segmentation)).state, ours)


@needs_full_size
def test_recorded_names_of_older_releases_become_those_of_today():
    facts = json.loads((PARITY / "openmmlab" / "mmdet_r50_coco_panoptic_legacy_keys.json").read_text(encoding="utf-8"))
    renamed = facts["renamed_to_current"]
    older = {key: torch.full(shape, float(number)) for number, (key, shape) in enumerate(facts["keys"].items())}
    today = {renamed.get(key, key): tensor for key, tensor in older.items()}
    assert_same(translate(older, OPENMMLAB).state, translate(today, OPENMMLAB).state)


def history_buffer() -> type:
    """A class that pickles as mmengine's HistoryBuffer does: state with arrays, and its own methods by name."""

    class HistoryBuffer:
        def __init__(self) -> None:
            self._log_history = np.arange(3.0)
            self._statistics_methods = {"mean": HistoryBuffer.mean}

        def mean(self) -> float:
            return float(self._log_history.mean())

    HistoryBuffer.__module__ = "mmengine.logging.history_buffer"
    HistoryBuffer.__qualname__ = "HistoryBuffer"
    HistoryBuffer.mean.__qualname__ = "HistoryBuffer.mean"
    HistoryBuffer.mean.__module__ = "mmengine.logging.history_buffer"
    return HistoryBuffer


def save_with_module(path: Path, content: object, kind: type, monkeypatch) -> None:
    """Pickle objects of a module that exists only while they are written."""
    with monkeypatch.context() as patch:
        for name in ("mmengine", "mmengine.logging", kind.__module__):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        setattr(sys.modules[kind.__module__], kind.__qualname__, kind)
        torch.save(content, path)


def test_metadata_and_optimizer_state_of_mmengine_do_not_stop_a_load(mmdet, tmp_path, monkeypatch):
    ours, theirs = mmdet
    kind = history_buffer()
    content = {
        "meta": {"epoch": np.int64(3), "dataset_meta": {"CLASSES": ("nucleus", "cell", "tissue")}, "cfg": "x = 1"},
        "state_dict": theirs,
        "message_hub": {"log_scalars": {"train/loss": kind()}, "runtime_info": {"iter": np.float64(2.5)}},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]},
    }
    path = tmp_path / "epoch_3.pth"
    save_with_module(path, content, kind, monkeypatch)
    assert "mmengine" not in sys.modules
    checkpoint = read_checkpoint(path)
    assert_same(checkpoint.state, ours)
    assert [category.name for category in checkpoint.categories] == ["nucleus", "cell", "tissue"]


def test_any_other_class_is_refused_by_its_name(mmdet, tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    for name, dump in (
        ("evil.pth", torch.save),
        ("evil.pkl", lambda content, path: path.write_bytes(pickle.dumps(content))),
    ):
        dump({"state_dict": {"x": 1}, "meta": Evil()}, tmp_path / name)
        with pytest.raises(CheckpointError, match=r"refused: it calls (builtins\.)?print"):
            read_checkpoint(tmp_path / name)


def test_a_placeholder_for_getattr_never_looks_anything_up(tmp_path):
    class Sneaky:
        def __reduce__(self):
            return (getattr, (pickle.PickleBuffer, "raw"))

    torch.save({"state_dict": {"x": 1}, "meta": Sneaky()}, tmp_path / "sneaky.pth")
    with pytest.raises(CheckpointError, match="refused"):
        read_checkpoint(tmp_path / "sneaky.pth")


def test_unknown_and_missing_entries_are_listed(mmdet, tmp_path):
    _, theirs = mmdet
    with pytest.raises(CheckpointError, match=r"1 entries of the openmmlab checkpoint are unknown: panoptic_head\.new"):
        translate(theirs | {"panoptic_head.new": torch.zeros(1)}, OPENMMLAB)
    fewer = {key: tensor for key, tensor in theirs.items() if "lateral_convs.0.gn" not in key}
    with pytest.raises(CheckpointError, match=r"2 missing: pixel_decoder\.lateral\.norm\.bias, pixel_decoder\.lateral"):
        save_and_read(tmp_path / "fewer.pth", fewer)


def test_fused_tensor_without_one_of_its_parts_is_refused():
    theirs = written_by(TRANSFORMERS, tiny_model(SWIN).state_dict())
    del theirs["model.pixel_level_module.encoder.encoder.layers.0.blocks.1.attention.self.key.weight"]
    with pytest.raises(
        CheckpointError, match=r"is incomplete: backbone\.stages\.0\.blocks\.1\.attn\.qkv\.weight has only"
    ):
        translate(theirs, TRANSFORMERS)


def test_old_and_new_names_of_one_tensor_are_refused(mmdet):
    _, theirs = mmdet
    twice = theirs | {"decode_head.cls_embed.weight": theirs["panoptic_head.cls_embed.weight"]}
    with pytest.raises(CheckpointError, match=r"become 'masked_decoder\.class_head\.weight'"):
        translate(twice, OPENMMLAB)


def hugging_face(folder: Path, **changes: object) -> State:
    """A folder as transformers writes it; returns the weights in our names."""
    state = tiny_model(SWIN).state_dict()
    config = {"model_type": "mask2former", "num_attention_heads": 8} | changes
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    safetensors.torch.save_file(written_by(TRANSFORMERS, state), folder / "model.safetensors", {"format": "pt"})
    return state


def test_folder_of_transformers_has_class_names_normalization_and_sizes(tmp_path):
    state = hugging_face(tmp_path, id2label={"1": "cat", "0": "sky", "2": "dog"})
    processor = {
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [1, 1, 1],
        "size": {"shortest_edge": 96, "longest_edge": 128},
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    for source in (tmp_path, tmp_path / "model.safetensors"):
        checkpoint = read_checkpoint(source)
        assert_same(checkpoint.state, state)
        assert [category.name for category in checkpoint.categories] == ["sky", "cat", "dog"]
        assert checkpoint.config.pixel_mean == (127.5, 102.0, 76.5)
        assert (checkpoint.evaluate.short_side, checkpoint.evaluate.max_side) == (96, 128)


def test_class_names_of_a_built_in_list_bring_its_things_and_colors():
    cityscapes = load_categories("cityscapes")
    named = {label: category.name.upper().replace(" ", "_") for label, category in enumerate(cityscapes)}
    assert _resolve_categories(None, named, 19) == cityscapes
    assert all(category.is_thing for category in _resolve_categories(None, named | {18: "else"}, 19))
    with pytest.raises(CheckpointError, match="has 19; choose a class list with --categories"):
        _resolve_categories(None, named, 20)


def test_number_of_heads_comes_from_the_config_or_from_four_points(tmp_path):
    state = hugging_face(tmp_path, num_attention_heads=4)
    config = read_checkpoint(tmp_path).config
    assert (config.num_heads, config.deformable_points) == (4, 8)  # 8 heads x 4 points have the same shapes
    assert [infer_config(state)[0].num_heads, infer_config(state)[0].deformable_points] == [8, 4]
    fewer = {key: tensor[: len(tensor) // 4] if "attention.weights" in key else tensor for key, tensor in state.items()}
    assert [infer_config(fewer)[0].num_heads, infer_config(fewer)[0].deformable_points] == [2, 4]


def test_another_number_of_feature_levels_is_refused_by_that_number():
    state = tiny_model(SWIN).state_dict()
    state["pixel_decoder.level_embedding"] = torch.zeros(4, 32)
    with pytest.raises(CheckpointError, match="attends to 4 feature levels, but only 3 are supported"):
        infer_config(state)


def test_weights_in_several_files_or_in_a_pickle_load_as_one(tmp_path):
    state = hugging_face(tmp_path)
    theirs = safetensors.torch.load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(theirs, tmp_path / "pytorch_model.bin")
    assert_same(read_checkpoint(tmp_path).state, state)
    (tmp_path / "pytorch_model.bin").unlink()
    names = sorted(theirs)
    shards = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    for name, keys in shards.items():
        safetensors.torch.save_file({key: theirs[key] for key in keys}, tmp_path / name)
    index = {"weight_map": {key: name for name, keys in shards.items() for key in keys}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert_same(read_checkpoint(tmp_path).state, state)
    (tmp_path / "model-2-of-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names 'model-2-of-2.safetensors', which is not in"):
        read_checkpoint(tmp_path)


def test_an_index_cannot_reach_outside_its_folder(tmp_path):
    hugging_face(tmp_path / "folder")
    (tmp_path / "folder" / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": {"x": "../outside.safetensors"}}
    (tmp_path / "folder" / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(CheckpointError, match="which is not in"):
        read_checkpoint(tmp_path / "folder")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "maskformer"}, "has model_type 'maskformer', expected one of mask2former"),
        ({"pre_norm": True}, "pre_norm is True, but only False is supported"),
        (
            {"backbone_config": {"model_type": "resnet", "downsample_in_bottleneck": True}},
            "downsample_in_bottleneck is True",
        ),
        ({"num_attention_heads": 5}, "do not divide into 5 heads"),
    ],
)
def test_a_config_of_another_computation_is_refused(changes, message, tmp_path):
    hugging_face(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("id2label", "names", "line"),
    [
        ({"0": "a", "5": "b", "255": "c"}, ["a", "b", "c"], "numbers its 3 classes 0 to 255, not 0 to 2"),
        ({"3": "c", "1": "a", "2": "b"}, ["a", "b", "c"], "numbers its 3 classes 1 to 3, not 0 to 2"),
        ({"0": "a", "2": "c"}, ["a", "class 1", "c"], "names only 2 of 3 classes"),
        ({"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}, ["class 0", "class 1", "class 2"], "names none of its 3"),
        ({"a": "x"}, ["class 0", "class 1", "class 2"], "names none of its 3 classes"),
        (["a", "b", "c"], ["class 0", "class 1", "class 2"], "names none of its 3 classes"),
    ],
)
def test_labels_with_gaps_or_from_1_are_read_in_their_order(id2label, names, line, tmp_path, caplog):
    hugging_face(tmp_path, id2label=id2label)
    (tmp_path / "preprocessor_config.json").write_text('{"do_resize": true}', encoding="utf-8")
    assert [category.name for category in read_checkpoint(tmp_path).categories] == names
    assert len(caplog.messages) == 1
    assert line in caplog.text
    classes = [{"id": number, "name": name} for number, name in enumerate(("x", "y", "z"))]
    (tmp_path / "classes.yaml").write_text(json.dumps(classes), encoding="utf-8")
    caplog.clear()
    named = read_checkpoint(tmp_path, str(tmp_path / "classes.yaml"))
    assert [category.name for category in named.categories] == ["x", "y", "z"]
    assert not caplog.messages


def test_config_json_counts_only_for_the_weight_file_that_it_belongs_to(tmp_path):
    state = hugging_face(tmp_path, id2label={"0": "cat", "1": "dog", "2": "cow"}, num_attention_heads=4)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 333, "max_size": 444}), encoding="utf-8")
    torch.save(written_by(TRANSFORMERS, state), tmp_path / "parts.pth")
    torch.save(written_by(OPENMMLAB, state), tmp_path / "pytorch_model.bin")
    for name in ("parts.pth", "pytorch_model.bin"):
        other = read_checkpoint(tmp_path / name)
        assert [category.name for category in other.categories] == ["class 0", "class 1", "class 2"]
        assert (other.evaluate.short_side, other.config.num_heads) == (800, 8)
    own = read_checkpoint(tmp_path / "model.safetensors")
    assert [category.name for category in own.categories] == ["cat", "dog", "cow"]
    assert (own.evaluate.short_side, own.config.num_heads) == (333, 4)


def test_a_hub_id_without_network_says_which_files_to_put_into_a_folder(monkeypatch):
    import huggingface_hub

    def offline(*_: object, **__: object) -> str:
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"no file or folder 'nobody/none'.*download its config\.json") as found:
        read_checkpoint("nobody/none")
    assert "\n" not in str(found.value)
    with pytest.raises(CheckpointError, match=r"no checkpoint file runs/model\.pth"):
        read_checkpoint("runs/model.pth")


def test_a_mistyped_path_is_not_sent_to_the_hub_unless_it_is_written_so(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []
    folder = tmp_path / "folder"
    state = hugging_face(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, allow_patterns: asked.append(name) or str(folder)
    )
    (tmp_path / "runs").mkdir()
    with pytest.raises(CheckpointError, match=r"no file or folder 'runs/mine' .* written hub:runs/mine"):
        read_checkpoint("runs/mine")
    assert asked == []
    assert_same(read_checkpoint("hub:runs/mine").state, state)
    assert set(asked) == {"runs/mine"}


def test_a_hub_id_is_read_like_the_folder_it_arrives_in(tmp_path, monkeypatch):
    import huggingface_hub

    state = hugging_face(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(tmp_path))
    assert_same(read_checkpoint("somebody/something").state, state)


@pytest.mark.parametrize("kind", ["swin", "resnet", "timm"])
def test_the_real_transformers_model_gives_the_same_logits(kind, tmp_path):
    """Names and values as the installed release writes them, and as its `state_dict()` says them."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    stages = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
    if kind == "swin":
        part = transformers.SwinConfig(
            embed_dim=24, depths=[2, 1, 2, 1], num_heads=[1, 2, 3, 4], window_size=5, **stages
        )
    elif kind == "resnet":
        part = transformers.ResNetConfig(
            hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", **stages
        )
    else:
        part = transformers.TimmBackboneConfig(
            backbone="resnet18", out_indices=[1, 2, 3, 4], use_pretrained_backbone=False
        )
    config = transformers.Mask2FormerConfig(
        backbone_config=part,
        num_labels=3,
        num_queries=5,
        hidden_dim=64,
        feature_size=64,
        mask_feature_size=64,
        encoder_layers=1,
        decoder_layers=3,
        dim_feedforward=24,
        encoder_feedforward_dim=16,
    )
    torch.manual_seed(0)
    theirs = transformers.Mask2FormerForUniversalSegmentation(config).eval()
    theirs.save_pretrained(tmp_path / "folder")
    torch.save(theirs.state_dict(), tmp_path / "memory.pth")
    for source in (tmp_path / "folder", tmp_path / "memory.pth"):
        ours = load_model(source)
        pixels = (IMAGE.float() - ours.pixel_mean) / ours.pixel_std
        with torch.no_grad():
            expected = theirs(pixel_values=pixels)
            prediction = ours(IMAGE).final
        torch.testing.assert_close(prediction.class_logits, expected.class_queries_logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(prediction.mask_logits(), expected.masks_queries_logits, rtol=0, atol=1e-5)


PROCESSORS = [
    ({"size": {"height": 64, "width": 48}}, (96, 80), (64, 64)),
    ({"size": {"height": 64, "width": 48}, "size_divisor": 0}, (96, 80), (64, 48)),
    ({"size": {"shortest_edge": 64, "longest_edge": 128}}, (75, 100), (64, 96)),
    ({"size": {"shortest_edge": 64, "longest_edge": 70}, "size_divisor": 2}, (75, 100), (52, 70)),
    ({"size": {"shortest_edge": 64, "longest_edge": 300}, "size_divisor": 0}, (75, 100), (64, 85)),
    ({"do_resize": False}, (75, 100), (75, 100)),
    ({"size": 64, "max_size": 128}, (100, 75), (96, 64)),
]


@pytest.mark.parametrize(("processor", "size", "expected"), PROCESSORS)
def test_a_folder_of_transformers_runs_at_the_size_of_its_processor(processor, size, expected, tmp_path):
    hugging_face(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    evaluate = read_checkpoint(tmp_path).evaluate
    assert EvaluateConfig.model_validate(evaluate.model_dump()) == evaluate
    assert resize_for_network(np.zeros((*size, 3), np.uint8), evaluate).shape[:2] == expected
    transformers = pytest.importorskip("transformers")
    image = PIL.Image.fromarray(np.zeros((*size, 3), np.uint8))
    theirs = transformers.Mask2FormerImageProcessor(**processor)
    assert theirs(image, return_tensors="pt").pixel_values.shape[2:] == expected


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        ({"resample": 3}, "resample 3 (bicubic) is not supported; images are resized bilinearly"),
        ({"pad_size": {"height": 640, "width": 640}}, "pad_size {'height': 640, 'width': 640} is not supported"),
        ({"do_center_crop": True, "crop_size": 512}, "do_center_crop is not supported; whole images"),
        ({"resample": 2, "do_center_crop": False}, ""),
        ({"resample": 0, "do_resize": False}, ""),
    ],
)
def test_steps_of_a_processor_that_are_not_followed_are_named(processor, message, tmp_path, caplog):
    hugging_face(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    read_checkpoint(tmp_path)
    assert message in caplog.text
    assert ("preprocessor_config.json" in caplog.text) == bool(message)


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        ({"size": {"shortest_edge": 10**9, "longest_edge": 10**9}}, r"size.shortest_edge is 1000000000, expected"),
        ({"size": {"height": 10**6, "width": 10}}, r"size.height is 1000000"),
        ({"size": {"height": 10}}, r"expected height and width"),
        ({"size": {"shortest_edge": "a"}}, r"size.shortest_edge is a"),
        ({"size": [3]}, r"size is \[3\]"),
        ({"size_divisor": -1}, r"size_divisor is -1"),
        ({"rescale_factor": None}, r"rescale_factor is None"),
        ({"rescale_factor": 0}, r"rescale_factor is 0"),
        ({"image_mean": ["a", "b", "c"]}, r"image_mean is .*expected 3 finite numbers"),
        ({"image_mean": [float("nan")] * 3}, r"image_mean is \[nan"),
        ({"image_mean": [0.5]}, r"image_mean is \[0.5\]"),
        ({"image_std": [0, 0, 0]}, r"image_std is \[0, 0, 0\], expected 3 finite numbers above 0"),
    ],
)
def test_a_processor_that_makes_no_sense_is_refused_in_one_line(processor, message, tmp_path):
    hugging_face(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    with pytest.raises(CheckpointError, match=message) as found:
        read_checkpoint(tmp_path)
    assert "\n" not in str(found.value)
