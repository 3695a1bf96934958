"""Attention over the window and compressed rows of the cache, read where they lie.

Softmax over window rows and compressed rows together, with a per-head sink in the denominator;
keys are values. RoPE is undone on the output. One row of the batch is one query.

Shapes: T rows, H heads of this rank, d head_dim, k chosen entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_plugin.kernels import exact
from dsv4_plugin.kernels.dispatch import use_triton
from dsv4_plugin.kernels.paged import Paged


@dataclass(frozen=True)
class Queries:
    """Which rows there are: position int32 [T] (-1: padding, whose output is zero) and request
    int32 [T]; cis float32 [T, rope_dim], (cos, sin) pairs; longest: no request has more tokens."""

    position: Tensor
    request: Tensor
    cis: Tensor
    longest: int


def paged_attention(
    q: Tensor,
    sink: Tensor,
    queries: Queries,
    window: Paged,
    span: int,
    entries: Paged | None = None,
    ratio: int = 0,
    chosen: Tensor | None = None,
    tiles: bool = False,
) -> Tensor:
    """As `reference`. tiles: rows are neighbouring tokens of few requests (prefill)."""
    if not use_triton(q.device):
        return reference(q, sink, queries, window, span, entries, ratio, chosen)
    from dsv4_plugin.kernels.paged_attention import kernel

    return kernel.paged_attention(q, sink, queries, window, span, entries, ratio, chosen, tiles)


def reference(
    q: Tensor,
    sink: Tensor,
    queries: Queries,
    window: Paged,
    span: int,
    entries: Paged | None = None,
    ratio: int = 0,
    chosen: Tensor | None = None,
) -> Tensor:
    """q [T, H, d], rotated but not scaled -> [T, H, d] in q's dtype.

    Args:
        sink: float32 [H].
        span: positions a query sees of its window, itself included.
        entries: compressed rows, of which a query at position p may see (p + 1) // ratio.
        chosen: int32 [T, k], the entries each query attends to, then -1 for none; all where None.
    """
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    for t, p in enumerate(queries.position.tolist()):
        if p < 0:
            continue
        keys = []
        for rows, index in _visible(t, p, window, span, entries, ratio, chosen):
            found, real = rows.read(queries.request[t].expand(len(index)), index)
            keys.append(found[real])
        k = torch.cat(keys)
        s = q[t].float() @ k.T * q.shape[-1] ** -0.5
        top = torch.maximum(s.amax(-1), sink) if len(k) else sink
        weight = torch.exp(s - top[:, None])
        total = weight.sum(-1) + torch.exp(sink - top)
        out[t] = (weight @ k) / total[:, None]
    return exact.rotate(out, queries.cis, back=True).to(q.dtype)


def _visible(
    t: int,
    p: int,
    window: Paged,
    span: int,
    entries: Paged | None,
    ratio: int,
    chosen: Tensor | None,
) -> list[tuple[Paged, Tensor]]:
    """Which rows of which part the query at position p sees: indices int64 [K]."""
    device = window.table.device
    parts = [(window, torch.arange(max(0, p - span + 1), p + 1, device=device))]
    if entries is not None:
        seen = (p + 1) // ratio
        index = torch.arange(seen, device=device) if chosen is None else chosen[t].long()
        parts.append((entries, index[(index >= 0) & (index < seen)]))
    return parts
