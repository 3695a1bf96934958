"""`dsv4 gpu-check`, on a GPU that is not there."""

from __future__ import annotations

import argparse
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dsv4_plugin.kernels.norm import kernel
from dsv4_plugin.tools.cli import gpu_check, gpu_model, main
from lab.kit import mode
from lab.kit.graphs import recorded

emulated = pytest.mark.skipif(
    mode.INTERPRET or mode.DEVICE != "cpu", reason="graphs are recorded emulated"
)
STACK = gpu_model.Stack("tiny", [0, 4, 128], 8, "bf16", [(2, 20)])


@pytest.mark.thorough
@pytest.mark.skipif(
    not mode.INTERPRET and mode.DEVICE == "cpu", reason="64 heads take emulated code too long"
)
def test_every_kernel_passes(gpu, monkeypatch):
    narrow = replace(gpu_check.CONFIG, moe_intermediate_size=32)
    monkeypatch.setattr(gpu_check, "CONFIG", narrow)
    monkeypatch.setattr(gpu_check, "EXPERTS", 8)
    found = gpu_check.check(torch.device(mode.DEVICE), {"decode": (1, 1, 144)})
    assert len(found) == 24
    assert [c for c in found if c["error"]] == []


@pytest.mark.skipif(
    not mode.INTERPRET and mode.DEVICE == "cpu", reason="64 heads take emulated code too long"
)
def test_scores_of_a_width_that_the_kernel_rounds_up(gpu, monkeypatch):
    """151 tokens have 37 entries; the kernel writes rows of 40."""
    name = "index scores and top-k"
    monkeypatch.setattr(gpu_check, "WORK", {name: gpu_check.WORK[name]})
    (found,) = gpu_check.check(torch.device(mode.DEVICE), {"decode": (2, 1, 151)})
    assert found["error"] == ""


def test_a_wrong_kernel_is_named(gpu, monkeypatch):
    monkeypatch.setattr(gpu_check, "WORK", {"latent norm": gpu_check.WORK["latent norm"]})
    right = kernel.rms_norm
    monkeypatch.setattr(kernel, "rms_norm", lambda *args: 1.1 * right(*args))
    (found,) = gpu_check.check(torch.device(mode.DEVICE), {"decode": (1, 1, 9)})
    assert found["name"] == "latent norm, decode"
    assert found["error"].startswith("output 0: off by")
    assert "wrong: latent norm, decode: output 0" in gpu_check.table([found])


def test_a_crash_is_a_row_and_the_rest_goes_on(gpu, monkeypatch):
    class Stopped(Exception):
        pass

    def crash(world):
        raise Stopped("of no kind that was foreseen")

    work = {"crashing": crash, "latent norm": gpu_check.WORK["latent norm"]}
    monkeypatch.setattr(gpu_check, "WORK", work)
    crashed, right = gpu_check.check(torch.device(mode.DEVICE), {"decode": (1, 1, 9)})
    assert crashed["error"] == "Stopped: of no kind that was foreseen"
    assert right["error"] == ""


def test_only_the_kernels_own_time_counts():
    """Neither torch's, which fill L2 in between, nor what the host does."""
    device, host = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [
        SimpleNamespace(name=name, device_type=kind, device_time=spent)
        for name, kind, spent in (
            ("attend", device, 7.0), ("attend", device, 9.0), ("choose", device, 2.0),
            ("void at::native::vectorized_elementwise_kernel<4>", device, 100.0),
            ("Memset (Device)", device, 50.0), ("cuLaunchKernel", host, 0.0),
        )
    ]  # fmt: skip
    assert gpu_check.kernel_microseconds(events) == {"attend": 16.0, "choose": 2.0}
    assert gpu_check.kernel_microseconds(None) == {}


@pytest.mark.thorough
@emulated
@pytest.mark.parametrize("gpu", mode.NAMES[:1], indirect=True)
def test_a_stack_gives_the_same_bits_as_step_and_graph(gpu, monkeypatch):
    """And a graph that leaves something out of its caches is noticed."""
    mode.kernels(monkeypatch, "triton")
    device = torch.device("cpu")
    with recorded(gpu, monkeypatch):
        rows = gpu_model.check(device, STACK)
        assert [row["error"] for row in rows] == ["", ""]
        right = rows[1]
        assert right["name"] == "layers [0, 4, 128] as step and graph, decode of 2 at 20"
        monkeypatch.setattr(gpu_model.Saved, "equal", lambda self: False)
        assert gpu_model.check(device, STACK)[1]["error"] == "a graph's caches are not the step's"


@pytest.mark.thorough
@emulated
@pytest.mark.parametrize("gpu", mode.NAMES[:1], indirect=True)
def test_steps_of_chosen_sizes(gpu, monkeypatch):
    """Their rows; that of a size which fails says why."""
    mode.kernels(monkeypatch, "triton")
    monkeypatch.setattr(gpu_check, "median_seconds", lambda launch: [launch(), 0.5][1])
    slice_ = gpu_model.Stack
    monkeypatch.setattr(gpu_model, "Stack", lambda _, *rest: slice_("tiny", *rest))
    args = argparse.Namespace(
        layers=3, experts=8, format="bf16", kv_dtype="fp8", decode="2x20,0x9", prefill="3+8"
    )
    with recorded(gpu, monkeypatch):
        decode, failed, prefill = gpu_model.times(torch.device("cpu"), 1e9, args)
    assert decode["name"] == "3 layers, decode of 2x20"
    assert failed["error"]
    for row in (decode, prefill):
        assert row["error"] == ""
        assert 0 < row["share"] < 1
        assert row["tokens_per_second"] > 0
    assert "decode of 2x20" in gpu_check.table([decode, failed, prefill])


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["gpu-check"]) == 2
    assert "needs a GPU" in capsys.readouterr().err
