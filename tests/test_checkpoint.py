"""Weight files: our format, files of the original in all their variants, and files that are refused."""

import hashlib
import io
import json
import os
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

from maskwright.checkpoints import zoo
from maskwright.checkpoints.checkpoint import Checkpoint, save_checkpoint
from maskwright.checkpoints.convert import convert
from maskwright.checkpoints.infer_config import infer_config
from maskwright.checkpoints.key_maps.detectron2 import DETECTRON2
from maskwright.checkpoints.key_maps.key_map import State
from maskwright.checkpoints.key_maps.translate import translate
from maskwright.checkpoints.load import load_model, read_checkpoint
from maskwright.checkpoints.readers.safe_pickle import ALLOWED, Placeholder, read_pickle, scan_instructions
from maskwright.checkpoints.readers.torch_archive import Storage
from maskwright.checkpoints.zoo import published_models
from maskwright.config.recipe import load_recipe
from maskwright.config.schema import EvaluateConfig, ModelConfig
from maskwright.errors import CheckpointError, MaskwrightError
from maskwright.models import build_model
from maskwright.runtime.atomic_write import write_file_atomically
from maskwright.structures.annotations import Category

SWIN = "swin_tiny_patch4_window7_224"
SMALL_SWIN = {"embed_dim": 24, "depths": [2, 1, 2, 1], "num_heads": [1, 2, 3, 4]}
TINY = {
    "backbone": SWIN,
    "backbone_options": SMALL_SWIN,
    "num_queries": 5,
    "hidden_dim": 32,
    "pixel_decoder_layers": 1,
    "pixel_decoder_feedforward_dim": 48,
    "masked_decoder_layers": 3,
    "masked_decoder_feedforward_dim": 40,
}


def build(num_classes: int = 3, **changes: object) -> torch.nn.Module:
    """A small Swin; another backbone as timm has it."""
    torch.manual_seed(0)
    if "backbone" in changes:
        changes = {"backbone_options": {}} | changes
    classes = tuple(Category(7 * n, f"class {n}", n % 2 == 0, (n, 2 * n, 3 * n)) for n in range(num_classes))
    return build_model(ModelConfig(**(TINY | changes)), classes)


def packed(model: torch.nn.Module) -> Checkpoint:
    evaluate = EvaluateConfig(task="semantic", short_side=64, top_k=7)
    return Checkpoint(model.config, model.categories, evaluate, model.state_dict(), None, {"note": "Größe 3"})


# The key map of detectron2 reversed: from our names to those of the original.

_RULES = [(prefix, foreign) for foreign, prefix in DETECTRON2.prefixes]
_PARTS = re.compile(r"(masked_decoder\.layers\.(\d+)\.(?:cross|self)_attention)\.(query|key|value)\.(weight|bias)")


def _pattern(prefix: str) -> re.Pattern[str]:
    numbered = re.escape(prefix).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{j\}", r"(?P<j>\d+)")
    return re.compile(numbered + r"(?P<tail>(\..*)?)")


def foreign_key(key: str) -> str:
    for prefix, foreign in _RULES:
        if match := _pattern(prefix).fullmatch(key):
            return foreign.format(**{n: v for n, v in match.groupdict().items() if n in "ij"}) + match["tail"]
    raise AssertionError(f"no foreign name for {key}")


def to_detectron2(state: State) -> State:
    """A state dict of ours as the original would have saved it, including the entries that are not weights."""
    theirs: State = {"criterion.empty_weight": torch.ones(4)}
    for key, tensor in state.items():
        if part := _PARTS.fullmatch(key):
            if part[3] == "query":
                whole = torch.cat([state[f"{part[1]}.{name}.{part[4]}"] for name in ("query", "key", "value")])
                prefix = next(
                    foreign for foreign, ours in DETECTRON2.split_qkv if part[1].endswith(ours.split(".")[-1])
                )
                theirs[prefix.format(i=part[2]) + part[4]] = whole
        else:
            theirs[foreign_key(key)] = tensor
            if key.endswith("relative_position_bias_table"):
                index = foreign_key(key).replace("bias_table", "index")
                theirs[index] = torch.zeros(49, 49, dtype=torch.int64)
    return theirs


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return build().eval()


