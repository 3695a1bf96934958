"""The definition, query by query."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_plugin.cache.paged import Paged
from dsv4_plugin.cache.step import Step
from dsv4_plugin.kernels import exact


def attention(
    q: Tensor,
    sink: Tensor,
    cis: Tensor,
    step: Step,
    window: Paged,
    sliding_window: int,
    entries: Paged | None = None,
    ratio: int = 0,
    chosen: Tensor | None = None,
) -> Tensor:
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    for t, p in enumerate(step.sees.tolist()):
        if p < 0:
            continue
        keys = []
        for rows, index in _visible(t, p, window, sliding_window, entries, ratio, chosen):
            found, real = rows.read(step.request[t].expand(len(index)), index)
            keys.append(found[real])
        k = torch.cat(keys)
        s = q[t].float() @ k.T * q.shape[-1] ** -0.5
        top = torch.maximum(s.amax(-1), sink) if len(k) else sink
        weight = torch.exp(s - top[:, None])
        total = weight.sum(-1) + torch.exp(sink - top)
        out[t] = (weight @ k) / total[:, None]
    return exact.rotate(out, cis, back=True).to(q.dtype)


def _visible(
    t: int,
    p: int,
    window: Paged,
    sliding_window: int,
    entries: Paged | None,
    ratio: int,
    chosen: Tensor | None,
) -> list[tuple[Paged, Tensor]]:
    """Which rows of which part the query at position p sees: indices int64 [K]."""
    device = window.table.device
    parts = [(window, torch.arange(max(0, p - sliding_window + 1), p + 1, device=device))]
    if entries is not None:
        seen = (p + 1) // ratio
        index = torch.arange(seen, device=device) if chosen is None else chosen[t].long()
        parts.append((entries, index[(index >= 0) & (index < seen)]))
    return parts
