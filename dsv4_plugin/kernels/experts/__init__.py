"""Routed experts: clamped SwiGLU, routing weight applied before the down projection.

Shapes: T tokens, k experts per token, E experts, D hidden size, F expert width.
"""

from __future__ import annotations

import torch
from torch import Tensor

FEW = 64
"""Up to this many (token, expert) pairs, copying the experts' weights beats a grouped product."""


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit), float32."""
    gate = gate.float().clamp(max=limit)
    return torch.nn.functional.silu(gate).mul_(up.float().clamp(-limit, limit))


def reference(
    x: Tensor, ids: Tensor, weight: Tensor, w13: Tensor, w2: Tensor, limit: float
) -> Tensor:
    """x [T, D]; ids int64 [T, k]; weight float32 [T, k]; w13 [E, D, 2F]; w2 [E, F, D] -> [T, D]."""
    out = torch.zeros(x.shape, dtype=torch.float32)
    for t in range(len(x)):
        for e, w in zip(ids[t].tolist(), weight[t], strict=True):
            gate, up = (x[t] @ w13[e]).chunk(2)
            out[t] += ((swiglu(gate, up, limit) * w).to(x.dtype) @ w2[e]).float()
    return out.to(x.dtype)


def experts(
    x: Tensor, ids: Tensor, weight: Tensor, w13: Tensor, w2: Tensor, limit: float
) -> Tensor:
    """As `reference`: one grouped product over tokens sorted by expert, each weight read once."""
    n, k = ids.shape
    flat = ids.reshape(-1)
    if len(flat) <= FEW:
        y = _copied(x.repeat_interleave(k, 0), flat, weight.reshape(-1, 1), w13, w2, limit)
        return y.view(n, k, -1).sum(1, dtype=torch.float32).to(x.dtype)
    order = flat.argsort(stable=True)
    ends = torch.bincount(flat, minlength=len(w13)).cumsum(0).to(torch.int32)
    h = torch._grouped_mm(x[order // k], w13, offs=ends)
    h = swiglu(*h.chunk(2, -1), limit).mul_(weight.reshape(-1, 1)[order])
    y = torch._grouped_mm(h.to(x.dtype), w2, offs=ends)
    unsorted = torch.empty_like(y)
    unsorted[order] = y
    return unsorted.view(n, k, -1).sum(1, dtype=torch.float32).to(x.dtype)


def _copied(
    x: Tensor, ids: Tensor, weight: Tensor, w13: Tensor, w2: Tensor, limit: float
) -> Tensor:
    h = torch.bmm(x[:, None], w13.index_select(0, ids))[:, 0]
    h = swiglu(*h.chunk(2, -1), limit).mul_(weight)
    return torch.bmm(h.to(x.dtype)[:, None], w2.index_select(0, ids))[:, 0]
