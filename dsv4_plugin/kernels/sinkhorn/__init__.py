"""Sinkhorn normalisation of mHC's 4 x 4 mixing matrices."""

from __future__ import annotations

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

    Tokens are innermost while it works, so that every small operation runs along them.
    """
    c = logits.permute(1, 2, 0).contiguous().softmax(1).add_(eps)
    rows, columns = c[:, :1].clone(), c[0].clone()
    torch.sum(c, 0, out=columns)
    c.div_(columns.add_(eps))
    for _ in range(iters - 1):
        torch.sum(c, 1, keepdim=True, out=rows)
        c.div_(rows.add_(eps))
        torch.sum(c, 0, out=columns)
        c.div_(columns.add_(eps))
    return c.permute(2, 1, 0).contiguous()
