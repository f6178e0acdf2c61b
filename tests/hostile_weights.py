"""Weight files that are broken, false or dangerous, and a runner that tries to use each of them.

    python -m tests.hostile_weights FOLDER

makes the files in FOLDER, converts each of them in this one process, with little memory to spare, and writes a line of
JSON for each: name, what the message must say, kind of error, message, CPU seconds, and what was left behind. A bomb
that goes off ends the process, so its line and those behind it are absent.
"""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
import resource
import struct
import sys
import tarfile
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.torch
import timm
import torch
import torchvision

from maskwright.checkpoints.checkpoint import save_checkpoint
from maskwright.checkpoints.convert import convert
from maskwright.errors import CheckpointError
from tests.test_checkpoint import build, packed, to_detectron2

SPARE_BYTES = 3 << 30  # of address space, beyond what the process has before it reads the first file
CPU_SECONDS = 300  # for all files; each is asked for a few seconds at most

State = dict[str, torch.Tensor]


class Call:
    """Pickles to a call, and to a BUILD of `state` on its result unless that is None."""

    def __init__(self, function: Callable | str, *arguments: object, state: object = None) -> None:
        self.function, self.arguments, self.state = function, arguments, state

    def __reduce__(self) -> tuple:
        return self.function, self.arguments, self.state


def calls(canary: Path) -> dict[str, object]:
    """Objects whose unpickling would make the canary."""
    touch, opened = f"touch {canary}", f"open({str(canary)!r}, 'w')"
    return {
        "os_system": Call(os.system, touch),
        "eval": Call(eval, opened),
        "exec": Call(exec, opened),
        "partial": functools.partial(os.system, touch),
        "getattr": Call(getattr, os, "getcwd"),
        "import": Call(__import__, "antigravity"),
        "torch_load": Call(torch.load, str(canary)),
        "torch_hub": Call(torch.hub.load, str(canary), "x"),
        "torch_jit": Call(torch.jit.load, str(canary)),
        "numpy_load": Call(np.load, str(canary)),
        "whole_module": torch.nn.Linear(2, 2),
    }


def pickled(content: object, protocol: int) -> bytes:
    """Modules are no more than names here, as in what attackers write by hand."""

    class Pickler(pickle.Pickler):
        def reducer_override(self, value: object) -> object:
            return (__import__, ("os",)) if value is os else NotImplemented

    file = io.BytesIO()
    Pickler(file, protocol).dump(content)
    return file.getvalue()


def torch_zip(data: bytes, storages: dict[str, bytes] | None = None, packing: int = zipfile.ZIP_STORED) -> bytes:
    """An archive as `torch.save` writes it, around any pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", packing) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", "little")
        for key, content in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", content)
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def saved(content: object, **options: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def legacy(pickle_of_content: bytes, keys: list[str], storages: bytes = b"") -> bytes:
    """As PyTorch wrote before 1.6, around any pickle."""
    parts = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}})
    return b"".join(pickle.dumps(part, 2) for part in parts) + pickle_of_content + pickle.dumps(keys, 2) + storages


def stored_tensor(
    count: int, size: tuple[int, ...], stride: tuple[int, ...], key: str = "0", attributes: object = None
) -> bytes:
    """The pickle of {"weight": tensor} that `torch.save` would write, with any sizes, and attributes set on it."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: object) -> object:
            return ("storage", torch.FloatStorage, key, "cpu", count) if value is storage else None

    storage, file = object(), io.BytesIO()
    rebuild = torch._utils._rebuild_tensor_v2
    Pickler(file, 2).dump({"weight": Call(rebuild, storage, 0, size, stride, False, OrderedDict(), state=attributes)})
    return file.getvalue()


def doubled(levels: int, first: bytes, join: bytes, protocol: int = 2) -> bytes:
    """A pickle of a thing that holds itself twice, again and again; `join` makes one of two."""
    return b"\x80" + bytes([protocol]) + first + (b"q\x01h\x01" + join) * levels


