"""Sinkhorn normalisation of mHC's 4 x 4 mixing matrices."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def reference(logits: Tensor, iters: int, eps: float) -> Tensor:
    """logits float32 [T, R, R] -> nearly doubly stochastic [T, R, R], step by step as published."""
    c = logits.softmax(-1) + eps
    c = c / (c.sum(-2, keepdim=True) + eps)
    for _ in range(iters - 1):
        c = c / (c.sum(-1, keepdim=True) + eps)
        c = c / (c.sum(-2, keepdim=True) + eps)
    return c


def sinkhorn(logits: Tensor, iters: int, eps: float) -> Tensor:
    """`reference`, transposed ([T, target, source], contiguous).

    Row and column sums, already spread to every element, are products with a constant matrix:
    two operations where summing, adding eps and dividing would take three.
    """
    n, r, _ = logits.shape
    rows, columns = _sum_matrices(r, logits.device)
    c = logits.softmax(-1).add_(eps).view(n, r * r)
    bias, total = c.new_full((1,), eps), torch.empty_like(c)
    c.div_(torch.addmm(bias, c, columns, out=total))
    for _ in range(iters - 1):
        c.div_(torch.addmm(bias, c, rows, out=total))
        c.div_(torch.addmm(bias, c, columns, out=total))
    return c.view(n, r, r).transpose(1, 2).contiguous()


@lru_cache
def _sum_matrices(r: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """[R*R, R*R] matrices that put the sum of an element's row, or column, in its place."""
    row, column = torch.arange(r * r, device=device) // r, torch.arange(r * r, device=device) % r
    return (row[:, None] == row).float(), (column[:, None] == column).float()
