"""Attention over window and compressed rows with a per-head sink. One KV head; keys are values.

Shapes: n queries, H heads, d head_dim, K keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Keys:
    """Key rows, float32: [K, d] for all queries or [n, K, d] for each. hidden bool [n, K] masks."""

    rows: Tensor
    hidden: Tensor | None


def reference(q: Tensor, sink: Tensor, scale: float, parts: list[Keys]) -> Tensor:
    """Softmax over all parts together; the sink adds exp(sink) to the denominator only.

    q float [n, H, d], sink float32 [H] -> float32 [n, H, d].
    """
    n = q.shape[0]
    rows = torch.cat([k.rows.expand(n, *k.rows.shape[-2:]) for k in parts], 1)
    hidden = torch.cat(
        [k.rows.new_zeros(n, k.rows.shape[-2]).bool() if k.hidden is None else k.hidden for k in parts],
        1,
    )
    s = torch.einsum("nhd,nkd->nhk", q.float(), rows) * scale
    s = s.masked_fill(hidden[:, None], float("-inf"))
    top = torch.maximum(s.amax(-1), sink)
    p = torch.exp(s - top[..., None])
    total = p.sum(-1) + torch.exp(sink - top)
    return torch.einsum("nhk,nkd->nhd", p / total[..., None], rows)


def sparse_attention(q: Tensor, sink: Tensor, scale: float, parts: list[Keys]) -> Tensor:
    """As `reference`; rows shared by all queries are read once, by one dense product."""
    n, heads, _ = q.shape
    q = q.float() * scale
    sizes = [k.rows.shape[-2] for k in parts]
    s = q.new_empty(n, heads, sum(sizes) + 1)
    for part, keys in zip(s.split([*sizes, 1], -1), parts, strict=False):
        part.copy_(_scores(q, keys.rows))
        if keys.hidden is not None:
            part.masked_fill_(keys.hidden[:, None], float("-inf"))
    s[..., -1] = sink
    p = s.softmax(-1)
    out = None
    for part, keys in zip(p.split([*sizes, 1], -1), parts, strict=False):
        o = _mix(part, keys.rows)
        out = o if out is None else out.add_(o)
    assert out is not None
    return out


def _scores(q: Tensor, rows: Tensor) -> Tensor:
    if rows.dim() == 3:
        return torch.bmm(q, rows.transpose(1, 2))
    n, heads, d = q.shape
    return (q.view(n * heads, d) @ rows.t()).view(n, heads, -1)


def _mix(p: Tensor, rows: Tensor) -> Tensor:
    if rows.dim() == 3:
        return torch.bmm(p, rows)
    n, heads, k = p.shape
    return (p.reshape(n * heads, k) @ rows).view(n, heads, -1)
