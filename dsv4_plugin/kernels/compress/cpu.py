"""Group by group: tokens of a decode group join their windows together, a prefill span pools its
whole windows at once, from and to the running sums in `sums`."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_plugin.cache.groups import DecodeGroup, PrefillSpan
from dsv4_plugin.cache.step import Step
from dsv4_plugin.kernels.compress import State, Target, sums
from dsv4_plugin.kernels.index.cpu import hadamard
from dsv4_plugin.kernels.norm.cpu import rms_norm
from dsv4_plugin.kernels.rope import rotate_


def compress(
    y: Tensor,
    ape: Tensor,
    eps: float,
    step: Step,
    ratio: int,
    targets: list[Target],
    state: State,
    dtype: torch.dtype,
) -> None:
    work = _Compressing(ape, eps, ratio, targets, state, dtype)
    groups = step.groups
    for group in groups.decode:
        if not group.opens_page:
            work.decode(y.index_select(0, group.rows), group)
    for span in groups.prefill:
        work.prefill(y[span.start : span.end], span)
    for group in groups.decode:
        if group.opens_page:
            work.decode(y.index_select(0, group.rows), group)


class _Compressing:
    def __init__(
        self,
        ape: Tensor,
        eps: float,
        ratio: int,
        targets: list[Target],
        state: State,
        dtype: torch.dtype,
    ) -> None:
        self.ape, self.eps, self.ratio, self.dtype = ape, eps, ratio, dtype
        self.targets, self.ring, self.carry = targets, state.ring, state.carry
        self.halves = ape.shape[1]
        self.dims = [t.weight.numel() for t in targets]

    def decode(self, y: Tensor, group: DecodeGroup) -> None:
        at = group.pooling[self.ratio]
        score = y[:, 1] + self.ape[at.phase]
        before = self.ring.read(at.before, torch.float32).unflatten(-1, (self.halves, 3, -1))
        nothing = sums.nothing(y)
        if at.opening.numel():
            if self.halves == 2:
                before[at.opening, 1] = before[at.opening, 0]
            before[at.opening, 0] = nothing
        if self.halves == 2 and at.paging.numel():
            before[at.paging, 1] = self._carried(at.carry_in)
        before[at.fresh] = nothing
        state = sums.merge(before, sums.of_token(y[:, 0], score))
        self.ring.write(at.sums, state.flatten(1))
        if at.closing.numel():
            self._finish(sums.mean(state[at.closing, -1]), at.cis, at.kv_out, at.key_out)
        if self.halves == 2 and at.filling.numel():
            self._carry(state[at.filling, 0], at.carry_out)

    def prefill(self, y: Tensor, span: PrefillSpan) -> None:
        at, r = span.pooling[self.ratio], self.ratio
        state = self._windows(y, span)
        if span.p0 % r or (span.p0 and self.halves == 2):
            before = self.ring.read(at.before, torch.float32)[0].unflatten(-1, (self.halves, 3, -1))
        previous = None
        if span.p0 % r:
            state[0] = sums.merge(before, state[0])
        elif span.p0 and self.halves == 2:
            previous = before[0] if at.carry_in is None else self._carried(at.carry_in)[0]
        if self.halves == 2:
            if previous is not None:
                state[0, 1] = sums.merge(previous, state[0, 1])
            state[1:, 1] = sums.merge(state[:-1, 0], state[1:, 1])
            if at.carry_windows.numel():
                self._carry(state[at.carry_windows, 0], at.carry_out)
        self.ring.write(at.sums, state[-1].reshape(1, -1))
        closed = span.p1 // r - span.p0 // r
        if closed:
            self._finish(sums.mean(state[:closed, -1]), at.cis, at.kv_out, at.key_out)

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
        return sums.of_windows(kv.unflatten(0, (-1, r)), score.unflatten(0, (-1, r)))

    def _finish(self, entries: Tensor, cis: Tensor, kv_out: Tensor, key_out: Tensor | None) -> None:
        parts = entries.to(self.dtype).split(self.dims, -1)
        for target, x, address in zip(self.targets, parts, (kv_out, key_out), strict=False):
            assert address is not None
            row = rotate_(rms_norm(x, target.weight, self.eps), cis)
            if target.rotate:
                row = row.float() @ hadamard(row.shape[-1], row.device)
            target.pool.write(address, row)

    def _carried(self, address: Tensor | None) -> Tensor:
        assert self.carry is not None
        assert address is not None
        packed = self.carry.read(address, torch.float32)
        return sums.unpack(packed.unflatten(-1, (2, -1)))

    def _carry(self, state: Tensor, address: Tensor | None) -> None:
        assert self.carry is not None
        assert address is not None
        self.carry.write(address, sums.pack(state).flatten(1))
