"""RMSNorm of rows, computed in float32. Source: `RMSNorm` of the authors' inference/model.py."""

from __future__ import annotations

from torch import Tensor

from dsv4_plugin.kernels.dispatch import implementation
from dsv4_plugin.kernels.packed import Rounded


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, d] in any float dtype, normalised, times weight float32 [d] -> x's dtype."""
    out: Tensor = implementation(__name__, x.device).rms_norm(x, weight, eps)
    return out


def rounded_norm(x: Tensor, weight: Tensor, eps: float) -> Rounded:
    """The same, in x's dtype and then rounded, for products with FP8 weights."""
    out: Rounded = implementation(__name__, x.device).rounded_norm(x, weight, eps)
    return out
