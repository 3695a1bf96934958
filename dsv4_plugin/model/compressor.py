"""The Compressor: every `ratio` tokens become one KV entry.

A CSA layer runs two of them on the same tokens, one for KV entries and one for indexer keys; their
channels lie side by side here (C of them), so that one product and one pooling serve both.

Shapes: T tokens, G tokens of a decode group, h halves (1 for HCA, 2 for CSA), C channels per half.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsv4_plugin.cache.layer import LayerCache
from dsv4_plugin.cache.rows import RowPool
from dsv4_plugin.cache.step import DecodeGroup, PrefillSpan, Step
from dsv4_plugin.config import CSA, ModelConfig
from dsv4_plugin.kernels import pooling
from dsv4_plugin.kernels.rope import rotate_
from dsv4_plugin.model.norm import RMSNorm
from dsv4_plugin.model.parallel import Linear


class Compressor(nn.Module):
    """The weights of one compressor: kv and gate products, position bias (ape), norm."""

    def __init__(self, config: ModelConfig, ratio: int, dim: int) -> None:
        super().__init__()
        halves = 2 if ratio == CSA else 1
        self.wkv = Linear(config.hidden_size, halves * dim, torch.float32)
        self.wgate = Linear(config.hidden_size, halves * dim, torch.float32)
        ape = torch.empty(ratio, halves * dim, dtype=torch.float32)
        self.ape = nn.Parameter(ape, requires_grad=False)
        self.norm = RMSNorm(dim, config.rms_norm_eps)


class Pool(nn.Module):
    """Runs a layer's compressors over a step, from pooling sums in the cache to finished rows.

    Made of loaded compressors, whose products it fuses into one (and takes away from them). Pooling
    is float32; a finished entry goes on in `dtype`, the model's, as the authors' does: what fp8
    rows then round to depends on it.
    """

    def __init__(self, ratio: int, compressors: list[Compressor], dtype: torch.dtype) -> None:
        super().__init__()
        self.ratio, self.halves, self.dtype = ratio, 2 if ratio == CSA else 1, dtype
        self.norms = nn.ModuleList(c.norm for c in compressors)
        self.dims = [c.norm.weight.numel() for c in compressors]
        self.channels = sum(self.dims)
        kv = self._beside([c.wkv.weight for c in compressors], 0)
        gate = self._beside([c.wgate.weight for c in compressors], 0)
        self.project = Linear(kv.shape[1], 2 * len(kv), torch.float32)
        self.project.weight.data = torch.cat([kv, gate])
        ape = self._beside([c.ape for c in compressors], 1).unflatten(1, (self.halves, -1))
        self.ape = nn.Parameter(ape, requires_grad=False)
        for c in compressors:
            del c.wkv, c.wgate, c.ape

    def _beside(self, tensors: list[Tensor], dim: int) -> Tensor:
        """Channels of all compressors side by side within each half."""
        parts = [t.unflatten(dim, (self.halves, -1)) for t in tensors]
        return torch.cat(parts, dim + 1).flatten(dim, dim + 1)

    def forward(self, x: Tensor, step: Step, cache: LayerCache, rotate: Tensor | None) -> None:
        """Pool the normed x [T, D] and write whatever became complete.

        rotate: Hadamard matrix applied to indexer keys before they are quantised, or None.
        """
        y = self.project(x.float()).unflatten(-1, (2, self.halves, self.channels))
        for group in step.decode:
            if not group.opens_page:
                self._decode(y.index_select(0, group.rows), group, cache, rotate)
        for span in step.prefill:
            self._prefill(y[span.start : span.end], span, cache, rotate)
        for group in step.decode:
            if group.opens_page:
                self._decode(y.index_select(0, group.rows), group, cache, rotate)

    def _decode(
        self, y: Tensor, group: DecodeGroup, cache: LayerCache, rotate: Tensor | None
    ) -> None:
        at = group.pooling[self.ratio]
        assert cache.sums is not None
        score = y[:, 1] + self.ape[at.phase]
        before = cache.sums.read(at.before, torch.float32).unflatten(-1, (self.halves, 3, -1))
        nothing = pooling.nothing(y)
        if at.opening.numel():
            if self.halves == 2:
                before[at.opening, 1] = before[at.opening, 0]
            before[at.opening, 0] = nothing
        if self.halves == 2 and at.paging.numel():
            assert cache.carry is not None
            packed = cache.carry.read(at.carry_in, torch.float32).unflatten(-1, (2, -1))
            before[at.paging, 1] = pooling.unpack(packed)
        before[at.fresh] = nothing
        sums = pooling.merge(before, pooling.of_token(y[:, 0], score))
        cache.sums.write(at.sums, sums.flatten(1))
        if at.closing.numel():
            entries = pooling.mean(sums[at.closing, -1])
            self._finish(entries, at.cis, at.kv_out, at.key_out, cache, rotate)
        if self.halves == 2 and at.filling.numel():
            self._carry(sums[at.filling, 0], at.carry_out, cache.carry)

    def _prefill(
        self, y: Tensor, span: PrefillSpan, cache: LayerCache, rotate: Tensor | None
    ) -> None:
        at, r = span.pooling[self.ratio], self.ratio
        assert cache.sums is not None
        sums = self._windows(y, span)
        if span.p0 % r or (span.p0 and self.halves == 2):
            before = cache.sums.read(at.before, torch.float32)[0].unflatten(
                -1, (self.halves, 3, -1)
            )
        previous = None
        if span.p0 % r:
            sums[0] = pooling.merge(before, sums[0])
        elif span.p0 and self.halves == 2:
            previous = before[0]
            if at.carry_in is not None:
                assert cache.carry is not None
                packed = cache.carry.read(at.carry_in, torch.float32).unflatten(-1, (2, -1))
                previous = pooling.unpack(packed)[0]
        if self.halves == 2:
            if previous is not None:
                sums[0, 1] = pooling.merge(previous, sums[0, 1])
            sums[1:, 1] = pooling.merge(sums[:-1, 0], sums[1:, 1])
            if at.carry_windows.numel():
                self._carry(sums[at.carry_windows, 0], at.carry_out, cache.carry)
        cache.sums.write(at.sums, sums[-1].reshape(1, -1))
        closed = span.p1 // r - span.p0 // r
        if closed:
            entries = pooling.mean(sums[:closed, -1])
            self._finish(entries, at.cis, at.kv_out, at.key_out, cache, rotate)

    def _windows(self, y: Tensor, span: PrefillSpan) -> Tensor:
        """States of the windows the span touches: [windows, h, 3, C]."""
        r, (n, _, h, c) = self.ratio, y.shape
        lead, tail = span.p0 % r, -span.p1 % r
        phase = torch.arange(span.p0, span.p1, device=y.device) % r
        kv, score = y[:, 0], y[:, 1] + self.ape[phase]
        if lead or tail:
            shape = (lead + n + tail, h, c)
            kv, score = kv.new_zeros(shape), score.new_full(shape, float("-inf"))
            kv[lead : lead + n] = y[:, 0]
            score[lead : lead + n] = y[:, 1] + self.ape[phase]
        return pooling.of_windows(kv.unflatten(0, (-1, r)), score.unflatten(0, (-1, r)))

    def _finish(
        self,
        entries: Tensor,
        cis: Tensor,
        kv_out: Tensor,
        key_out: Tensor | None,
        cache: LayerCache,
        rotate: Tensor | None,
    ) -> None:
        parts = entries.to(self.dtype).split(self.dims, -1)
        assert cache.kv is not None
        cache.kv.write(kv_out, rotate_(self.norms[0](parts[0]), cis))
        if key_out is not None:
            assert cache.key is not None
            key = rotate_(self.norms[1](parts[1]), cis)
            cache.key.write(key_out, key if rotate is None else key.float() @ rotate)

    @staticmethod
    def _carry(state: Tensor, address: Tensor, pool: RowPool | None) -> None:
        assert pool is not None
        pool.write(address, pooling.pack(state).flatten(1))