@pytest.fixture(scope="module")
def foreign(model) -> State:
    return to_detectron2(model.state_dict())


def assert_same_weights(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def refuse(path: Path) -> str:
    """The message of the refusal; one line, and it names the file."""
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(path)
    message = str(error.value)
    assert "\n" not in message
    assert path.name in message
    return message


# Our format


def test_what_is_saved_comes_back(model, tmp_path):
    made = packed(model)
    made.recipe = load_recipe("demo")
    save_checkpoint(tmp_path / "folder" / "model.safetensors", made)
    found = read_checkpoint(tmp_path / "folder" / "model.safetensors")
    assert_same_weights(found.state, made.state)
    assert (found.config, found.categories, found.evaluate) == (made.config, made.categories, made.evaluate)
    assert (found.recipe, found.provenance, found.dropped) == (made.recipe, made.provenance, [])


def test_a_loaded_model_is_whole_and_predicts_the_same(model, tmp_path):
    save_checkpoint(tmp_path / "model.safetensors", packed(model))
    loaded = load_model(tmp_path / "model.safetensors")
    assert not loaded.training
    assert loaded.config == model.config
    assert loaded.categories == model.categories
    assert loaded.evaluate_config.top_k == 7
    assert loaded.recipe is None
    images = torch.randint(0, 256, (1, 3, 32, 64), dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.equal(loaded(images).final.class_logits, model(images).final.class_logits)


def test_our_file_is_plain_safetensors_with_json_in_its_header(model, tmp_path):
    save_checkpoint(tmp_path / "model.safetensors", packed(model))
    with safetensors.safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        header = file.metadata()
    assert header["format"] == "maskwright-1"
    assert json.loads(header["model"])["backbone"] == SWIN
    assert json.loads(header["categories"])[1] == [7, "class 1", False, [1, 2, 3]]


@pytest.mark.parametrize(
    ("field", "content"),
    [
        *((field, None) for field in ("model", "categories", "evaluate", "recipe", "provenance")),
        *((field, "{") for field in ("model", "categories", "evaluate", "recipe", "provenance")),
        *((field, '{"queries": "many"}') for field in ("model", "categories", "evaluate", "recipe")),
        ("categories", "[[1]]"),
    ],
)
def test_a_damaged_header_of_ours_is_refused(model, tmp_path, field, content):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, packed(model))
    with safetensors.safe_open(path, framework="pt") as file:
        header = file.metadata()
    if content is None:
        del header[field]
    else:
        header[field] = content
    safetensors.torch.save_file(model.state_dict(), path, header)
    assert "header of this maskwright file is damaged" in refuse(path)


def test_weights_that_do_not_fit_their_header_are_refused_with_the_file_and_the_keys(model, tmp_path):
    made = packed(model)
    made.state = {key: value for key, value in made.state.items() if "class_head" not in key}
    made.state["masked_decoder.norm.weight"] = torch.zeros(31)
    made.state["stray"] = torch.zeros(1)
    save_checkpoint(tmp_path / "model.safetensors", made)
    with pytest.raises(CheckpointError) as error:
        load_model(tmp_path / "model.safetensors")
    message = str(error.value)
    assert str(tmp_path / "model.safetensors") in message
    assert "2 missing: masked_decoder.class_head.bias, masked_decoder.class_head.weight" in message
    assert "1 unexpected: stray" in message
    assert "masked_decoder.norm.weight (31,) instead of (32,)" in message


@pytest.mark.parametrize("kind", ["maskwright-training-1", "maskwright-2"])
def test_other_formats_of_ours_are_named(model, tmp_path, kind):
    safetensors.torch.save_file(model.state_dict(), tmp_path / "some.safetensors", {"format": kind})
    assert f"has format {kind}, expected maskwright-1" in refuse(tmp_path / "some.safetensors")


# Atomic writing


def test_nothing_is_left_behind_when_the_writer_fails(tmp_path):
    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        write_file_atomically(tmp_path / "file", fail)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_midway_leaves_the_old_file_as_it_was(model, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"the old one")

    def fill_up(state: State, file: Path, metadata: dict) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", fill_up)
    with pytest.raises(MaskwrightError, match="cannot be written: No space left on device"):
        save_checkpoint(path, packed(model))
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert path.read_bytes() == b"the old one"


def test_a_folder_that_cannot_be_made_is_one_line(model, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(MaskwrightError, match="cannot be written") as error:
        save_checkpoint(tmp_path / "file" / "model.safetensors", packed(model))
    assert "\n" not in str(error.value)


def test_convert_writes_nothing_when_the_source_or_the_suffix_is_wrong(foreign, tmp_path):
    source, target = tmp_path / "source.pth", tmp_path / "out" / "ours.safetensors"
    torch.save({"model": {key: value for key, value in foreign.items() if "mask_embed" not in key}}, source)
    with pytest.raises(CheckpointError):
        convert(source, target)
    with pytest.raises(CheckpointError, match=r"ours\.pth must end in \.safetensors"):
        convert(source, tmp_path / "ours.pth")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["source.pth"]


# The original's files


def arrays(state: State) -> dict[str, np.ndarray]:
    return {key: value.numpy() for key, value in state.items()}


def python2_pickle(content: dict) -> bytes:
    """As Python 2 wrote it: protocol 2, the raw bytes of arrays and the keys as byte strings, numpy's old names."""

    def save_text(pickler: pickle._Pickler, text: str | bytes) -> None:
        data = text.encode("ascii") if isinstance(text, str) else text
        pickler.write(b"T" + len(data).to_bytes(4, "little") + data)
        pickler.memoize(text)

    file = io.BytesIO()
    old = pickle._Pickler(file, protocol=2)
    old.dispatch = pickle._Pickler.dispatch | {str: save_text, bytes: save_text}
    old.dump(content)
    return file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def write_pkl(path: Path, state: State) -> None:
    content = {"model": arrays(state), "__author__": "Third Party", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content))


def write_python2_pkl(path: Path, state: State) -> None:
    path.write_bytes(python2_pickle(arrays(state)))


def write_bare_pth(path: Path, state: State) -> None:
    torch.save(state, path)


def write_training_pth(path: Path, state: State) -> None:
    weights = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weights])
    weights.sum().backward()
    optimizer.step()
    wrapped = {f"module.{key}": value for key, value in state.items()}
    extras = {
        "optimizer": optimizer.state_dict(),
        "iteration": 7,
        "best": np.float64(0.5),
        "seen": np.arange(3),
        "empty": np.zeros(0),
    }
    torch.save({"model": wrapped, **extras}, path)


