"""Whole steps of the tiny model, as a GPU runs them."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from dsv4_plugin import load
from dsv4_plugin.batch import Batch
from dsv4_plugin.cache.layout import CacheLayout
from dsv4_plugin.kernels.experts import kernel as experts_kernel
from dsv4_plugin.tools.make import make_checkpoint
from lab.kit import mode
from lab.kit.gpu import EmulatedGPU
from tests.conftest import A_LAYER_OF_EACH, SMALL, random_ids
from tests.device_batch import PADDING, DeviceBatch
from tests.tolerances import BF16, LOGITS_STD, ROUNDED_AGAIN


class Unasked(TorchDispatchMode):
    """Raises where torch would ask a device for a value, or send it one of the host's."""

    ASKS = (
        "_local_scalar_dense", "item", "nonzero", "masked_select", "bincount", "_unique",
        "unique_", "equal", "is_nonzero", "lift_fresh", "repeat_interleave.Tensor",
    )  # fmt: skip

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.")
        picks = name.startswith("index") and any(
            t is not None and t.dtype in (torch.bool, torch.uint8)
            for given in args
            if isinstance(given, list | tuple)
            for t in given
        )
        assert not picks, f"{name} by a mask"
        assert not name.startswith(self.ASKS), name
        return func(*args, **(kwargs or {}))


@contextmanager
def unasked(monkeypatch):
    """No device-to-host read inside; what stands in for the GPU may do what it likes."""

    def launch(self, *args):
        with _disable_current_modes(), monkeypatch.context() as back:
            for name, method in methods.items():
                back.setattr(torch.Tensor, name, method)
            emulate(self, *args)

    def forbidden(self, *args, **kwargs):
        raise AssertionError("a tensor's values were read")

    emulate = EmulatedGPU.launch
    methods = {name: getattr(torch.Tensor, name) for name in ("tolist", "numpy", "cpu")}
    with monkeypatch.context() as patch, Unasked():
        patch.setattr(EmulatedGPU, "launch", launch)
        for name in methods:
            patch.setattr(torch.Tensor, name, forbidden)
        yield


WHOLE_BLOCKS = {"q_lora_rank": 128, "o_lora_rank": 128, "moe_intermediate_size": 128}
"""FP8 weights of one input are multiplied as one."""
WORK = [
    [(0, 140), (1, 3), (2, 290)],  # computed by torch alike
    [(0, 1), (1, 20), (2, 6)],
    [(0, 1), (1, 1), (2, 1)],
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("device") / "checkpoint"
    make_checkpoint(directory, "tiny", 1, SMALL | {"index_topk": 64}, tokenizer=False)
    return load(directory, dtype="bfloat16", device=mode.DEVICE)


@pytest.mark.thorough
@pytest.mark.parametrize("gpu", mode.NAMES[:1], indirect=True)
@torch.inference_mode()
def test_steps_give_torch_s_tokens(gpu, model, monkeypatch):
    layout = CacheLayout.of(model.config, "fp8")
    ids = random_ids(600, seed=3)
    lengths = [200, 100, 400]
    expecting = DeviceBatch(model.model, layout, lengths, 512, poison=True)
    finding = DeviceBatch(model.model, layout, lengths, 512, poison=True)
    for n, counts in enumerate(WORK):
        work = [(b, ids[100 * b + 7 * n :][:count]) for b, count in counts]
        mode.kernels(monkeypatch, "torch")
        expected = expecting.run(work).float()
        # The long first chunks as plain torch: the compiled code gets what follows.
        mode.kernels(monkeypatch, "torch" if n == 0 else "triton")
        found = finding.run(work).float()
        assert (found - expected).abs().mean() / expected.std() < BF16
        logits = model.model.head(expected)
        best = logits.topk(2).values
        clear = best[:, 0] - best[:, 1] > 0.1 * logits.std()
        same = model.model.head(found).argmax(-1) == logits.argmax(-1)
        assert clear.any()
        assert same[clear].all()


@pytest.mark.skipif(not mode.INTERPRET, reason="launches nothing: once is enough")
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float32"])
@torch.inference_mode()
def test_the_definitions_give_the_same(unchosen, kv_dtype, monkeypatch):
    """The whole network in float32 as `reference` says, but for the indexer's choice."""
    model = load(unchosen, dtype="float32")
    layout = CacheLayout.of(model.config, kv_dtype)
    ids = random_ids(600, seed=3)
    lengths = [200, 100, 400]
    ordinary = Batch(model.model, layout, lengths, 512, poison=True)
    device = DeviceBatch(model.model, layout, lengths, 512, poison=True)
    for n, counts in enumerate(WORK):
        work = [(b, ids[100 * b + 7 * n :][:count]) for b, count in counts]
        mode.kernels(monkeypatch, "torch")
        expected = ordinary.run(work)
        mode.kernels(monkeypatch, "reference")
        found = device.run(work)
        tolerance = LOGITS_STD if kv_dtype == "float32" else BF16 / 10
        assert (found - expected).abs().max() < tolerance * expected.std()


@pytest.mark.skipif(mode.INTERPRET or mode.DEVICE != "cpu", reason="the emulator's launches")
@pytest.mark.parametrize("gpu", mode.NAMES[:1], indirect=True)
@pytest.mark.parametrize(
    "fmt",
    [
        "fp8-fp4",
        *(
            pytest.param(fmt, marks=pytest.mark.thorough)
            for fmt in ("bf16", "nvfp4", "ct-nvfp4", "ct-w4a16", "gptq")
        ),
    ],
)
@torch.inference_mode()
def test_a_decode_step_asks_the_device_for_nothing(gpu, fmt, tmp_path, monkeypatch):
    """Neither plain nor packed, experts and all: what a captured graph must not do. Rows of padding
    choose no experts, and the logits are torch's."""
    overrides = SMALL | A_LAYER_OF_EACH | {"index_topk": 32}
    if fmt == "fp8-fp4":
        overrides |= WHOLE_BLOCKS
    make_checkpoint(tmp_path / "it", "tiny", 1, overrides, tokenizer=False, fmt=fmt)
    model = load(tmp_path / "it", dtype="bfloat16")
    layout = CacheLayout.of(model.config, "fp8")
    expecting = DeviceBatch(model.model, layout, [200, 100], 256, poison=True)
    finding = DeviceBatch(model.model, layout, [200, 100], 256, poison=True)
    ids = random_ids(400, seed=3)
    mode.kernels(monkeypatch, "torch")
    for batch in (expecting, finding):
        batch.run([(0, ids[:140]), (1, ids[140:150])])
    work = [(0, ids[150:151]), (1, ids[151:152])]
    expected = expecting.run(work).float()
    with pytest.raises(AssertionError, match=r"read|dense|nonzero|unique|index"):
        DeviceBatch(model.model, layout, [200, 100], 256).run(work, lambda: unasked(monkeypatch))
    mode.kernels(monkeypatch, "triton")
    model.model.finalize_weights()
    chosen, prepared = [], experts_kernel.prepared
    monkeypatch.setattr(
        experts_kernel, "prepared", lambda x, ids, *a: chosen.append(ids) or prepared(x, ids, *a)
    )
    found = finding.run(work, lambda: unasked(monkeypatch)).float()
    assert len(chosen) == 3
    for ids in chosen:
        assert (ids[:-PADDING] >= 0).all()
        assert (ids[-PADDING:] == -1).all()
    tolerance = BF16 if fmt in ("bf16", "gptq") else ROUNDED_AGAIN
    assert (found - expected).abs().mean() / expected.std() < tolerance
