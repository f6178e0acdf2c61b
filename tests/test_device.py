"""Fallbacks for what a device does not support or emulates slowly, and their warnings."""

import logging
from types import SimpleNamespace

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from maskwright.runtime import device


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_on_a_cpu_that_would_emulate_it_falls_back_to_float32_with_one_warning(native, monkeypatch, caplog):
    monkeypatch.setattr(device, "has_fast_bfloat16", lambda: native)
    device._warn_about_emulated_bfloat16.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with device.autocast(torch.device("cpu"), "bf16"):
                assert torch.is_autocast_enabled("cpu") is native
    assert [record.message for record in caplog.records] == (
        [] if native else ["this CPU has no bfloat16 instructions, which makes bf16 slower than fp32: using fp32"]
    )


@pytest.mark.parametrize(("machine", "instruction", "native"), [("x86_64", False, False), ("AMD64", True, True)])
def test_avx_512_alone_is_not_enough_for_bfloat16(machine, instruction, native, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instruction)
    monkeypatch.setattr(device.platform, "machine", lambda: machine)
    assert device.has_fast_bfloat16() is native


def test_other_precisions_are_unchanged():
    assert device.usable_precision(torch.device("cpu"), "fp32") == "fp32"
    assert device.usable_precision(torch.device("meta"), "bf16") == "bf16"


def test_batch_norms_are_synchronized_on_accelerators_only():
    def network():
        return nn.Sequential(nn.Conv2d(3, 4, 1), BatchNormAct2d(4), nn.Sequential(nn.BatchNorm2d(4)), nn.LayerNorm(4))

    for processes, name in ((1, "cuda"), (2, "cpu")):
        engine = SimpleNamespace(num_processes=processes, device=torch.device(name))
        parts = device.convert_sync_batch_norms(network(), engine).modules()
        assert not any(isinstance(part, nn.SyncBatchNorm) for part in parts)
    before = network()
    state, parameters = before.state_dict(), list(before.parameters())
    after = device.convert_sync_batch_norms(before, SimpleNamespace(num_processes=2, device=torch.device("cuda")))
    assert sum(isinstance(part, nn.SyncBatchNorm) for part in after.modules()) == 2
    assert list(after.state_dict()) == list(state)
    assert all(one is other for one, other in zip(after.parameters(), parameters, strict=True))
