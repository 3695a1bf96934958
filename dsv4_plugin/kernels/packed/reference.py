"""The definitions: dequantise, then multiply in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_plugin.kernels.packed import ROUNDED, FP8Matrix, Matrix
from dsv4_plugin.quant.e4m3 import round_e4m3


def product(x: Tensor, weight: Matrix) -> Tensor:
    return (x.float() @ _dequantised(weight).t()).to(x.dtype)


def grouped_product(x: Tensor, weight: FP8Matrix) -> Tensor:
    rows = _dequantised(weight).unflatten(0, (x.shape[1], -1))
    return torch.einsum("tgi,goi->tgo", x.float(), rows).flatten(1).to(x.dtype)


def round_inputs(x: Tensor) -> Tensor:
    return round_e4m3(x, ROUNDED)


def _dequantised(weight: Matrix) -> Tensor:
    return weight.rows(0, weight.shape[0], torch.float32)