def write_old_torch(path: Path, state: State) -> None:
    torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=False)


def write_safetensors(path: Path, state: State) -> None:
    safetensors.torch.save_file({key: value.contiguous() for key, value in state.items()}, path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("model_final.pkl", write_pkl),
        ("model_final.pth", write_pkl),
        ("python2.pkl", write_python2_pkl),
        ("bare.pth", write_bare_pth),
        ("bare.pkl", write_bare_pth),
        ("training.pth", write_training_pth),
        ("old.pt", write_old_torch),
        ("model.bin", write_bare_pth),
        ("model.safetensors", write_safetensors),
    ],
)
def test_every_wrapping_of_the_original_gives_the_same_weights(model, foreign, tmp_path, name, write):
    write(tmp_path / name, foreign)
    found = read_checkpoint(tmp_path / name)
    assert_same_weights(found.state, model.state_dict())
    assert found.config == model.config
    assert [category.name for category in found.categories] == ["class 0", "class 1", "class 2"]
    assert found.provenance["layout"] == "detectron2"
    dropped = {key.removeprefix("module."): reason for key, reason in found.dropped}
    assert dropped.pop("criterion.empty_weight") == "class weights of the loss, set by the recipe"
    assert set(dropped.values()) == {"follows from the window size"}


def test_a_converted_file_is_the_same_model(model, foreign, tmp_path):
    write_pkl(tmp_path / "model.pkl", foreign)
    convert(tmp_path / "model.pkl", tmp_path / "ours.safetensors")
    direct, converted = load_model(tmp_path / "model.pkl"), load_model(tmp_path / "ours.safetensors")
    assert_same_weights(converted.state_dict(), direct.state_dict())
    assert converted.config == direct.config
    assert converted.categories == direct.categories


