"""RMSNorm, weight kept in float32. Source: `RMSNorm` of the authors' inference/model.py."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsv4_plugin.kernels.norm import rms_norm


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, dtype=torch.float32), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [T, dim] in any dtype; the result has x's."""
        return rms_norm(x, self.weight, self.eps)
