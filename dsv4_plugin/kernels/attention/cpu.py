"""Dense products over rows that are read once: a prefill span's tile by tile, shared by its
queries; a decode group's for each token. Everything is float32.

Shapes: n queries, H heads, d head_dim, K keys, N entries, W window.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dsv4_plugin.cache.groups import DecodeGroup, Entries, PrefillSpan
from dsv4_plugin.cache.paged import Paged
from dsv4_plugin.cache.step import Step
from dsv4_plugin.kernels.index.cpu import blocks
from dsv4_plugin.kernels.rope import rotate_

TILE_ROWS = 256
"""Query-head rows of a prefill tile: few enough that its window band is not mostly hidden."""
MAX_TILE = 128
DENSE = 2
"""Up to this many times k entries, one masked dense product beats gathering each query's k."""


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
    q32 = q.float()
    out = torch.empty_like(q32)
    out[int(step.query_start[-1]) :] = 0  # padding
    layer = _Layer(sink, window, sliding_window, entries, ratio, chosen)
    for group in step.groups.decode:
        out.index_copy_(0, group.rows, layer.decode(q32.index_select(0, group.rows), group))
    for one in step.groups.prefill:
        rows = slice(one.start, one.end)
        layer.prefill(q32[rows], one, out[rows])
    return rotate_(out, cis, back=True).to(q.dtype)


@dataclass(frozen=True)
class Keys:
    """Key rows, float32: [K, d] for all queries or [n, K, d] for each. hidden bool [n, K] masks."""

    rows: Tensor
    hidden: Tensor | None


@dataclass(frozen=True)
class _Layer:
    sink: Tensor
    window: Paged
    sliding_window: int
    entries: Paged | None
    ratio: int
    chosen: Tensor | None

    def decode(self, q: Tensor, group: DecodeGroup) -> Tensor:
        parts = [Keys(self.window.pool.read(group.window_read, torch.float32), group.window_hidden)]
        entries = group.entries.get(self.ratio)
        if entries is not None and entries.count:
            address, hidden = entries.kv, entries.hidden
            if self.chosen is not None and entries.count > self.chosen.shape[1]:
                chosen = self.chosen.index_select(0, group.rows).long()
                hidden = chosen < 0
                address = entries.kv.gather(1, chosen.clamp(min=0))
            parts.append(Keys(self._read(address), hidden))
        out = torch.empty_like(q)
        attend(q * q.shape[-1] ** -0.5, self.sink, parts, out)
        return out

    def prefill(self, q: Tensor, span: PrefillSpan, out: Tensor) -> None:
        """One request's tokens, tile by tile, into out [n, H, d]."""
        n, heads, _ = q.shape
        window = self.window.pool.read(span.window_read, torch.float32)
        first = max(0, span.p0 - self.sliding_window + 1)
        seen = _SpanEntries(self, span)
        size = min(MAX_TILE, max(1, TILE_ROWS // heads))
        band = _band(self.sliding_window, size, q.device)
        for tile in blocks(n, heads * (self.sliding_window + size + seen.width), size):
            low = span.p0 + tile.start - self.sliding_window + 1
            rows = window[max(low, 0) - first : span.p0 + tile.stop - first]
            cut = max(-low, 0)
            parts = [Keys(rows, band[: tile.stop - tile.start, cut : cut + len(rows)])]
            parts += seen.keys(tile, (span.p0 + tile.stop) // self.ratio if self.ratio else 0)
            attend(q[tile] * q.shape[-1] ** -0.5, self.sink, parts, out[tile])

    def _read(self, address: Tensor) -> Tensor:
        assert self.entries is not None
        return self.entries.pool.read(address, torch.float32)


class _SpanEntries:
    """The compressed rows a prefill span may see, read once, and what each tile attends to."""

    def __init__(self, layer: _Layer, span: PrefillSpan) -> None:
        self.layer, self.start = layer, span.start
        self.entries: Entries | None = span.entries.get(layer.ratio)
        self.k = layer.chosen.shape[1] if layer.chosen is not None else 1 << 30
        count = 0 if self.entries is None else self.entries.count
        gathering = count > DENSE * self.k
        self.width = 0 if gathering else count
        self.rows = None
        if self.entries is not None and count and not gathering:
            self.rows = layer._read(self.entries.kv)

    def keys(self, tile: slice, count: int) -> Iterator[Keys]:
        """Keys for the span's queries of a tile, the last of which sees `count` entries."""
        if self.entries is None or count == 0:
            return
        hidden = self.entries.hidden[tile, :count]
        if count <= self.k:
            rows = self.rows if self.rows is not None else self._read(self.entries.kv[:count])
            yield Keys(rows[:count], hidden)
            return
        assert self.layer.chosen is not None
        chosen = self.layer.chosen[self.start + tile.start : self.start + tile.stop].long()
        if self.rows is None:
            yield Keys(self._read(self.entries.kv[chosen.clamp(min=0)]), chosen < 0)
            return
        # -1, for none, is the last column, which is cut off.
        mask = torch.ones(len(chosen), count + 1, dtype=torch.bool, device=chosen.device)
        mask.scatter_(1, torch.where(chosen < 0, count, chosen), False)
        yield Keys(self.rows[:count], mask[:, :count].contiguous())

    def _read(self, address: Tensor) -> Tensor:
        return self.layer._read(address)


def attend(q: Tensor, sink: Tensor, parts: list[Keys], out: Tensor) -> None:
    """Softmax over all parts together, into out [n, H, d]; the sink adds exp(sink) to the
    denominator only. Rows shared by all queries are read by one dense product.

    q float32 [n, H, d], scaled by d^-0.5; sink float32 [H].
    """
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


@lru_cache
def _band(window: int, tile: int, device: torch.device) -> Tensor:
    """Mask [tile, window - 1 + tile]: query i sees columns i .. i + window - 1."""
    ahead = torch.arange(window - 1 + tile, device=device)
    ahead = ahead - torch.arange(tile, device=device)[:, None]
    return (ahead < 0) | (ahead >= window)