def test_names_of_the_first_releases_are_read(model, foreign, tmp_path):
    old = {
        key.replace("sem_seg_head.pixel_decoder.", "sem_seg_head.").replace("query_feat", "static_query"): value
        for key, value in foreign.items()
    }
    assert "sem_seg_head.predictor.static_query.weight" in old
    assert "sem_seg_head.adapter_1.weight" in old
    write_pkl(tmp_path / "old.pkl", old)
    assert_same_weights(read_checkpoint(tmp_path / "old.pkl").state, model.state_dict())


def test_old_and_new_names_together_are_refused(foreign, tmp_path):
    key = "sem_seg_head.pixel_decoder.adapter_1.weight"
    write_pkl(tmp_path / "both.pkl", {**foreign, "sem_seg_head.adapter_1.weight": foreign[key]})
    assert "become 'pixel_decoder.lateral.conv.weight': old and new names are mixed" in refuse(tmp_path / "both.pkl")


def test_unknown_entries_are_listed(foreign, tmp_path):
    strange = {f"sem_seg_head.predictor.strange_{n:02}": torch.zeros(1) for n in range(15)}
    write_pkl(tmp_path / "strange.pkl", foreign | strange)
    message = refuse(tmp_path / "strange.pkl")
    assert "15 entries of the detectron2 checkpoint are unknown: sem_seg_head.predictor.strange_00," in message
    assert message.endswith("and 3 more")


def test_missing_entries_are_listed(foreign, tmp_path):
    part = {key: value for key, value in foreign.items() if "layer_1" not in key}
    write_pkl(tmp_path / "part.pkl", part)
    message = refuse(tmp_path / "part.pkl")
    assert "3 missing: pixel_decoder.smooth.conv.weight, pixel_decoder.smooth.norm.bias," in message


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("sem_seg_head.predictor.query_feat.weight", (5,), "do not fit any Mask2Former"),
        ("sem_seg_head.predictor.query_feat.weight", (5, 33), "hidden_dim 33 must be a multiple of 32"),
        ("sem_seg_head.predictor.class_embed.weight", (), "do not fit any Mask2Former"),
        ("sem_seg_head.predictor.decoder_norm.bias", (64,), "masked_decoder.norm.bias (64,) instead of (32,)"),
        (
            "sem_seg_head.predictor.transformer_self_attention_layers.1.self_attn.in_proj_weight",
            (32, 32),
            "is not query, key and value concatenated",
        ),
    ],
)
def test_impossible_shapes_are_refused(foreign, tmp_path, key, shape, message):
    write_pkl(tmp_path / "shapes.pkl", foreign | {key: torch.zeros(shape)})
    assert message in refuse(tmp_path / "shapes.pkl")


@pytest.mark.parametrize(
    ("lacking", "message"),
    [
        ("query_feat", "'masked_decoder.query_features.weight' is missing"),
        ("class_embed", "'masked_decoder.class_head.weight' is missing"),
        ("encoder.layers.0", "'pixel_decoder.layers.0.attention.weights.weight' is missing"),
        ("backbone", "the backbone is neither a ResNet nor a Swin"),
        ("in_proj_weight", "18 missing: masked_decoder.layers.0.cross_attention.key.weight, "),
    ],
)
def test_half_a_model_is_refused_by_what_is_missing(foreign, tmp_path, lacking, message):
    write_pkl(tmp_path / "half.pkl", {key: value for key, value in foreign.items() if lacking not in key})
    assert message in refuse(tmp_path / "half.pkl")


