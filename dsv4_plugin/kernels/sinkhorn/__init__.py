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
    """As `reference`, with tokens innermost, so that every small operation runs along them."""
    c = logits.permute(1, 2, 0).softmax(1).add_(eps)  # [source, target, T], contiguous
    c = c.contiguous()
    c.div_(c.sum(0).add_(eps))
    for _ in range(iters - 1):
        c.div_(c.sum(1, keepdim=True).add_(eps))
        c.div_(c.sum(0).add_(eps))
    return c.permute(2, 0, 1)
