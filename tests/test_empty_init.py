"""Models loaded without initialization equal models that are initialized and then given the weights."""

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from maskwright.checkpoints.checkpoint import Checkpoint, save_checkpoint
from maskwright.checkpoints.load import load_model
from maskwright.checkpoints.readers.weight_file import read_safetensors
from maskwright.config.schema import EvaluateConfig, ModelConfig
from maskwright.errors import CheckpointError
from maskwright.models import build_model
from maskwright.models.empty_init import assign_weights, skip_init
from maskwright.structures.annotations import Category

SMALL = {
    "num_queries": 5,
    "hidden_dim": 32,
    "deformable_points": 2,
    "pixel_decoder_layers": 1,
    "pixel_decoder_feedforward_dim": 48,
    "masked_decoder_layers": 2,
    "masked_decoder_feedforward_dim": 40,
}
SWIN = {
    "backbone": "swin_tiny_patch4_window7_224",
    "backbone_options": {"embed_dim": 24, "depths": [2, 1, 2, 1], "num_heads": [1, 2, 3, 4]},
}
# Each kind of network has its own buffers that no file holds: indices, masks, positions, blur kernels.
MODELS = {
    "resnet": {"backbone": "resnet18"},
    "resnet with trained norms": {"backbone": "resnet18", "backbone_norm": "batch"},
    "blurring resnet": {"backbone": "resnetblur50", "backbone_options": {"layers": [1, 1, 1, 1]}},
    "swin": SWIN,
    "swin with another window": SWIN | {"window_size": 5},
    "semask": SWIN | {"semantic_attention": ["window"] * 4},
    "semask with one window": SWIN | {"semantic_attention": ["global"] * 4},
    "semantic fpn": SWIN | {"family": "semantic_fpn", "semantic_attention": ["window"] * 4},
    "aligned pixel decoder": SWIN | {"pixel_decoder": "msfapn"},
    "swin v2": {"backbone": "swinv2_cr_tiny_ns_224", "backbone_options": {"embed_dim": 24, "depths": [1, 1, 1, 1]}},
    "convnext": {"backbone": "convnext_atto"},
    "tiny vit": {"backbone": "tiny_vit_5m_224"},
    "efficientformer": {"backbone": "efficientformerv2_s0"},
}


def build(**changes: object) -> nn.Module:
    torch.manual_seed(0)
    classes = tuple(Category(n, f"class {n}", True, (n, n, n)) for n in range(3))
    model = build_model(ModelConfig(**(SMALL | changes)), classes).eval()
    for name, buffer in model.named_buffers():  # the initial 0 and 1 would hide a mistake
        if name.endswith("running_mean"):
            buffer.normal_()
    return model


