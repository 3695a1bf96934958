"""`dsv4 gpu-check`, on a GPU that is not there."""

from __future__ import annotations

import pytest
import torch

from dsv4_plugin.cli import gpu_check, gpu_work, main
from dsv4_plugin.kernels.norm import kernel
from tests.kit import mode


@pytest.mark.thorough
@pytest.mark.skipif(not mode.INTERPRET, reason="64 heads take emulated code too long")
def test_every_kernel_passes(gpu, monkeypatch):
    monkeypatch.setattr(gpu_work, "EXPERT_WIDTH", 32)
    monkeypatch.setattr(gpu_work, "ROUTED", 8)
    found = gpu_check.check(torch.device(mode.DEVICE), {"decode": (1, 1, 144)})
    assert len(found) == 17
    assert [c for c in found if c["error"]] == []


def test_a_wrong_kernel_is_named(gpu, monkeypatch):
    monkeypatch.setattr(gpu_check, "WORK", {"latent norm": gpu_check.WORK["latent norm"]})
    right = kernel.rms_norm
    monkeypatch.setattr(kernel, "rms_norm", lambda *args: 1.1 * right(*args))
    (found,) = gpu_check.check(torch.device(mode.DEVICE), {"decode": (1, 1, 9)})
    assert found["name"] == "latent norm, decode"
    assert found["error"].startswith("output 0: off by")


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["gpu-check"]) == 2
    assert "needs a GPU" in capsys.readouterr().err
