"""The definitions: dequantise, then multiply in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_plugin.kernels.packed import ROUNDED, FP8Matrix, Inputs, Matrix, Rounded
from dsv4_plugin.kernels.swiglu.reference import swiglu
from dsv4_plugin.quant.e4m3 import round_e4m3


def arranged(weight: FP8Matrix, rounded: bool) -> FP8Matrix:
    return weight


def product(x: Inputs, weight: Matrix) -> Tensor:
    return (values(x).float() @ _dequantised(weight).t()).to(x.dtype)


def products(x: Inputs, weight: FP8Matrix, outputs: tuple[int, int]) -> tuple[Tensor, Tensor]:
    first, second = product(x, weight).split(outputs, -1)
    return first, second


def gated_product(x: Inputs, weight: FP8Matrix, limit: float, rounded: bool) -> Inputs:
    gate, up = product(x, weight).chunk(2, -1)
    y = swiglu(gate, up, limit, x.dtype)
    return round_rows(y) if rounded else y


def grouped_product(x: Tensor, weight: FP8Matrix, rounded: bool) -> Inputs:
    rows = _dequantised(weight).unflatten(0, (x.shape[1], -1))
    y = torch.einsum("tgi,goi->tgo", x.float(), rows).flatten(1).to(x.dtype)
    return round_rows(y) if rounded else y


def round_rows(x: Tensor) -> Rounded:
    return Rounded(round_inputs(x), None, x.dtype)


def round_inputs(x: Tensor) -> Tensor:
    return round_e4m3(x, ROUNDED)


def values(x: Inputs) -> Tensor:
    return x.values() if isinstance(x, Rounded) else x


def _dequantised(weight: Matrix) -> Tensor:
    return weight.rows(0, weight.shape[0], torch.float32)
