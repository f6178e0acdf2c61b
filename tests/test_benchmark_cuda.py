"""The benchmark of CUDA devices, on the CPU with a tiny model."""

import re
import time
from contextlib import nullcontext

import pytest
import torch

from benchmarks import cuda, peer
from maskwright.errors import MaskwrightError

CPU = torch.device("cpu")


def test_a_dry_run_measures_everything_that_needs_no_device(monkeypatch, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")

    def tiny_model(_):
        stages = {"out_features": ["stage1", "stage2", "stage3", "stage4"], "layer_type": "basic"}
        backbone = transformers.ResNetConfig(depths=[1, 1, 1, 1], hidden_sizes=[64, 128, 256, 512], **stages)
        sizes = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "num_attention_heads": 2}
        layers = {"encoder_layers": 1, "decoder_layers": 2, "encoder_feedforward_dim": 32, "dim_feedforward": 32}
        config = transformers.Mask2FormerConfig(
            backbone_config=backbone, num_labels=peer.CLASSES, train_num_points=256, **sizes, **layers
        )
        return transformers.Mask2FormerForUniversalSegmentation(config).eval()

    monkeypatch.setattr(peer, "new_model", tiny_model)
    cuda.run(device="cpu", output=tmp_path / "cuda.md")
    text = (tmp_path / "cuda.md").read_text()
    assert text == capsys.readouterr().out
    assert text.startswith("dry run on cpu, ")
    assert re.search(r"bag against grid, torch.float32, 2 random cases: [\d.]+e-0\d at most", text)
    for heading in ("attention: ", "prediction: R50, fp32, one image of 64x90", "training step: R50, fp32, 1 crops of"):
        assert heading in text
    assert len(re.findall(r"ours: the host waits 0 times, Python reads \d+ values", text)) == 2


def test_a_wrong_kernel_is_an_error_and_what_there_is_no_time_for_is_named(monkeypatch):
    true = cuda.deformable_attention
    monkeypatch.setattr(
        cuda, "deformable_attention", lambda *values: true(*values) * (1 + (values[-1] == "bag") * 1e-3)
    )
    with pytest.raises(
        MaskwrightError, match=r"bag against grid, torch.float32, 2 random cases: 1.0e-03 at most, expec"
    ):
        cuda.check_kernels(CPU, cuda.DRY)
    monkeypatch.setattr(peer, "saved_model", lambda *_: nullcontext())
    late = list(cuda.measure(CPU, cuda.Sizes(), time.monotonic()))
    names = ["kernels", "prediction fp32", "training fp32", "prediction bf16", "training bf16", "compiled"]
    assert late == [f"{name}: not run, time is up" for name in names]
