"""float32 products on tensor cores: their error is that of float32 sums, and rows do not depend on
each other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dsv4_plugin.kernels.gate.reference import gate
from dsv4_plugin.kernels.launch import pick
from dsv4_plugin.kernels.linear import kernel
from lab.kernels.cases import generator
from lab.kit import mode
from lab.kit.mode import interpreted_first
from lab.kit.order import seeded
from lab.paths import SHARED, needs_shared

STEP = 2.0**-24
"""Half of float32's spacing at 1."""


def weights(n: int, k: int, parts: int) -> Tensor:
    """float32 values that take so many bfloat16 ones."""
    w = torch.randn(n, k, generator=generator(n + k))
    cut = {1: -0x10000, 2: -0x100, 3: -1}[parts]
    return (w.view(torch.int32) & cut).view(torch.float32).to(mode.DEVICE)


def inputs(rows: int, k: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(rows, k, generator=generator(rows)).to(dtype).to(mode.DEVICE)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_parts_add_up(parts):
    w = weights(5, 300, parts)
    w[0] = 0
    found = kernel.parts(w)
    assert len(found) == parts
    assert torch.equal(found.double().sum(0), w.double())
    assert len(kernel.parts(w[:1])) == 1


@pytest.mark.parametrize(
    ("rows", "n", "k", "parts", "dtype"),
    [
        (1, 256, 1024, 3, torch.bfloat16),
        interpreted_first(7, 70, 1200, 1, torch.bfloat16),
        interpreted_first(130, 40, 608, 2, torch.bfloat16),
        (3, 24, 96, 3, torch.bfloat16),
        interpreted_first(5, 40, 700, 3, torch.float32),
    ],
)
def test_product(gpu, rows, n, k, parts, dtype):
    """Within 2 sqrt(K) roundings of the sum of the products' sizes: torch's float32 product of the
    same values is no closer to float64 than to within that."""
    x, w = inputs(rows, k, dtype), weights(n, k, parts)
    found = kernel.product(x, kernel.parts(w))
    assert found.dtype == torch.float32
    exact = x.double() @ w.double().t()
    bound = 2 * k**0.5 * STEP * (x.double().abs() @ w.double().abs().t())
    assert ((found - exact).abs() <= bound).all()
    assert ((torch.nn.functional.linear(x.float(), w) - exact).abs() <= bound).all()


def test_alone_and_in_company(gpu, monkeypatch):
    """The same bits: pieces by programs of their own in any order, by one, in tiles for many, in
    longer steps."""
    launch = replace(pick(kernel.LAUNCHES), depth=32)
    monkeypatch.setattr(kernel, "LAUNCHES", {"any": launch})
    x, w = inputs(20, 1100), kernel.parts(weights(80, 1100, 3))
    found = kernel.product(x, w)
    for row in (0, 19):
        with seeded(row):
            assert torch.equal(kernel.product(x[row : row + 1].contiguous(), w)[0], found[row])
    for together in (1, 2):
        many = replace(launch, split=2, together=together)
        monkeypatch.setattr(kernel, "LAUNCHES", {"any": many})
        assert torch.equal(kernel.product(x, w), found)


@needs_shared
def test_the_router_chooses_as_recorded(gpu):
    """The authors' choices from their inputs; from bfloat16 ones, those of float64 scores."""
    u = load_file(SHARED / "golden" / "units" / "unit_router.safetensors")
    x, w, bias = (u[name].to(mode.DEVICE) for name in ("x", "gate_w", "bias"))
    recorded = u["indices_ref"].long().to(mode.DEVICE)
    scale, nobody = float(u["route_scale"]), torch.zeros(len(x), dtype=torch.int64)
    nobody = nobody.to(mode.DEVICE)

    def chosen(logits: Tensor) -> Tensor:
        return gate(logits, 2, scale, bias, None, nobody, nobody)[0].sort(-1).values

    parts = kernel.parts(w)
    assert torch.equal(chosen(kernel.product(x, parts)), recorded.sort(-1).values)
    narrow = x.bfloat16()
    exact = (narrow.double() @ w.double().t()).float()
    assert torch.equal(chosen(kernel.product(narrow, parts)), chosen(exact))
