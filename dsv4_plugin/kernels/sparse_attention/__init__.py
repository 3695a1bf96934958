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


def reference(q: Tensor, sink: Tensor, parts: list[Keys]) -> Tensor:
    """Softmax over all parts together; the sink adds exp(sink) to the denominator only.

    q float32 [n, H, d], already scaled by d^-0.5; sink float32 [H] -> float32 [n, H, d].
    """
    n = q.shape[0]
    rows = torch.cat([k.rows.expand(n, *k.rows.shape[-2:]) for k in parts], 1)
    hidden = torch.cat(
        [
            k.rows.new_zeros(n, k.rows.shape[-2]).bool() if k.hidden is None else k.hidden
            for k in parts
        ],
        1,
    )
    s = torch.einsum("nhd,nkd->nhk", q, rows)
    s = s.masked_fill(hidden[:, None], float("-inf"))
    top = torch.maximum(s.amax(-1), sink)
    p = torch.exp(s - top[..., None])
    total = p.sum(-1) + torch.exp(sink - top)
    return torch.einsum("nhk,nkd->nhd", p / total[..., None], rows)


def sparse_attention(q: Tensor, sink: Tensor, parts: list[Keys], out: Tensor) -> None:
    """`reference` into out [n, H, d]; rows shared by all queries are read by one dense product."""
    n, heads, d = q.shape
    q, flat = q.view(n * heads, d), out.view(n * heads, d)
    sizes = [k.rows.shape[-2] for k in parts]
    s = q.new_empty(n * heads, sum(sizes) + 1)
    columns = s.split([*sizes, 1], -1)
    for column, keys in zip(columns, parts, strict=False):
        if keys.rows.dim() == 3:
            torch.bmm(q.view(n, heads, d), keys.rows.transpose(1, 2), out=column.view(n, heads, -1))
        else:
            torch.mm(q, keys.rows.t(), out=column)
        if keys.hidden is not None:
            column.view(n, heads, -1).masked_fill_(keys.hidden[:, None], float("-inf"))
    s.view(n, heads, -1)[..., -1] = sink
    columns = s.softmax(-1).split([*sizes, 1], -1)
    for i, (p, keys) in enumerate(zip(columns, parts, strict=False)):
        beta = min(i, 1)
        if keys.rows.dim() == 3:
            torch.baddbmm(out, p.view(n, heads, -1), keys.rows, beta=beta, out=out)
        else:
            torch.addmm(flat, p, keys.rows, beta=beta, out=flat)
