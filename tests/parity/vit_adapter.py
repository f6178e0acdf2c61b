"""Write `data/vit_adapter.npz`: the features of the original ViT-Adapter on synthetic weights and one image.

`python -m tests.parity.vit_adapter CHECKOUT` with a checkout of czczup/ViT-Adapter; the stored file is of revision
fd64a51. What the original imports from mmseg, timm 0.4 and its CUDA operator is replaced, and a ViT of timm with a
class token takes the place of BEiT, so its forward pass, injectors, extractors and spatial prior run as they are. The
weights are those of `weights.py` by the original's names, those of the ViT with the prefix `vit.`.
"""

from __future__ import annotations

import importlib.util
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import timm
import torch
from timm.layers import DropPath, trunc_normal_
from torch import nn

from tests.parity.weights import fill, is_skipped

SIZE = (64, 96)
VIT = {"img_size": SIZE, "embed_dim": 48, "depth": 4, "num_heads": 3}
STAGES = [[0, 0], [1, 1], [2, 2], [3, 3]]  # first and last block of each
FILE = Path(__file__).parent / "data" / "vit_adapter.npz"


def image() -> torch.Tensor:
    """The image, normalized, (1, 3, H, W)."""
    return torch.from_numpy(np.random.RandomState(0).standard_normal((1, 3, *SIZE)).astype(np.float32))


class TimmVit(nn.Module):
    """A ViT of timm with the interface that the adapter expects of BEiT."""

    def __init__(self, init_values: float, with_cp: bool, network: nn.Module) -> None:
        super().__init__()
        self.network = [network]  # not a submodule: its weights have names of their own
        self.embed_dim, self.drop_path_rate = network.embed_dim, 0.0
        self.norm_layer = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = [lambda tokens, *_, block=block: block(tokens) for block in network.blocks]
        self.pos_embed, self.pos_drop = None, nn.Identity()

    @property
    def cls_token(self) -> torch.Tensor:
        return self.network[0].cls_token + self.network[0].pos_embed[:, :1]

    def patch_embed(self, images: torch.Tensor) -> tuple[torch.Tensor, int, int]:
        tokens = self.network[0].patch_embed(images) + self.network[0].pos_embed[:, 1:]
        return tokens, images.shape[2] // 16, images.shape[3] // 16


def _stub(name: str, **attributes: object) -> None:
    module = ModuleType(name)
    module.__dict__.update(attributes, __path__=[])
    sys.modules[name] = module


def _load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_original(checkout: Path) -> type[nn.Module]:
    """Load the original's class."""
    for name in ("MultiScaleDeformableAttention", "mmseg", "mmseg.models", "ops", "original", "original.base"):
        _stub(name)
    registry = type("Registry", (), {"register_module": lambda _: lambda decorated: decorated})()
    _stub("mmseg.models.builder", BACKBONES=registry)
    _stub("timm.models.layers", DropPath=DropPath, trunc_normal_=trunc_normal_)
    functions = _load("ops.function", checkout / "detection/ops/functions/ms_deform_attn_func.py")

    def apply(value, shapes, start, locations, weights, step):
        sizes = [tuple(map(int, shape)) for shape in shapes]
        return functions.ms_deform_attn_core_pytorch(value, sizes, locations, weights)

    _stub("ops.functions", MSDeformAttnFunction=type("Function", (), {"apply": staticmethod(apply)}))
    _stub("ops.modules")
    attention = _load("ops.modules.ms_deform_attn", checkout / "detection/ops/modules/ms_deform_attn.py")
    _stub("ops.modules", MSDeformAttn=attention.MSDeformAttn)
    _stub("original.base.beit", BEiT=TimmVit)
    folder = checkout / "segmentation/mmseg_custom/models/backbones"
    _load("original.adapter_modules", folder / "adapter_modules.py")
    return _load("original.beit_adapter", folder / "beit_adapter.py").BEiTAdapter


def filled(state: dict[str, torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
    """The synthetic weights for the entries of a state dict."""
    names = {key: f"{prefix}{key}" for key in state if not is_skipped(key)}
    values = fill({name: tuple(state[key].shape) for key, name in names.items()})
    return {key: torch.from_numpy(values[name]) for key, name in names.items()}


def main(checkout: Path) -> None:
    """Run the original and write its features."""
    original = load_original(checkout)
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT).eval()
    network.load_state_dict(filled(network.state_dict(), "vit."))
    settings = {"pretrain_size": SIZE[0], "deform_num_heads": 6, "interaction_indexes": STAGES}
    model = original(network=network, **settings).eval()
    model.load_state_dict(filled(model.state_dict()), strict=False)
    with torch.no_grad():
        features = model(image())
    np.savez_compressed(FILE, **{f"stride_{4 * 2**level}": each.numpy() for level, each in enumerate(features)})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
