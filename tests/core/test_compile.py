"""The network of a step on the device under torch.compile: one graph, nothing of it left out."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from dsv4_plugin import load
from dsv4_plugin.cache.layout import CacheLayout
from dsv4_plugin.checkpoint.make import make_checkpoint
from dsv4_plugin.kernels import linear
from dsv4_plugin.model import fused, parallel
from tests.conftest import A_LAYER_OF_EACH, SMALL, random_ids
from tests.device_batch import DeviceBatch

OPERATIONS = {
    "bf16": {"attend", "streams", "gate", "experts"},
    "fp8-fp4": {"attend", "streams", "gate", "packed_experts", "packed_product", "round_inputs"},
    "nvfp4": {"attend", "streams", "gate", "packed_experts", "packed_product", "round_inputs"},
}


@pytest.fixture(params=sorted(OPERATIONS))
def given(request, tmp_path, monkeypatch):
    """A model of each kind of layer, and the name of its format; linears as on GPUs."""
    monkeypatch.setenv("DSV4_KERNELS", "torch")
    monkeypatch.setattr(parallel, "pack", lambda weight: lambda x: linear.reference(x, weight))
    overrides = SMALL | A_LAYER_OF_EACH
    make_checkpoint(tmp_path / "it", "tiny", 1, overrides, tokenizer=False, fmt=request.param)
    return load(tmp_path / "it", dtype="bfloat16"), request.param


class Calls(torch.fx.Interpreter):
    """Runs a graph as it is and notes its calls of this project's operations."""

    made: ClassVar[dict[str, list[tuple]]] = {}

    def call_function(self, target, args, kwargs):
        result = super().call_function(target, args, kwargs)
        if getattr(target, "namespace", "") == "dsv4":
            name = target.name().removeprefix("dsv4::")
            self.made.setdefault(name, []).append((target, args, result))
        return result

    @classmethod
    def backend(cls, graph, inputs):
        return cls(graph).run


@pytest.mark.parametrize(
    "backend", [Calls.backend, pytest.param("aot_eager", marks=pytest.mark.thorough)]
)
@torch.inference_mode()
def test_a_compiled_step_is_the_same(given, backend, monkeypatch):
    """Chunks, decoding and a mix: bit for bit, caches included, as all later steps read them."""
    model, fmt = given
    layout = CacheLayout.of(model.config, "bfloat16")
    batches = [DeviceBatch(model.model, layout, [200, 100], 256, poison=True) for _ in range(2)]
    torch._dynamo.reset()
    Calls.made.clear()
    stock = fused.forward
    compiled = torch.compile(stock, fullgraph=True, backend=backend)
    ids = random_ids(400, seed=3)
    for counts in ((140, 10), (1, 1), (1, 1), (3, 21)):
        work = [(b, ids[100 * b : 100 * b + n]) for b, n in enumerate(counts)]
        monkeypatch.setattr(fused, "forward", stock)
        expected = batches[0].run(work)
        monkeypatch.setattr(fused, "forward", compiled)
        assert torch.equal(batches[1].run(work), expected)
    if backend == Calls.backend:
        assert set(Calls.made) == OPERATIONS[fmt]
        check_operations()


def check_operations():
    """Results are what the fakes say; and torch's own checks."""
    for name, calls in Calls.made.items():
        for target, args, result in (calls[0], calls[-1]):
            fake = FakeTensorMode()
            with fake:
                expected = target(*tree_map_only(torch.Tensor, fake.from_tensor, args))
            for e, f in zip(tree_leaves(expected), tree_leaves(result), strict=True):
                assert (e.shape, e.dtype, e.stride()) == (f.shape, f.dtype, f.stride())
            if name != "attend":  # writes caches, which are no arguments
                torch.library.opcheck(target, args, test_utils=("test_schema", "test_faketensor"))
