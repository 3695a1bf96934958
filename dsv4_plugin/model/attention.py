"""Attention of all three layer kinds: window rows, plus compressed rows (CSA: chosen; HCA: all).

Shapes: T tokens, H heads of this rank, d head_dim, I indexer heads, c index_head_dim, G tokens of
a decode group, n tokens of a prefill span or tile, W window, N entries, k index_topk.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor, nn

from dsv4_plugin.cache.layer import LayerCache
from dsv4_plugin.cache.rows import FP4IndexRows, FP8IndexRows
from dsv4_plugin.cache.step import DecodeGroup, Entries, PrefillSpan, Step
from dsv4_plugin.config import CSA, SWA, ModelConfig
from dsv4_plugin.kernels.rope import rotate_
from dsv4_plugin.kernels.select import scores, select
from dsv4_plugin.kernels.sparse_attention import Keys, sparse_attention
from dsv4_plugin.model.compressor import Compressor, Pool
from dsv4_plugin.model.indexer import Indexer, hadamard
from dsv4_plugin.model.norm import RMSNorm, inverse_rms
from dsv4_plugin.model.parallel import OutputGroups, Parallel
from dsv4_plugin.model.quantised import grouped_linear
from dsv4_plugin.quant.e2m1 import round_mxfp4

TILE_ROWS = 256
"""Query-head rows of a prefill tile: few enough that its window band is not mostly hidden."""
MAX_TILE = 128
DENSE = 2
"""Up to this many times k entries, one masked dense product beats gathering each query's k."""
BLOCK_VALUES = 1 << 24
"""Most float32 values of one block of scores or gathered rows (64 MiB)."""


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, parallel: Parallel, layer: int, prefix: str) -> None:
        super().__init__()
        c, d = config, config.head_dim
        self.ratio, self.window, self.eps = (
            c.compress_ratios[layer],
            c.sliding_window,
            c.rms_norm_eps,
        )
        self.heads, self.dim, self.scale = c.num_attention_heads // parallel.size, d, d**-0.5
        self.dtype = parallel.dtype
        self.topk, n_heads = c.index_topk, c.num_attention_heads
        groups = OutputGroups(n_heads, c.o_groups, parallel.rank, parallel.size)
        self.groups, all_groups = groups.parts, groups.parts * parallel.size
        self.wq_a = parallel.replicated(c.hidden_size, c.q_lora_rank, f"{prefix}.wq_a")
        self.q_norm = RMSNorm(c.q_lora_rank, self.eps)
        self.wq_b = parallel.column(c.q_lora_rank, n_heads * d, f"{prefix}.wq_b")
        self.wkv = parallel.replicated(c.hidden_size, d, f"{prefix}.wkv")
        self.kv_norm = RMSNorm(d, self.eps)
        self.wo_a = grouped_linear(parallel, groups, d, c.o_lora_rank, f"{prefix}.wo_a")
        self.wo_b = parallel.row(all_groups * c.o_lora_rank, c.hidden_size, f"{prefix}.wo_b")
        self.wo_b.rearrange = groups.wo_b  # type: ignore[assignment]
        sink = torch.empty(self.heads, dtype=torch.float32)
        self.attn_sink = nn.Parameter(sink, requires_grad=False)
        self.attn_sink.shard_dim = 0  # type: ignore[attr-defined]
        if self.ratio != SWA:
            self.compressor = Compressor(c, self.ratio, d)
        if self.ratio == CSA:
            self.indexer = Indexer(c, parallel, f"{prefix}.indexer")

    def finalize_weights(self) -> None:
        """After loading."""
        compressors = [self.compressor] if self.ratio != SWA else []
        if self.ratio == CSA:
            compressors.append(self.indexer.compressor)
        self.pool = Pool(self.ratio, compressors, self.dtype) if compressors else None

    def forward(self, x: Tensor, step: Step, cache: LayerCache) -> Tensor:
        """x [T, D], normed -> [T, D]. Writes this step's rows, then reads what each token sees."""
        cis = step.cis[self.ratio]
        qr = self.q_norm(self.wq_a(x))
        q = self.wq_b(qr).view(-1, self.heads, self.dim).float()
        q = rotate_(q.mul_(inverse_rms(q, self.eps).mul_(self.scale)), cis)
        cache.window.write(step.window_write, rotate_(self.kv_norm(self.wkv(x)), cis))
        index = None
        if self.pool is not None:
            rotate = self._rotation(cache, x.device)
            self.pool(x, step, cache, rotate)
            if self.ratio == CSA and step.most_entries[CSA] > self.topk:
                index = self.indexer(x, qr, cis, rotate)
                assert cache.key is not None
                if isinstance(cache.key.codec, FP4IndexRows):
                    index = round_mxfp4(index[0]), index[1]
        o = torch.empty_like(q)
        for group in step.decode:
            o.index_copy_(0, group.rows, self._decode(q, index, group, cache))
        for span in step.prefill:
            self._prefill(q, index, span, cache, o)
        o = rotate_(o, cis.conj()).to(x.dtype)
        out: Tensor = self.wo_b(self.wo_a(o.view(-1, self.groups, o[0].numel() // self.groups)))
        return out

    def _rotation(self, cache: LayerCache, device: torch.device) -> Tensor | None:
        """Hadamard rotation of indexer queries and keys: it decides how quantised keys round."""
        if cache.key is None or not isinstance(cache.key.codec, FP8IndexRows | FP4IndexRows):
            return None
        return hadamard(self.indexer.dim, device)

    def _decode(
        self, q: Tensor, index: tuple[Tensor, Tensor] | None, group: DecodeGroup, cache: LayerCache
    ) -> Tensor:
        q = q.index_select(0, group.rows)
        window = cache.window.read(group.window_read, torch.float32)
        parts = [Keys(window, group.window_hidden)]
        if self.ratio != SWA and group.entries[self.ratio].count:
            entries = group.entries[self.ratio]
            assert cache.kv is not None
            address, hidden = entries.kv, entries.hidden
            if self.ratio == CSA and entries.count > self.topk:
                assert index is not None
                chosen, hidden = self._choose(index, group.rows, entries, cache)
                address = entries.kv.gather(1, chosen)
            parts.append(Keys(cache.kv.read(address, torch.float32), hidden))
        out = torch.empty_like(q)
        sparse_attention(q, self.attn_sink, parts, out)
        return out

    def _choose(
        self, index: tuple[Tensor, Tensor], rows: Tensor, entries: Entries, cache: LayerCache
    ) -> tuple[Tensor, Tensor]:
        """Each decode token's k entries of its own N: indices and mask of unused places [G, k]."""
        assert entries.key is not None
        assert cache.key is not None
        q, weight = index[0].index_select(0, rows), index[1].index_select(0, rows)
        found = [
            scores(q[part], weight[part], cache.key.read(entries.key[part], torch.float32))
            for part in _blocks(len(rows), entries.count * max(q.shape[1:]))
        ]
        return select(self.indexer.reduce(torch.cat(found)), entries.visible, self.topk)

    def _prefill(
        self,
        q: Tensor,
        index: tuple[Tensor, Tensor] | None,
        span: PrefillSpan,
        cache: LayerCache,
        out: Tensor,
    ) -> None:
        """Attention of one request's tokens, tile by tile, into their rows of out [T, H, d]."""
        window = cache.window.read(span.window_read, torch.float32)
        first = max(0, span.p0 - self.window + 1)
        seen = _SpanEntries(self, span.entries.get(self.ratio), index, span.start, cache)
        size = min(MAX_TILE, max(1, TILE_ROWS // self.heads))
        width = self.heads * (self.window + size + seen.width)
        band = _band(self.window, size, q.device)
        for part in _blocks(span.end - span.start, width, size):
            tile = slice(span.start + part.start, span.start + part.stop)
            low = span.p0 + part.start - self.window + 1
            rows = window[max(low, 0) - first : span.p0 + part.stop - first]
            cut = max(-low, 0)
            parts = [Keys(rows, band[: part.stop - part.start, cut : cut + len(rows)])]
            parts += seen.keys(part, (span.p0 + part.stop) // self.ratio if self.ratio else 0)
            sparse_attention(q[tile], self.attn_sink, parts, out[tile])


class _SpanEntries:
    """The compressed rows a prefill span may see, read once, and what each tile attends to."""

    def __init__(
        self,
        attention: Attention,
        entries: Entries | None,
        index: tuple[Tensor, Tensor] | None,
        start: int,
        cache: LayerCache,
    ) -> None:
        self.entries, self.index, self.start, self.cache = entries, index, start, cache
        self.topk = attention.topk
        count = entries.count if entries is not None else 0
        self.choosing = attention.ratio == CSA and count > self.topk
        self.gathering = self.choosing and count > DENSE * self.topk
        self.width = 0 if self.gathering else count
        self.rows = self.key = None
        if entries is not None and count and not self.gathering:
            assert cache.kv is not None
            self.rows = cache.kv.read(entries.kv, torch.float32)
        if self.choosing:
            self.reduce = attention.indexer.reduce
            assert entries is not None
            assert entries.key is not None
            assert cache.key is not None
            self.key = cache.key.read(entries.key, torch.float32)

    def keys(self, part: slice, count: int) -> Iterator[Keys]:
        """Keys for the span's queries `part`, the last of which sees `count` entries."""
        if self.entries is None or count == 0:
            return
        hidden = self.entries.hidden[part, :count]
        if count <= self.topk or not self.choosing:
            rows = self.rows if self.rows is not None else self._read(self.entries.kv[:count])
            yield Keys(rows[:count], hidden)
            return
        chosen, unused = self._choose(part, count)
        if self.rows is not None:
            mask = torch.ones_like(hidden).scatter_(1, chosen, unused)
            yield Keys(self.rows[:count], mask | hidden)
        else:
            yield Keys(self._read(self.entries.kv[chosen]), unused)

    def _choose(self, part: slice, count: int) -> tuple[Tensor, Tensor]:
        assert self.index is not None
        assert self.entries is not None
        assert self.key is not None
        rows = slice(self.start + part.start, self.start + part.stop)
        q, weight = self.index[0][rows], self.index[1][rows]
        found = [
            scores(q[block], weight[block], self.key[:count])
            for block in _blocks(len(q), count * q.shape[1])
        ]
        return select(self.reduce(torch.cat(found)), self.entries.visible[part], self.topk)

    def _read(self, address: Tensor) -> Tensor:
        assert self.cache.kv is not None
        return self.cache.kv.read(address, torch.float32)


def _blocks(n: int, width: int, most: int = 1 << 30) -> list[slice]:
    """Cut n rows of `width` values into blocks of at most BLOCK_VALUES values and `most` rows."""
    size = max(1, min(most, BLOCK_VALUES // max(width, 1)))
    return [slice(a, min(a + size, n)) for a in range(0, n, size)]


@lru_cache
def _band(window: int, tile: int, device: torch.device) -> Tensor:
    """Mask [tile, window - 1 + tile]: query i sees columns i .. i + window - 1."""
    ahead = torch.arange(window - 1 + tile, device=device)
    ahead = ahead - torch.arange(tile, device=device)[:, None]
    return (ahead < 0) | (ahead >= window)
