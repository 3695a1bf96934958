"""By way of the vector norm: one pass, where squaring first would write as much as it reads."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_plugin.kernels.packed import Rounded
from dsv4_plugin.kernels.packed.cpu import round_rows


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x32 = x.float()
    return (x32 * inverse_rms(x32, eps)).mul_(weight).to(x.dtype)


def rounded_norm(x: Tensor, weight: Tensor, eps: float) -> Rounded:
    return round_rows(rms_norm(x, weight, eps))


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) of float32 [..., d] -> [..., 1]."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.rsqrt(norm.square_().div_(x.shape[-1]).add_(eps))
