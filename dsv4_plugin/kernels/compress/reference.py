"""Tokens join a window's state one by one, in order, whatever the chunks they come in, so that a
request's entries do not depend on them."""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor

from dsv4_plugin.cache.step import Step
from dsv4_plugin.kernels import exact
from dsv4_plugin.kernels.compress import State, Target


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
    segments = _Segments(y.float(), ape, step, ratio, state)
    after_carry = segments.starts_after_carry()
    segments.only(~after_carry).run(eps, targets, dtype)
    segments.only(after_carry).run(eps, targets, dtype)


class _Segments:
    def __init__(self, y: Tensor, ape: Tensor, step: Step, ratio: int, state: State) -> None:
        self.kv, self.gate, self.ape = y[:, 0], y[:, 1], ape
        self.step, self.ratio, self.state = step, ratio, state
        self.page_size = step.layout.page_size
        self.halves, self.channels = y.shape[2:]
        position = step.position.long()
        request = step.request.long()
        last = position == step.seq_lens.long()[request] - 1
        ends = (position >= 0) & (last | ((position + 1) % ratio == 0))
        self._take(ends.nonzero()[:, 0])

    def _take(self, rows: Tensor) -> None:
        step, ratio = self.step, self.ratio
        self.rows, self.request = rows, step.request.long()[rows]
        self.end = step.position.long()[rows] + 1
        self.begin = (self.end - 1) // ratio * ratio
        starts = step.query_start.long()
        self.length = step.seq_lens.long()[self.request]
        self.count = starts.diff()[self.request]
        self.first = self.length - self.count
        self.row_of_first = starts[self.request]

    def starts_after_carry(self) -> Tensor:
        """Which segments [S] read the carry of the page before."""
        opens_page = (self.begin > 0) & (self.begin % self.page_size == 0)
        return opens_page & (self.begin == self.first) & (self.halves == 2)

    def only(self, which: Tensor) -> _Segments:
        part = copy(self)
        part._take(self.rows[which])
        return part

    def run(self, eps: float, targets: list[Target], dtype: torch.dtype) -> None:
        if len(self.rows) == 0:
            return
        # Everything is read before anything is written.
        kept = self.state.ring.read(self._ring(self.first - 1), torch.float32)
        kept = kept.unflatten(-1, (self.halves, 3, -1))
        middle = (self.begin < self.first)[:, None, None]
        nothing = torch.zeros_like(kept[:, 0])
        nothing[:, 0] = float("-inf")
        own = torch.where(middle, kept[:, -1], nothing)
        if self.halves == 2:
            own = torch.where(middle, own, self._previous(kept[:, 0], nothing))
        states = [torch.where(middle, kept[:, 0], nothing), own][-self.halves :]
        rings = []
        for phase in range(self.ratio):
            position = self.begin + phase
            states = [self._add(s, position, self.end, half) for half, s in enumerate(states)]
            last = position == self.length - 1
            keep = (self.count <= self.state.rows) | last
            keep &= (position >= self.first) & (position < self.end)
            rings.append((self._ring(position).where(keep, -1), torch.stack(states, 1)))
        self._finish(states[-1], eps, targets, dtype)
        if self.halves == 2:
            self._carry(states[0])
        for address, rows in rings:
            self.state.ring.write_real(address, rows.flatten(1))

    def _ring(self, position: Tensor) -> Tensor:
        """Addresses of the states after positions [S]."""
        number = self.step.tables.ring.long()[self.request]
        row = position % self.state.rows * self.state.ring.codec.words
        return number * self.step.tables.ring_stride + row

    def _page(self, position: Tensor) -> Tensor:
        """Page numbers at positions [S], -1 where there is none."""
        return self.step.tables.page.long()[self.request, position // self.page_size]

    def _previous(self, kept: Tensor, nothing: Tensor) -> Tensor:
        """Half 0 of the window before each segment's [S, 3, C]; nothing before a first window."""
        before = self.begin - self.ratio
        started = (self.begin > 0) & (before < self.first)
        out = torch.where(started[:, None, None], kept, nothing)
        for phase in range(self.ratio):
            out = self._add(out, before + phase, self.begin, 0)
        paging = (self.begin > 0) & (self.begin % self.page_size == 0)
        pooled = out.where(paging[:, None, None], torch.ones_like(out))
        lse = pooled[:, 0] + exact.log(pooled[:, 1])
        mean = pooled[:, 2] / pooled[:, 1]
        assert self.state.carry is not None
        stored = self.starts_after_carry()
        number = self._page((self.begin - 1).clamp(min=0)).where(stored, 0)
        address = number * self.step.tables.page_stride + self.state.carry_offset
        packed = self.state.carry.read(address.where(stored, 0), torch.float32)
        packed = packed.unflatten(-1, (2, -1))
        lse = lse.where(~stored[:, None], packed[:, 0])
        mean = mean.where(~stored[:, None], packed[:, 1])
        carried = torch.stack([lse, torch.ones_like(lse), mean], 1)
        return torch.where(paging[:, None, None], carried, out)

    def _add(self, state: Tensor, position: Tensor, end: Tensor, half: int) -> Tensor:
        """States [S, 3, C] and this step's tokens at `position` [S], where that is before `end`."""
        here = (position >= self.first) & (position < end)
        row = (self.row_of_first + position - self.first).where(here, 0)
        score = self.gate[row, half] + self.ape[position[0] % self.ratio, half]
        top = torch.maximum(state[:, 0], score)
        old, new = exact.exp(state[:, 0] - top), exact.exp(score - top)
        total = state[:, 1] * old + new
        kv = self.kv[row, half] * new
        merged = torch.stack([top, total, state[:, 2] * old + kv], 1)
        return torch.where(here[:, None, None], merged, state)

    def _finish(self, own: Tensor, eps: float, targets: list[Target], dtype: torch.dtype) -> None:
        closing = self.end % self.ratio == 0
        number = self._page(self.begin)
        inside = self.begin % self.page_size // self.ratio
        base = number * self.step.tables.page_stride
        pooled = (own[:, 2] / own[:, 1]).to(dtype).split([t.weight.numel() for t in targets], -1)
        cis = self.step.entry_cis[self.ratio][self.rows]
        for target, entry in zip(targets, pooled, strict=True):
            entry = exact.rotate(exact.rms_norm(entry, target.weight, eps), cis)
            if target.rotate:
                entry = exact.hadamard(entry)
            address = base + target.offset + inside * target.pool.codec.words
            target.pool.write_real(address.where(closing & (number >= 0), -1), entry)

    def _carry(self, shared: Tensor) -> None:
        assert self.state.carry is not None
        number = self._page(self.begin)
        address = number * self.step.tables.page_stride + self.state.carry_offset
        filling = (self.end % self.page_size == 0) & (number >= 0)
        lse, mean = shared[:, 0] + exact.log(shared[:, 1]), shared[:, 2] / shared[:, 1]
        self.state.carry.write_real(address.where(filling, -1), torch.cat([lse, mean], -1))