def header(table: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header."""
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start: int, end: int, shape: list, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def flipped(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 0x10]) + content[position + 1 :]


def corpus(folder: Path, canary: Path) -> dict[str, str]:
    """Write all files; returns what each message must say, by file name."""
    expected: dict[str, str] = {}

    def add(name: str, content: bytes, message: str) -> None:
        (folder / name).write_bytes(content)
        expected[name] = message

    _add_calls(add, canary)
    _add_bombs(add)
    _add_false_safetensors(add)
    _add_damaged(add, folder)
    _add_other_models(add)
    _add_impossible_models(add, folder)
    _add_no_weights(add, folder, expected)
    return expected


Add = Callable[[str, bytes, str], None]


def _add_calls(add: Add, canary: Path) -> None:
    for name, call in calls(canary).items():
        message = "refused: it calls " if name != "getattr" else "refused: it calls builtins.__import__"
        for protocol in range(6):
            add(f"{name}_{protocol}.pkl", pickled({"model": {"weight": call}}, protocol), message)
        add(f"{name}_zip.pth", torch_zip(pickled({"state_dict": {"a": 1, "b": [call]}}, 2)), message)
        add(f"{name}_zip4.pth", torch_zip(pickled({call: 1} if name == "eval" else [call], 4)), message)
        add(f"{name}_legacy.pt", legacy(pickled(call, 2), []), message)
    array = pickled({"model": np.array([Call(os.system, f"touch {canary}")], dtype=object)}, 3)
    add("in_an_object_array.pkl", array, "refused: it calls ")
    add("twice.pkl", b"\x80\x02cos\nsystem\nq\x00X\x02\x00\x00\x00ls\x85R.", "refused: it calls os.system")
    add("old_instance.pkl", b"(S'ls'\nios\nsystem\n.", "refused: it calls os.system")
    add("extension.pkl", b"\x80\x02\x82\x01)R.", "damaged or not a weight file")
    add("changes_a_function.pkl", b"\x80\x02c_codecs\nencode\n}X\x08\x00\x00\x00__code__Nsb.", "modifies a function")
    add(
        "a_name_of_two_lines.pkl",
        b"\x80\x04\x8c\x04os\n\x1b\x8c\x04a\nbc\x93)R.",
        "refused: it calls os\\n\\x1b.a\\nbc",
    )
    add("called_placeholder.pkl", b"\x80\x02cbuiltins\ngetattr\n)R)R.", "damaged or not a weight file")


def _add_bombs(add: Add) -> None:
    add("memo.pkl", b"\x80\x02Nr\xff\xff\xff\x7f.", "memo index 2,147,483,647 after 3 instructions")
    add("memo_text.pkl", b"Np999999999999\n.", "memo index 999,999,999,999")
    add("memo_zip.pth", torch_zip(b"\x80\x02Nr\xff\xff\xff\x7f."), "memo index")
    key = doubled(60, b"N", b"\x86") + b"q\x02}h\x02Ns."
    add("tuples_as_key.pkl", key, "a tuple of more than")
    add("tuples_as_key.pth", torch_zip(key), "a tuple of more than")
    add("deep_tuples.pkl", b"\x80\x02)" + b"\x85" * 1_000_000 + b"q\x02}h\x02Ns.", "a tuple of more than")
    add("deep_lists.pkl", b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".", "holds a list, not a dictionary")
    add("stack.pkl", b"\x80\x02" + b"(" * 2_100_000 + b".", "more than 2,000,000 instructions")
    hexadecimal = b"\x80\x02X\x01\x00\x00\x00a" + b"q\x01c_codecs\nencode\nh\x01X\x03\x00\x00\x00hex\x86R" * 45
    add("encoded_again.pkl", hexadecimal + b".", "damaged or not a weight file")
    add("bytes_of_a_number.pkl", b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\0\0\0\0\0\x01\x85R.", "damaged")
    # PyTorch's own reader accepts these two: its allow-list has the functions themselves.
    add("encoded_again.pth", torch_zip(hexadecimal + b"."), "damaged or not a weight file")
    add(
        "bytes_of_a_number.pth", torch_zip(b"\x80\x02cbuiltins\nbytearray\nJ\0\0\0\x7f\x85R."), "bytearray of something"
    )
    add("bytes_that_are_not_there.pkl", b"\x80\x04\x8e" + struct.pack("<Q", 1 << 42) + b"x", "damaged")
    array = pickled({"model": {"weight": np.zeros(4, np.float32)}}, 2)
    assert b"K\x04" in array
    add("array_without_data.pkl", array.replace(b"K\x04", b"J\xff\xff\xff\x7f"), "entry 'weight' has shape")
    repeated = io.BytesIO()
    numbers = np.zeros(1 << 20, np.float32)
    pickle.dump({"model": {f"weight{n}": numbers for n in range(400)}}, repeated, 4)
    add("one_array_many_names.pkl", repeated.getvalue(), "its tensors claim far more bytes than the file has")
    inner = legacy(pickled(Call(os.system, "ls"), 2), [])
    add("file_in_a_pickle.pkl", pickled({"a": Call(torch.storage._load_from_bytes, inner)}, 2), "it calls ")
    one = io.BytesIO()
    torch.save(torch.zeros(1 << 18).untyped_storage(), one, _use_new_zipfile_serialization=False)
    add("one_file_in_a_pickle_again.pkl", _repeated(one.getvalue(), 30_000), "holds a list, not")
    four = struct.pack("<4f", 1, 2, 3, 4)
    claims = "but its storage holds 4 values"
    add("expanded.pth", torch_zip(stored_tensor(4, (1 << 40,), (0,)), {"0": four}), claims)
    add("beyond_its_storage.pth", torch_zip(stored_tensor(4, (2, 4), (4, 1)), {"0": four}), claims)
    add("false_count.pth", torch_zip(stored_tensor(1 << 40, (4,), (1,)), {"0": four}), "storage 0 has 16 bytes")
    add("absent_storage.pth", torch_zip(stored_tensor(4, (4,), (1,), "9"), {"0": four}), "KeyError")
    add("negative.pth", torch_zip(stored_tensor(4, (-4,), (1,)), {"0": four}), "sizes (-4,)")
    add(
        "false_count.pt",
        legacy(stored_tensor(1 << 40, (4,), (1,)), ["0"], struct.pack("<q", 4) + four),
        "storage 0 has 4",
    )
    add("absent_storage.pt", legacy(stored_tensor(4, (4,), (1,)), []), "has a storage outside the file")
    _add_attributes(add, four)
    zeros = {"0": bytes(1 << 26)}
    packed_zip = torch_zip(stored_tensor(1 << 24, (1 << 24,), (1,)), zeros, zipfile.ZIP_DEFLATED)
    add("zip_bomb.pth", packed_zip, "is compressed (")
    add("zip_with_false_sizes.pth", _false_sizes(torch_zip(stored_tensor(4, (4,), (1,)), {"0": four})), "refused: ")
    add(
        "zip_with_false_places.pth",
        _false_places(torch_zip(stored_tensor(4, (4,), (1,)), {"0": four})),
        "no local header of entry",
    )
    many = io.BytesIO()
    with zipfile.ZipFile(many, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps({f"weight{n}": n for n in range(200_000)}, 2))
    add("many_entries.pth", many.getvalue(), "holds 200,000 entries")


def _add_attributes(add: Add, four: bytes) -> None:
    """Pickles that set attributes of the objects that stand for tensors, storages and arrays while they are read."""
    for name, value in {
        "offset": -1,
        "size": "x",
        "stride": (1 << 70,),
        "dtype": None,
        "tensor": 1,
        "storage": 0,
    }.items():
        content = torch_zip(stored_tensor(4, (4,), (1,), attributes={name: value}), {"0": four})
        add(f"tensor_{name}.pth", content, "a tensor with attributes of its own")
    storage = b"\x80\x02(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuK\4tQ"
    add("storage_crc32.pth", torch_zip(storage + b"}X\5\0\0\0crc32K\0sb.", {"0": four}), "attributes of its own")
    add("storage_file.pt", legacy(storage + b"}X\4\0\0\0fileNsb.", ["0"]), "attributes of its own")
    array = np.zeros(4, np.float32).__reduce__()
    for name, state in {"shape": (1, "x", np.dtype("f4"), False, b""), "dtype": (1, (4,), 5, False, bytes(16))}.items():
        content = {"model": {"weight": Call(array[0], *array[1], state=state)}}
        add(f"array_{name}.pkl", pickled(content, 2), "entry 'weight' ")


def _repeated(content: bytes, times: int) -> bytes:
    """A pickle that loads the same bytes again and again into a list."""
    start = b"\x80\x04ctorch.storage\n_load_from_bytes\nq\x00B" + struct.pack("<I", len(content)) + content
    return start + b"q\x010]" + b"h\x00h\x01\x85Ra" * times + b"."


def _false_sizes(archive: bytes) -> bytes:
    """In the table at the end, the last storage claims 3 GB."""
    place = archive.rindex(b"PK\x01\x02", 0, archive.rindex(b"archive/data/0"))
    return archive[: place + 20] + struct.pack("<II", 3 << 30, 3 << 30) + archive[place + 28 :]


def _false_places(archive: bytes) -> bytes:
    """In the table at the end, the storage begins one byte later."""
    place = archive.rindex(b"PK\x01\x02", 0, archive.rindex(b"archive/data/0"))
    start = struct.unpack("<I", archive[place + 42 : place + 46])[0]
    return archive[: place + 42] + struct.pack("<I", start + 1) + archive[place + 46 :]


def _add_false_safetensors(add: Add) -> None:
    broken = "truncated or not a safetensors file"
    add("header_of_2_to_60.safetensors", header({}, length=1 << 60), broken)
    add("header_of_2_to_64.safetensors", header({}, length=(1 << 64) - 1), broken)
    add("header_longer_than_the_file.safetensors", header({}, length=100), broken)
    two = {"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}
    add("overlap.safetensors", header(two, bytes(12)), broken)
    add("past_the_end.safetensors", header({"a": entry(0, 80, [20])}, bytes(8)), broken)
    add("far_past_the_end.safetensors", header({"a": entry(0, 1 << 62, [1 << 60])}, bytes(8)), broken)
    add("negative.safetensors", header({"a": entry(-8, 0, [2])}, bytes(8)), broken)
    add("backwards.safetensors", header({"a": entry(8, 0, [2])}, bytes(8)), broken)
    add("gap.safetensors", header({"a": entry(0, 8, [2]), "b": entry(16, 24, [2])}, bytes(24)), broken)
    add("trailing.safetensors", header({"a": entry(0, 8, [2])}, bytes(4096)), broken)
    add("huge_shape.safetensors", header({"a": entry(0, 8, [1 << 62, 1 << 62])}, bytes(8)), broken)
    add("other_shape.safetensors", header({"a": entry(0, 8, [3])}, bytes(8)), broken)
    add("wrong_dtype.safetensors", header({"a": entry(0, 8, [2], "F31")}, bytes(8)), broken)
    add("odd_dtype.safetensors", header({"a": entry(0, 8, [8], "F8_E8M0")}, bytes(8)), "not a checkpoint that")
    add("fractions.safetensors", header({"a": entry(0, 8, [2.5])}, bytes(8)), broken)
    twice = (
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    )
    add("twice_the_same_key.safetensors", header(twice, bytes(8)), "not a checkpoint that maskwright can read")
    add(
        "not_utf8.safetensors",
        header(b'{"\xff\xfe":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
        broken,
    )
    add("deep.safetensors", header(b'{"a":' * 100_000 + b"{}" + b"}" * 100_000), broken)
    add("not_json.safetensors", header(b"{" + b"x" * 63), broken)
    add("a_list.safetensors", header(b"[1, 2, 3]"), broken)
    add("no_entry.safetensors", header({}), "not a checkpoint that maskwright can read")
    add(
        "numbers_in_metadata.safetensors",
        header({"__metadata__": {"format": 5}, "a": entry(0, 8, [2])}, bytes(8)),
        broken,
    )
    nothing = {f"weight{n}": entry(0, 0, [0]) for n in range(150_000)}
    add("many_entries.safetensors", header(nothing), "holds 150,000 entries")
    add("eight_bytes.safetensors", struct.pack("<Q", 2), broken)
    add("keys_of_two_lines.safetensors", header({"a\nb\x1b[31m": entry(0, 8, [2])}, bytes(8)), "a\\nb\\x1b[31m")
    add("a_long_key.safetensors", header({"a" * 1_000_000: entry(0, 8, [2])}, bytes(8)), "aaa...")


def _add_damaged(add: Add, folder: Path) -> None:
    model = build()
    save_checkpoint(folder / "whole", packed(model))
    ours, theirs = (folder / "whole").read_bytes(), to_detectron2(model.state_dict())
    (folder / "whole").unlink()
    plain = safetensors.torch.save(theirs)
    arrays = pickle.dumps({"model": {key: value.numpy() for key, value in theirs.items()}})
    zipped, old = saved(theirs), saved(theirs, _use_new_zipfile_serialization=False)
    wholes = {"ours.safetensors": ours, "theirs.safetensors": plain, "a.pkl": arrays, "a.pth": zipped, "old.pt": old}
    for name, whole in wholes.items():
        for share in (0.0005, 0.02, 0.5, 0.99, 0.9999):
            add(f"cut_at_{share}_{name}", whole[: int(len(whole) * share)], "; download or copy it again")
        add(f"begins_with_zeros_{name}", bytes(4096) + whole[4096:], "begins with zeros")
    add("flipped_ours.safetensors", flipped(ours, len(ours) - 5), "damaged: its content has changed")
    name = ours.index(b"class 1")
    add("flipped_header_ours.safetensors", flipped(ours, name), "damaged: its content has changed")
    add("flipped_a.pth", flipped(zipped, len(zipped) // 2), "is damaged: the bytes of")
    place = zipped.index(b"sem_seg_head")
    add("flipped_table_a.pth", flipped(zipped, place), "damaged: ")
    add("flipped_start_a.pkl", flipped(arrays, 12), "damaged or not a weight file")
    add("flipped_start_theirs.safetensors", flipped(plain, 9), "truncated or not a safetensors file")


def _add_other_models(add: Add) -> None:
    with torch.device("meta"):
        resnet, swin = (timm.create_model(name).state_dict() for name in ("resnet18", "swin_tiny_patch4_window7_224"))
        regions = torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
    others = {
        "resnet": (_named(*resnet), "the weights of a ResNet alone, which is only a backbone; to start training"),
        "swin": (_named(*swin), "the weights of a Swin alone"),
        "detr": (_named("transformer.decoder.layers.0.multihead_attn.in_proj_weight", "query_embed.weight"), "of DETR"),
        "hf_detr": (
            _named("model.decoder.layers.0.encoder_attn.q_proj.weight", "class_labels_classifier.bias"),
            "of DETR",
        ),
        "maskformer": (
            _named(
                "sem_seg_head.predictor.query_embed.weight",
                "sem_seg_head.predictor.transformer.decoder.layers.0.linear1.weight",
            ),
            "the weights of MaskFormer; use a checkpoint of Mask2Former, SeMask or EoMT",
        ),
        "mask_rcnn": (_named(*regions), "the weights of Mask R-CNN"),
        "sam": (
            _named("image_encoder.blocks.0.norm1.weight", "mask_decoder.transformer.layers.0.norm1.bias"),
            "Segment",
        ),
        "unknown": (_named("encoder.weight", "decoder.weight"), "not a checkpoint that maskwright can read"),
    }
    for name, (state, message) in others.items():
        add(f"{name}.pth", saved({"model": state}), message)
        add(f"{name}.safetensors", safetensors.torch.save(dict(state)), message)


def _named(*keys: str) -> State:
    return {key: torch.zeros(2, 2) for key in keys}


def _add_impossible_models(add: Add, folder: Path) -> None:
    theirs = to_detectron2(build().state_dict())
    head, table = (
        "sem_seg_head.predictor.class_embed.weight",
        "backbone.layers.0.blocks.0.attn.relative_position_bias_table",
    )
    cases: dict[str, tuple[State, str]] = {
        "nan": (
            {head: torch.full((4, 32), torch.nan)},
            "1 of its weights have NaN or infinite values: masked_decoder.cl",
        ),
        "infinite": ({head: torch.full((4, 32), -torch.inf)}, "1 of its weights have NaN or infinite values"),
        "integers": (
            {head: torch.ones(4, 32, dtype=torch.int8)},
            "1 not floating-point: masked_decoder.class_head.weight",
        ),
        "booleans": ({head: torch.ones(4, 32, dtype=torch.bool)}, "1 not floating-point"),
        "complex": ({head: torch.ones(4, 32, dtype=torch.complex64)}, "1 not floating-point"),
        "no_classes": ({head: torch.zeros(0, 32)}, "1 of its weights are empty: masked_decoder.class_head.weight"),
        "endless_classes": ({head: torch.zeros(1 << 50, 0)}, "1 of its weights are empty"),
        "endless_layers": (
            {f"sem_seg_head.pixel_decoder.transformer.encoder.layers.{10**12}.norm1.bias": torch.zeros(32)},
            "far larger than its weights",
        ),
        "huge_window": ({table: torch.zeros(1023 * 1023, 1)}, "with another shape: backbone.stages.0"),
        "no_weights_but_one": ({}, "incomplete Mask2Former"),
    }
    for name, (changes, message) in cases.items():
        state = theirs | changes if changes else _named("sem_seg_head.predictor.query_embed.weight")
        add(f"{name}.pth", saved(state), message)
    add("sparse.pth", saved(theirs | {head: torch.eye(4, 32).to_sparse()}), "holds sparse tensors; save")
    quantized = torch.quantize_per_tensor(torch.ones(4, 32), 0.1, 0, torch.qint8)
    add("quantized.pth", saved(theirs | {head: quantized}), "holds quantized tensors; save")
    add(
        "meta.pth",
        saved(theirs | {head: torch.empty(4, 32, device="meta")}),
        "tensors without data (of the meta device)",
    )
    _add_false_headers(add, folder)


def _add_false_headers(add: Add, folder: Path) -> None:
    """Our own format with a header that tells something else."""
    made = packed(build())
    config = made.config
    options = config.backbone_options
    changes = {
        "queries": config.model_copy(update={"num_queries": 10**12}),
        "width": config.model_copy(update={"hidden_dim": 32 * 10**9}),
        "layers": config.model_copy(update={"pixel_decoder_layers": 10**9}),
        "window": config.model_copy(update={"window_size": 300}),
        "depths": config.model_copy(update={"backbone_options": options | {"depths": [10**7, 1, 2, 1]}}),
        "still": config.model_copy(update={"pixel_std": (0.0, 1.0, 1.0)}),
        "backbone": config.model_copy(update={"backbone": "vit_giant_patch14_224", "backbone_options": {}}),
        "unknown_backbone": config.model_copy(update={"backbone": "hf-hub:somebody/something"}),
        "download": config.model_copy(update={"backbone_options": options | {"pretrained": True}}),
        "second_file": config.model_copy(update={"backbone_options": options | {"checkpoint_path": "/etc/passwd"}}),
    }
    messages = {"unknown_backbone": "timm has no model 'hf-hub:somebody/something'", "window": "with another shape"}
    messages |= {name: "would load weights" for name in ("download", "second_file")}
    messages |= {"still": "header of this maskwright file is damaged", "backbone": "larger than its weights"}
    for name, false in changes.items():
        made.config = false
        save_checkpoint(folder / f"header_{name}.safetensors", made)
        content = (folder / f"header_{name}.safetensors").read_bytes()
        add(f"header_{name}.safetensors", content, messages.get(name, "far larger than its weights"))
    deep = "[" * 100_000 + "]" * 100_000
    texts = {"categories": deep, "provenance": deep, "model": deep, "evaluate": '{"task": "none"}', "recipe": "{}"}
    state = {key: value.contiguous() for key, value in made.state.items()}
    with safetensors.safe_open(folder / "header_queries.safetensors", framework="pt") as file:
        metadata = file.metadata()
    for name, text in texts.items():
        content = safetensors.torch.save(state, metadata | {name: text})
        add(f"header_text_{name}.safetensors", content, "the header of this maskwright file is damaged: ")


def _add_no_weights(add: Add, folder: Path, expected: dict[str, str]) -> None:
    page = b"<!DOCTYPE html><html><head><title>Sign in</title></head><body>404</body></html>"
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 176437952\n"
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    arrays = io.BytesIO()
    np.savez(arrays, weight=np.zeros(3))
    script = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), script)
    contents = {
        "empty": (b"", "is empty (0 bytes)"),
        "page": (page, "a web page"),
        "pointer": (pointer, "a Git LFS pointer"),
        "text": (b"These are the weights that you asked for.\n", "text, not weights"),
        "json": (b'{"error": "not found"}\n', "JSON text"),
        "picture": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(64), "an image"),
        "packed": (b"\x1f\x8b\x08\0" + bytes(64), "a compressed archive"),
        "tar": (archive.getvalue(), "a tar archive"),
        "npz": (arrays.getvalue(), "a zip archive without PyTorch weights (it contains weight.npy)"),
        "torchscript": (script.getvalue(), "a TorchScript program"),
        "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(64), "weights of another framework"),
        "zeros": (bytes(5000), "begins with zeros"),
        "noise": (np.random.default_rng(0).bytes(5000), "; download or copy it again"),
    }
    for name, (content, message) in contents.items():
        for suffix in (".pth", ".safetensors"):
            add(f"{name}{suffix}", content, message)
    empties = {
        "empty_dictionary": ({}, "holds an empty dictionary, not"),
        "list": ([1, 2], "holds a list, not"),
        "none": (None, "holds a NoneType, not"),
        "empty_inside": ({"model": {}}, "holds no weights, its keys are model"),
        "text_only": ({"a": "b"}, "holds no weights, its keys are a"),
    }
    for name, (content, message) in empties.items():
        add(f"{name}.pkl", pickle.dumps(content), message)
        add(f"{name}_torch.pth", saved(content), message)
    (folder / "folder.pth").mkdir()
    (folder / "loop.pth").symlink_to(folder / "loop.pth")
    (folder / "nowhere.pth").symlink_to(folder / "absent.pth")
    os.mkfifo(folder / "pipe.pth")
    expected |= {
        "folder.pth": "a folder",
        "loop.pth": "a broken symlink",
        "nowhere.pth": "a broken symlink",
        "absent.pth": "no checkpoint file",
        "pipe.pth": "neither a file nor a folder",
    }


def main(folder: Path) -> None:
    canary = folder / "canary"
    (folder / "files").mkdir()
    expected = corpus(folder / "files", canary)
    before = set((folder / "files").iterdir())
    with (folder / "warm.pth").open("wb") as file:  # what is imported on first use needs room too
        torch.save({}, file)
    try_to_convert(folder / "warm.pth", folder / "out" / "ours.safetensors")
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    if pages:
        limit = pages * resource.getpagesize() + SPARE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    for name, message in expected.items():
        start = time.process_time()
        kind, found = try_to_convert(folder / "files" / name, folder / "out" / "ours.safetensors")
        seconds = time.process_time() - start
        left = [str(path.name) for path in (canary, *(folder / "out").rglob("*")) if path.exists()]
        left += [path.name for path in set((folder / "files").iterdir()) - before]
        row = {"name": name, "expected": message, "kind": kind, "message": found, "seconds": seconds, "left": left}
        print(json.dumps(row), flush=True)


def try_to_convert(source: Path, destination: Path) -> tuple[str, str]:
    """(kind of error, message)."""
    try:
        convert(source, destination)
    except CheckpointError as error:
        return "CheckpointError", str(error)
    except BaseException as error:
        return type(error).__name__, str(error)
    return "none", ""


if __name__ == "__main__":
    main(Path(sys.argv[1]))
