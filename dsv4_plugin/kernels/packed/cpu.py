"""A tile of rows at a time is dequantised and multiplied: it stays in the CPU's cache, so that the
packed bytes are all that is read from memory."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_plugin.config import FP8_BLOCK
from dsv4_plugin.kernels.linear import multiplied
from dsv4_plugin.kernels.packed import FP8Matrix, Inputs, Matrix
from dsv4_plugin.kernels.packed.reference import arranged, round_inputs, round_rows, values
from dsv4_plugin.kernels.swiglu.cpu import swiglu

__all__ = [
    "arranged", "gated_product", "grouped_product", "product", "products", "round_inputs",
    "round_rows",
]  # fmt: skip

TILE = 1 << 20
"""Values of a dequantised tile (2 MiB in bfloat16), rounded to whole blocks of rows."""


def products(x: Inputs, weight: FP8Matrix, outputs: tuple[int, int]) -> tuple[Tensor, Tensor]:
    n, end = outputs[0], sum(outputs)
    return product(x, weight.part(0, n)), product(x, weight.part(n, end))


def gated_product(x: Inputs, weight: FP8Matrix, limit: float, rounded: bool) -> Inputs:
    n = weight.shape[0] // 2
    gate, up = products(x, weight, (n, n))
    y = swiglu(gate, up, limit, x.dtype)
    return round_rows(y) if rounded else y


def product(x: Inputs, weight: Matrix) -> Tensor:
    (n_out, n_in), x = weight.shape, values(x)
    step = max(1, TILE // (n_in * FP8_BLOCK)) * FP8_BLOCK
    dtype, x = x.dtype, x.to(multiplied(x.dtype, x.device))
    if n_out <= step:
        return torch.nn.functional.linear(x, weight.rows(0, n_out, x.dtype)).to(dtype)
    out = torch.empty(len(x), n_out, dtype=dtype, device=x.device)
    for start in range(0, n_out, step):
        stop = min(start + step, n_out)
        tile = weight.rows(start, stop, x.dtype)
        out[:, start:stop] = torch.nn.functional.linear(x, tile)
    return out


def grouped_product(x: Tensor, weight: FP8Matrix, rounded: bool) -> Inputs:
    out = x.new_empty(len(x), weight.shape[0])
    groups = x.shape[1]
    n = weight.shape[0] // groups
    x = x.to(multiplied(x.dtype, x.device))
    for group in range(groups):
        rows = slice(group * n, (group + 1) * n)
        tile = weight.rows(rows.start, rows.stop, x.dtype)
        out[:, rows] = torch.nn.functional.linear(x[:, group], tile)
    return round_rows(out) if rounded else out
