"""x / sqrt(mean(x^2) + eps) * weight, bit by bit."""

from __future__ import annotations

from torch import Tensor

from dsv4_plugin.kernels.exact import rms_norm
from dsv4_plugin.kernels.packed import Rounded
from dsv4_plugin.kernels.packed.reference import round_rows

__all__ = ["rms_norm", "rounded_norm"]


def rounded_norm(x: Tensor, weight: Tensor, eps: float) -> Rounded:
    return round_rows(rms_norm(x, weight, eps))