# Architecture from the weights alone


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hidden_dim": 64, "mask_dim": 48, "num_queries": 17, "num_heads": 16, "num_classes": 11},
        {"pixel_decoder_layers": 3, "masked_decoder_layers": 5, "num_classes": 1, "num_queries": 1},
        {"backbone": "resnet18"},
        {"backbone": "resnet34"},
        {"backbone": "resnet50"},
        {"backbone": "resnet101", "backbone_norm": "sync"},
        {"backbone": "resnet18", "backbone_options": {"layers": [1, 2, 1, 3]}},
        {"backbone": "resnet50", "backbone_options": {"layers": [1, 1, 2, 1]}, "backbone_norm": "sync"},
        {"backbone": SWIN},
        {"backbone": SWIN, "window_size": 12},
        {"window_size": 5},
        {"backbone": "swin_small_patch4_window7_224"},
        {"backbone": "swin_base_patch4_window7_224"},
        {"backbone": "swin_base_patch4_window12_384"},
        {"backbone": "swin_large_patch4_window12_384", "num_queries": 200},
    ],
)
def test_the_architecture_follows_from_the_weights(changes):
    with torch.device("meta"):
        model = build(**changes)
        foreign = to_detectron2(model.state_dict())
    translated = translate(foreign, DETECTRON2).state
    assert translated.keys() == model.state_dict().keys()
    config, num_classes = infer_config(translated)
    assert config == model.config
    assert num_classes == changes.get("num_classes", 3)


@pytest.mark.parametrize(
    ("num_classes", "class_list", "first", "task", "semantic_resolution"),
    [
        (133, "coco_panoptic", "person", "panoptic", "output"),
        (80, "coco_instance", "person", "instance", "output"),
        (150, "ade20k", "wall", "semantic", "input"),
        (19, "cityscapes", "road", "semantic", "input"),
        (6, None, "class 0", "panoptic", "output"),
    ],
)
def test_class_lists_are_proposed_but_never_guessed(
    tmp_path, caplog, num_classes, class_list, first, task, semantic_resolution
):
    write_bare_pth(tmp_path / "model.pth", to_detectron2(build(num_classes).state_dict()))
    found = read_checkpoint(tmp_path / "model.pth")
    assert [category.name for category in found.categories] == [f"class {label}" for label in range(num_classes)]
    assert (found.evaluate.task, found.evaluate.short_side, found.evaluate.max_side) == ("panoptic", 800, 1333)
    (line,) = caplog.messages
    assert f"names none of its {num_classes} classes" in line
    assert "task panoptic is assumed" in line
    assert (f"--categories {class_list}" in line) if class_list else "--categories FILE.yaml" in line
    caplog.clear()
    found = read_checkpoint(tmp_path / "model.pth", class_list)
    assert found.categories[0].name == first
    assert len(found.categories) == num_classes
    assert (found.evaluate.task, found.evaluate.semantic_resolution) == (task, semantic_resolution)
    assert bool(caplog.messages) == (class_list is None)


def test_another_list_with_as_many_classes_does_not_bring_published_settings(tmp_path):
    write_bare_pth(tmp_path / "model.pth", to_detectron2(build(19).state_dict()))
    own = [{"id": number, "name": f"mine {number}"} for number in range(19)]
    (tmp_path / "own.yaml").write_text(json.dumps(own), encoding="utf-8")
    found = read_checkpoint(tmp_path / "model.pth", str(tmp_path / "own.yaml"))
    assert (found.categories[0].name, found.evaluate.task) == ("mine 0", "panoptic")


def test_a_published_file_is_recognized_by_its_name_or_its_digest(tmp_path, caplog, monkeypatch):
    weights = to_detectron2(build(19).state_dict())
    name = "mask2former-resnet50-cityscapes-semantic"
    entry = published_models()[name]
    for path in (tmp_path / entry.file, tmp_path / "renamed.pth"):
        write_bare_pth(path, weights)
        start = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()[:6]
        entries = {name: entry.model_copy(update={"md5": start})}
        monkeypatch.setattr(zoo, "published_models", lambda entries=entries: entries)
        found = read_checkpoint(path)
        assert (found.categories[0].name, found.evaluate.task) == ("road", "semantic")
        assert f"are those of {name}, by its {'file name' if path.name == entry.file else 'digest'}" in caplog.text
        caplog.clear()
    monkeypatch.setattr(zoo, "published_models", lambda: {name: entry})
    assert read_checkpoint(tmp_path / "renamed.pth").categories[0].name == "class 0"
    assert read_checkpoint(tmp_path / entry.file).categories[0].name == "road"
    assert "by its file name, although its digest is another" in caplog.text


