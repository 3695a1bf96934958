"""int4 weights whose scales are as GPTQ's are: float16, and of either sign."""

from __future__ import annotations

import pytest
import torch

from dsv4_plugin.kernels.experts import cpu as plain
from dsv4_plugin.kernels.experts import kernel
from dsv4_plugin.kernels.packed import Int4Matrix
from dsv4_plugin.kernels.packed import kernel as packed_kernel
from dsv4_plugin.quant.int4 import decode_int4
from lab.kernels.cases import generator
from lab.kit import mode
from lab.kit.mode import interpreted_first
from tests.tolerances import BF16_SUM, OP_FP32


def stack(e: int, n_out: int, n_in: int, seed: int, block: int = 32) -> Int4Matrix:
    g = generator(seed)
    data = torch.randint(0, 256, (e, n_out, n_in // 2), generator=g, dtype=torch.uint8)
    scale = torch.randn(e, n_out, n_in // block, generator=g) / 100
    return Int4Matrix(data.to(mode.DEVICE), scale.half().to(mode.DEVICE))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = OP_FP32 if found.dtype == torch.float32 else BF16_SUM
    error = (found.float() - expected.float()).abs().max()
    assert error <= tolerance * expected.float().abs().max()


@pytest.mark.parametrize(
    ("rows", "n", "k", "block", "dtype"),
    [
        (5, 96, 160, 32, torch.float32),
        (5, 96, 160, 32, torch.bfloat16),
        (18, 70, 320, 64, torch.bfloat16),
    ],
)
def test_product(gpu, rows, n, k, block, dtype):
    """In tiles of few rows and of many; of one group of inputs."""
    matrix = stack(1, n, k, 1, block).of(0)
    x = torch.randn(rows, 2, k, generator=generator(2)).to(dtype).to(mode.DEVICE)[:, 1]
    exact = x.float() @ decode_int4(matrix.data, matrix.scale).t()
    found = packed_kernel.product(x, matrix)
    assert found.dtype == dtype
    close(found, exact)


@pytest.mark.parametrize("inputs", [512, 384])
def test_scales_in_words_and_not(gpu, inputs):
    """A step has one scale, half of a word; rows of an odd number of them are no whole words."""
    matrix = stack(1, 64, inputs, 7, block=128).of(0)
    x = torch.randn(5, inputs, generator=generator(8)).bfloat16().to(mode.DEVICE)
    exact = x.float() @ decode_int4(matrix.data, matrix.scale).t()
    close(packed_kernel.product(x, matrix), exact)


@pytest.mark.parametrize("dtype", [interpreted_first(torch.float32), torch.bfloat16])
def test_experts(gpu, dtype):
    e, d, f = 3, 160, 96
    layer = stack(e, f, d, 1), stack(e, f, d, 2), stack(e, d, f, 3)
    x = torch.randn(7, d, generator=generator(4)).to(dtype).to(mode.DEVICE)
    ids = torch.rand(7, e, generator=generator(5)).topk(2).indices.to(mode.DEVICE)
    weight = torch.rand(7, 2, generator=generator(6)).to(mode.DEVICE)
    expected = plain.packed_experts(x.float(), ids, weight, *layer, 10.0, rounding=False)
    close(kernel.packed_experts(x, ids, weight, *layer, 10.0, rounding=False), expected)
