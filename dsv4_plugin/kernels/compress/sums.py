"""Softmax pooling carried on as running sums, for torch.

A window's state per channel is (max, sum, weighted sum): the softmax-weighted mean of any set of
tokens, mergeable in any order, exact to float32 rounding. Shapes: G tokens, C channels, h halves
(1 for HCA; 2 for CSA, whose entry pools half A of the previous window and half B of its own).
"""

from __future__ import annotations

import torch
from torch import Tensor


def nothing(like: Tensor) -> Tensor:
    """The state of no tokens: [3, C]."""
    state = like.new_zeros(3, like.shape[-1])
    state[0] = float("-inf")
    return state


def of_token(kv: Tensor, score: Tensor) -> Tensor:
    """The state of single tokens: [..., C] -> [..., 3, C]."""
    return torch.stack([score, torch.ones_like(score), kv], -2)


def of_windows(kv: Tensor, score: Tensor) -> Tensor:
    """States of whole windows [n, r, h, C] -> [n, h, 3, C]; score -inf leaves a token out."""
    top = score.amax(1)
    weight = (score - top[:, None]).exp_()
    return torch.stack([top, weight.sum(1), (weight * kv).sum(1)], -2)


def merge(a: Tensor, b: Tensor) -> Tensor:
    """The state of both [..., 3, C]; at most one of them may be `nothing`."""
    top = torch.maximum(a[..., 0, :], b[..., 0, :])
    wa = (a[..., 0, :] - top).exp_().unsqueeze(-2)
    wb = (b[..., 0, :] - top).exp_().unsqueeze(-2)
    merged = torch.empty_like(b)
    merged[..., 0, :] = top
    torch.mul(a[..., 1:, :], wa, out=merged[..., 1:, :]).addcmul_(b[..., 1:, :], wb)
    return merged


def mean(state: Tensor) -> Tensor:
    """The pooled value [..., C]."""
    return state[..., 2, :] / state[..., 1, :]


def pack(state: Tensor) -> Tensor:
    """[..., 3, C] -> [..., 2, C]: log-sum-exp and mean, a third less to keep."""
    return torch.stack([state[..., 0, :] + state[..., 1, :].log(), mean(state)], -2)


def unpack(packed: Tensor) -> Tensor:
    """Back to a state: a single token of that score and value."""
    return of_token(packed[..., 1, :], packed[..., 0, :])
