"""RMSNorm, computed in float32, weight kept in float32."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, dtype=torch.float32), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim] in any dtype; the result has x's."""
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., dim] normalised and weighted, in x's dtype."""
    x32 = x.float()
    return (x32 * inverse_rms(x32, eps)).mul_(weight).to(x.dtype)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """rsqrt(mean(x^2) + eps) of float32 [..., dim] -> [..., 1].

    By way of the vector norm: one pass, where squaring first would write as much as it reads.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.rsqrt(norm.square_().div_(x.shape[-1]).add_(eps))