def save(model: nn.Module, path: Path) -> None:
    evaluate = EvaluateConfig(task="semantic")
    save_checkpoint(path, Checkpoint(model.config, model.categories, evaluate, model.state_dict()))


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_a_loaded_model_has_the_same_parameters_buffers_and_predictions(tmp_path, changes):
    model = build(**changes)
    save(model, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors")
    for kind in ("parameters", "buffers"):
        expected, found = (dict(getattr(each, f"named_{kind}")()) for each in (model, loaded))
        assert found.keys() == expected.keys()
        assert [key for key in found if found[key].dtype != expected[key].dtype] == []
        assert [key for key in found if found[key].device != expected[key].device] == []
        assert [key for key in found if not torch.equal(found[key], expected[key])] == []
        assert [key for key in found if found[key].requires_grad != expected[key].requires_grad] == []
    images = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
    with torch.inference_mode():
        expected, found = model(images).final, loaded(images).final
    assert torch.equal(found.class_logits, expected.class_logits)
    if loaded.config.family == "mask2former":
        assert torch.equal(found.mask_features, expected.mask_features)


class RecordCalls(TorchFunctionMode):
    """Record which functions are called on parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if isinstance(args[0] if args else (kwargs or {}).get("tensor"), nn.Parameter):
            self.names.add(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["resnet", "swin", "semask", "aligned pixel decoder", "tiny vit"])
def test_loading_draws_no_weights_and_keeps_the_random_state(tmp_path, name):
    changes = MODELS[name]
    save(build(**changes), tmp_path / "model.safetensors")
    before = torch.get_rng_state()
    with RecordCalls() as calls:
        load_model(tmp_path / "model.safetensors")
    assert {name for name in calls.names if name.endswith("_") and not name.endswith("__")} <= {"requires_grad_"}
    assert torch.equal(torch.get_rng_state(), before)
    with RecordCalls() as calls:
        build(**changes)
    assert calls.names & {"uniform_", "normal_", "kaiming_uniform_"}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_are_memory_mapped_from_the_file(tmp_path):
    model = build(**SWIN)
    save(model, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors")
    mapped = [
        tuple(int(part, 16) for part in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(tmp_path / "model.safetensors"))
    ]
    for parameter in loaded.parameters():
        assert any(start <= parameter.data_ptr() < end for start, end in mapped)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_loaded_model_keeps_no_file_open(tmp_path):
    save(build(**SWIN), tmp_path / "model.safetensors")
    before = len(os.listdir("/proc/self/fd"))
    models = [load_model(tmp_path / "model.safetensors") for _ in range(3)]
    assert len(models) == 3
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_model_is_loaded_to_the_device_asked_for_whatever_the_default_is(tmp_path):
    save(build(**SWIN), tmp_path / "model.safetensors")
    with torch.device("meta"), pytest.raises(NotImplementedError, match="meta tensor"):
        load_model(tmp_path / "model.safetensors", "cpu")


@pytest.mark.parametrize(
    "header",
    [
        {"__metadata__": {"dtype": "F32"}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
        {"__metadata__": None, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
        {"a": ["F32", [1], [0, 4]]},
        {
            "a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
            "b": {"dtype": "I32", "shape": [0], "data_offsets": [4, 4]},
        },
        {"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}},
    ],
)
@pytest.mark.parametrize("padding", [0, 3])  # tensors at odd addresses
def test_unusual_safetensors_files_are_read_as_by_safetensors(tmp_path, header, padding):
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + padding)
    path = tmp_path / "weights.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + np.float32(1.5).tobytes())
    found, expected = read_safetensors(path)[0], safetensors.torch.load_file(path)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        assert found[key].shape == tensor.shape
        assert torch.equal(found[key].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))


def test_training_a_loaded_model_leaves_the_file_and_other_models_alone(tmp_path):
    path = tmp_path / "model.safetensors"
    save(build(**SWIN), path)
    before = path.read_bytes()
    first, second = load_model(path), load_model(path)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(1)
    assert path.read_bytes() == before
    assert all(torch.equal(a, b + 1) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_file_may_be_replaced_while_its_model_is_in_use(tmp_path):
    path, model = tmp_path / "model.safetensors", build(**SWIN)
    save(model, path)
    loaded = load_model(path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    save(model, path)
    assert any(parameter.any() for parameter in loaded.parameters())
    assert not any(parameter.any() for parameter in load_model(path).parameters())


def test_half_precision_weights_are_converted_to_the_dtype_of_the_model(tmp_path):
    model = build(**SWIN)
    save(model, tmp_path / "model.safetensors")
    with safetensors.safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        header = {key: text for key, text in file.metadata().items() if key != "checksum"}
    halves = {key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()}
    safetensors.torch.save_file(halves, tmp_path / "half.safetensors", header)
    loaded = load_model(tmp_path / "half.safetensors")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.pixel_decoder.smooth.conv.weight, model.pixel_decoder.smooth.conv.weight.half().float())


def test_two_names_for_the_same_memory_become_two_weights():
    shared = torch.ones(2)
    layers = nn.ModuleList([nn.LayerNorm(2), nn.LayerNorm(2)])
    assign_weights(layers, dict.fromkeys(layers.state_dict(), shared))
    with torch.no_grad():
        layers[0].weight.zero_()
    assert layers[1].weight.tolist() == [1, 1]


def test_weights_become_contiguous():
    conv = nn.Conv2d(4, 4, 3)
    weight = torch.randn(4, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    assign_weights(conv, {"weight": weight, "bias": torch.zeros(4)})
    assert conv.weight.is_contiguous()
    assert torch.equal(conv.weight, weight)


def test_buffers_are_computed_under_skip_init_and_parameters_can_be_set_after_it():
    with skip_init({}):
        norm = nn.BatchNorm2d(3)
        norm.running_mean.fill_(2)
    assert norm.running_mean.tolist() == [2, 2, 2]
    with torch.no_grad():
        norm.weight.fill_(3)
    assert norm.weight.tolist() == [3, 3, 3]


@pytest.mark.parametrize("size", [(1 << 20, 1 << 10), 1 << 40])
def test_memory_far_beyond_the_weights_is_not_allocated(size):
    with skip_init({"weight": torch.zeros(10)}), pytest.raises(CheckpointError, match="far larger than its weights"):
        torch.empty(size)


def test_an_endless_list_of_parameters_is_refused():
    with skip_init({}), pytest.raises(CheckpointError, match=re.escape("far larger than its weights")):
        nn.ModuleList(nn.LayerNorm(1) for _ in range(1_000_000))