def test_a_class_list_of_another_length_or_an_unknown_one_is_refused(foreign, tmp_path):
    write_bare_pth(tmp_path / "model.pth", foreign)
    with pytest.raises(CheckpointError, match="the weights have 3 classes, but the class list 'cityscapes' has 19"):
        read_checkpoint(tmp_path / "model.pth", "cityscapes")
    with pytest.raises(MaskwrightError, match="nearest built-in list: cityscapes"):
        read_checkpoint(tmp_path / "model.pth", "cityscape")


# Other files, and malicious ones


class Evil:
    """Pickles to a call."""

    def __init__(self, function: object, *arguments: str) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


def evil(kind: str, marker: Path) -> object:
    run, evaluate = Evil(os.system, f"touch {marker}"), Evil(eval, f"open({str(marker)!r}, 'w')")
    return {
        "a command": run,
        "an expression": evaluate,
        "nested": {"model": {"good": np.zeros(2), "list": [1, (2, evaluate)]}},
        "in an array": {"model": np.array([run], dtype=object)},
        "as a key": {run: 1},
    }[kind]


NAMES = {
    "a command": "system",
    "an expression": "eval",
    "nested": "eval",
    "in an array": "system",
    "as a key": "system",
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".pt", ".bin", ".zip.pth", ".zip.pkl"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickles_that_call_something_are_refused_by_name_and_nothing_runs(tmp_path, kind, suffix, protocol):
    path, marker = tmp_path / f"model{suffix}", tmp_path / "it ran"
    content = pickle.dumps(evil(kind, marker), protocol)
    if "zip" in suffix:
        content = as_torch_zip(content)
    path.write_bytes(content)
    message = refuse(path)
    assert re.search(rf"refused: it calls (\w+\.)?{NAMES[kind]}, which weights never need", message)
    assert not marker.exists()


def as_torch_zip(pickled: bytes) -> bytes:
    """A file of `torch.save` whose data.pkl is replaced."""
    genuine, forged = io.BytesIO(), io.BytesIO()
    torch.save({"a": torch.zeros(2)}, genuine)
    with zipfile.ZipFile(genuine) as source, zipfile.ZipFile(forged, "w") as target:
        for name in source.namelist():
            target.writestr(name, pickled if name.endswith("data.pkl") else source.read(name))
    return forged.getvalue()


BROKEN = {
    "empty": b"",
    "a web page": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "text": b"hello, world",
    "a pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
    "a picture": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    "a zip of something else": b"PK\x03\x04" + bytes(200),
    "zeros": bytes(5000),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".pt", ".bin", ".safetensors", ""])
def test_other_files_are_refused(tmp_path, content, suffix):
    (tmp_path / f"model{suffix}").write_bytes(content)
    refuse(tmp_path / f"model{suffix}")


WRITERS = {".pkl": write_pkl, ".pth": write_bare_pth, ".safetensors": write_safetensors}


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("share", [0.001, 0.3, 0.9, 0.9999])
def test_files_that_are_cut_off_are_refused(foreign, tmp_path, suffix, share):
    path = tmp_path / f"model{suffix}"
    WRITERS[suffix](path, foreign)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    assert re.search("truncated|damaged", refuse(path))


