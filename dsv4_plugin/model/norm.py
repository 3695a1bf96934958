"""RMSNorm, weight kept in float32. Source: `RMSNorm` of the authors' inference/model.py."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsv4_plugin.kernels.norm import rms_norm, rounded_norm
from dsv4_plugin.kernels.packed import Inputs


class RMSNorm(nn.Module):
    """rounds: what follows are FP8 products of rounded inputs."""

    def __init__(self, dim: int, eps: float, rounds: bool = False) -> None:
        super().__init__()
        self.rounds = rounds
        self.weight = nn.Parameter(torch.ones(dim, dtype=torch.float32), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Inputs:
        """x [T, dim] in any dtype; the result has x's."""
        return (rounded_norm if self.rounds else rms_norm)(x, self.weight, self.eps)