@pytest.mark.parametrize("form", ["foreign .pth", "own .safetensors"])
def test_a_flipped_bit_is_noticed_or_changes_nothing(model, foreign, tmp_path, form):
    path = tmp_path / f"model{form.split()[1]}"
    if form.startswith("own"):
        save_checkpoint(path, packed(model))
    else:
        write_bare_pth(path, foreign)
    whole, expected = path.read_bytes(), read_checkpoint(path).state
    rng = np.random.default_rng(0)
    ends = [*range(8), *range(len(whole) - 8, len(whole))]  # lengths and magic numbers
    noticed = 0
    for position in [*rng.integers(0, len(whole), 30).tolist(), *rng.integers(0, 4000, 10).tolist(), *ends]:
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        try:
            found = read_checkpoint(path).state
        except CheckpointError as error:
            assert path.name in str(error)  # noqa: PT017 - the other outcome is fine, too
            noticed += 1
        else:
            assert_same_weights(found, expected)
    assert noticed > 30


def test_a_changed_weight_in_a_zip_is_noticed_by_its_checksum(foreign, tmp_path):
    write_bare_pth(tmp_path / "model.pth", foreign)
    content = bytearray((tmp_path / "model.pth").read_bytes())
    weights = max(foreign.values(), key=torch.Tensor.numel).contiguous().numpy().tobytes()
    start = content.index(weights)
    content[start + len(weights) // 2] ^= 1
    (tmp_path / "model.pth").write_bytes(content)
    assert "damaged" in refuse(tmp_path / "model.pth")


def test_tuples_that_double_again_and_again_are_refused_before_they_are_made():
    doubled = b"\x80\x02)" + b"2\x86" * 20 + b"."  # hashing or comparing it would take a million steps
    with pytest.raises(CheckpointError, match="a tuple of more than 10,000 nested values"):
        scan_instructions(io.BytesIO(doubled))


def test_getattr_of_a_pickle_looks_nothing_up():
    of_itself = b"\x80\x02cbuiltins\ngetattr\ncbuiltins\ngetattr\nX\x08\x00\x00\x00__name__\x86R."
    assert pickle.loads(of_itself) == "getattr"
    assert isinstance(read_pickle(io.BytesIO(of_itself), ALLOWED), Placeholder)


@pytest.mark.parametrize(("start", "count"), [(-1, 1), (0, 3), (8, 1), (4, 2)])
def test_a_storage_that_is_not_within_the_file_is_refused(start, count):
    file = torch.UntypedStorage(8)
    with pytest.raises(ValueError, match="has a storage outside the file"):
        Storage("weight", torch.float32, count, file, start).bytes  # noqa: B018 - computed when it is read
    assert Storage("weight", torch.float32, 2, file, 0).bytes.nbytes() == 8


@pytest.mark.parametrize("position", [0, 1, 9])
def test_flipped_bits_at_the_start_of_a_pickle_are_refused(foreign, tmp_path, position):
    write_pkl(tmp_path / "model.pkl", foreign)
    content = bytearray((tmp_path / "model.pkl").read_bytes())
    content[position] ^= 0x40
    (tmp_path / "model.pkl").write_bytes(content)
    refuse(tmp_path / "model.pkl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2, 3], "holds a list, not a dictionary of weights"),
        ({}, "holds an empty dictionary, not a dictionary of weights"),
        ({"model": {"name": "x", "step": 3}}, "holds no weights, its keys are name, step"),
        ({"model": {"names": np.array(["a", "b"])}}, "entry 'names' has dtype U1, which is not numeric"),
        ({"weight": np.zeros(3), "bias": np.zeros(1)}, "not a checkpoint that maskwright can read"),
    ],
)
def test_pickles_without_weights_are_refused(tmp_path, content, message):
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(content))
    assert message in refuse(tmp_path / "model.pkl")


def test_another_model_is_refused_by_its_keys(tmp_path):
    write_safetensors(tmp_path / "other.safetensors", timm.create_model("resnet18").state_dict())
    assert "the weights of a ResNet alone, which is only a backbone" in refuse(tmp_path / "other.safetensors")


def test_an_absent_file_and_a_folder_are_refused(tmp_path):
    assert "no checkpoint file" in refuse(tmp_path / "nothing.pkl")
    (tmp_path / "folder.pth").mkdir()
    refuse(tmp_path / "folder.pth")
