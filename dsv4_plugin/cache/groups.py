"""A step as CPUs work through it: its requests in groups, and the address of every row they touch.

Requests that bring one token are decoded together, in groups of similar length (within a factor of
two above 2,048 tokens, so that padding never doubles the work); requests that bring more are
prefilled one by one. With speculative decoding, requests that bring no more tokens than a ring has
rows are decoded too: their first tokens together, then their second ones, and so on, so that the
pooling sums after each of them are kept. Rows of blocks, which see one another, are one group.

A request may start from a cached page that another one fills in the same step. It reads that
page's carry, so it comes later: spans are ordered by position, and decoded tokens that open a page
wait for all spans.

Shapes: T tokens of the step, B requests, G requests of a decode group, n tokens of a prefill span,
W sliding window, N compressed entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_plugin.cache.layout import CacheLayout
from dsv4_plugin.cache.paged import BlockTables
from dsv4_plugin.config import CSA

SHORT = 2048
"""Requests up to this many tokens share a decode group."""


@dataclass(frozen=True)
class Entries:
    """Where the compressed entries of a ratio lie that queries of a group or span may see.

    visible is how many each query sees ([G] or [n]), count the most of them; hidden, [G, N] or
    [n, N], is its mask. kv, key: addresses [G, N] or [N]; key is None for HCA.
    """

    visible: Tensor
    count: int
    hidden: Tensor
    kv: Tensor
    key: Tensor | None


@dataclass(frozen=True)
class Pooling:
    """Compressor addresses of a ratio for a decode group.

    phase: each token's place in its window. before, sums: addresses of its open window's state [G],
    read and written. carry_in, carry_out are None for HCA, which has none.
    opening, paging, fresh, closing, filling: indices into the group of the tokens that open a
    window; open a page after the first (their previous window's sums lie at carry_in); start the
    request; close a window (its entry, with RoPE factors cis, goes to kv_out / key_out); close a
    page (carry_out).
    """

    phase: Tensor
    before: Tensor
    sums: Tensor
    opening: Tensor
    fresh: Tensor
    paging: Tensor
    carry_in: Tensor | None
    closing: Tensor
    cis: Tensor
    kv_out: Tensor
    key_out: Tensor | None
    filling: Tensor
    carry_out: Tensor | None


@dataclass(frozen=True)
class SpanPooling:
    """Compressor addresses of a ratio for one prefill span of positions p0 .. p1-1.

    before, sums: [1], state read and written; carry_in: [1] when the span opens a page other than
    the first, else None.
    kv_out, key_out: addresses of the windows closed by the span; cis: their RoPE factors.
    carry_windows: which of the span's windows (0 = that of p0) end a page; carry_out: where to.
    """

    before: Tensor
    sums: Tensor
    carry_in: Tensor | None
    kv_out: Tensor
    key_out: Tensor | None
    cis: Tensor
    carry_windows: Tensor
    carry_out: Tensor | None


@dataclass(frozen=True)
class DecodeGroup:
    """Requests with one token each: their rows of the step [G], and what they read.

    opens_page: their pooling comes after that of the step's spans.
    """

    rows: Tensor
    window_read: Tensor
    window_hidden: Tensor
    entries: dict[int, Entries]
    pooling: dict[int, Pooling]
    opens_page: bool


@dataclass(frozen=True)
class PrefillSpan:
    """One request's tokens: rows start..end-1 of the step, positions p0..p1-1.

    window_read: addresses of positions max(0, p0 - W + 1) .. p1 - 1.
    """

    start: int
    end: int
    p0: int
    p1: int
    window_read: Tensor
    entries: dict[int, Entries]
    pooling: dict[int, SpanPooling]


@dataclass(frozen=True)
class Groups:
    """The two kinds of work."""

    decode: tuple[DecodeGroup, ...]
    prefill: tuple[PrefillSpan, ...]


def group(
    layout: CacheLayout,
    tables: BlockTables,
    query_start: Tensor,
    seq_lens: Tensor,
    entry_cis: dict[int, Tensor],
    together: int = 0,
) -> Groups:
    """The groups of a step (see `Step`); query_start and seq_lens are int64."""
    grouping = _Grouping(layout, tables, entry_cis, together)
    find = grouping.blocks if together else grouping.of
    return find(query_start, seq_lens)


class _Grouping:
    def __init__(
        self,
        layout: CacheLayout,
        tables: BlockTables,
        entry_cis: dict[int, Tensor],
        together: int,
    ) -> None:
        self.layout, self.tables, self.entry_cis = layout, tables, entry_cis
        self.window = layout.sliding_window + together

    def blocks(self, query_start: Tensor, seq_lens: Tensor) -> Groups:
        """Every row sees what the last one of its block does."""
        assert not self.layout.page, "blocks have windows only"
        count = query_start.diff()
        request = torch.arange(len(count), device=count.device).repeat_interleave(count)
        rows = torch.arange(len(request), device=count.device)
        last = seq_lens[request] - 1
        group = (self._group(request, rows, last, opens_page=False),) if len(rows) else ()
        return Groups(decode=group, prefill=())

    def of(self, query_start: Tensor, seq_lens: Tensor) -> Groups:
        count = query_start.diff()
        first = seq_lens - count
        several = _where(count > self.layout.ring_rows)
        several = several[first[several].argsort()]
        spans = torch.stack(
            [several, query_start[several], query_start[several + 1], seq_lens[several]], 1
        )
        return Groups(
            decode=tuple(self._decode(count, query_start, seq_lens)),
            prefill=tuple(
                self._span(b, start, end, total) for b, start, end, total in spans.tolist()
            ),
        )

    def _window(self, request: Tensor, position: Tensor) -> Tensor:
        block, part = self.layout.window_block, self.layout.window.parts["kv"]
        number = self.tables.window[request, position // block].long()
        return number * self.tables.window_stride + position % block * part.codec.words

    def _entry(self, ratio: int, name: str, request: Tensor, entry: Tensor) -> Tensor:
        part = self.layout.page[ratio].parts[name]
        number = self.tables.page[request, entry // part.rows].long()
        inside = part.offset + entry % part.rows * part.codec.words
        return number * self.tables.page_stride + inside

    def _key(self, ratio: int, request: Tensor, entry: Tensor) -> Tensor | None:
        return self._entry(ratio, "key", request, entry) if ratio == CSA else None

    def _decode(
        self, count: Tensor, query_start: Tensor, seq_lens: Tensor
    ) -> Iterator[DecodeGroup]:
        for turn in range(self.layout.ring_rows):
            request = _where((count > turn) & (count <= self.layout.ring_rows))
            position = (seq_lens - count)[request] + turn
            octave = torch.frexp(position.clamp(min=SHORT - 1).double()).exponent
            opens = (position - turn) % self.layout.page_size == 0
            kind = 2 * octave + (opens & (position > turn))
            for k in kind.unique().tolist():
                group = kind == k
                who = request[group]
                yield self._group(who, query_start[who] + turn, position[group], k % 2 == 1)

    def _group(
        self, request: Tensor, rows: Tensor, position: Tensor, opens_page: bool
    ) -> DecodeGroup:
        seen = position[:, None] - torch.arange(self.window - 1, -1, -1, device=position.device)
        ratios = self.layout.page
        return DecodeGroup(
            rows=rows,
            window_read=self._window(request[:, None], seen.clamp(min=0)),
            window_hidden=seen < 0,
            entries={r: self._visible_entries(r, request, position) for r in ratios},
            pooling={r: self._pooling(r, request, rows, position) for r in ratios},
            opens_page=opens_page,
        )

    def _visible_entries(self, ratio: int, request: Tensor, position: Tensor) -> Entries:
        visible = (position + 1) // ratio
        count = int(visible.max())
        entry = torch.arange(count, device=position.device)
        hidden = entry >= visible[:, None]
        # Hidden places repeat a row that was written, and a request that sees none borrows one:
        # a weight of 0 times whatever an unwritten row holds might be NaN.
        entry = torch.minimum(entry, (visible[:, None] - 1).clamp(min=0))
        who = torch.where(visible > 0, request, request[visible.argmax()])[:, None]
        kv, key = self._entry(ratio, "kv", who, entry), self._key(ratio, who, entry)
        return Entries(visible, count, hidden, kv, key)

    def _carry(self, ratio: int, request: Tensor, page: Tensor) -> Tensor | None:
        if ratio != CSA:
            return None
        offset = self.layout.page[ratio].parts["carry"].offset
        return self.tables.page[request, page].long() * self.tables.page_stride + offset

    def _sums(self, ratio: int, request: Tensor, position: Tensor) -> Tensor:
        row = position % self.layout.ring_rows
        words = self.layout.ring[ratio].parts["sums"].codec.words
        return self.tables.ring[request].long() * self.tables.ring_stride + row * words

    def _pooling(self, ratio: int, request: Tensor, rows: Tensor, position: Tensor) -> Pooling:
        size = self.layout.page_size
        closing = _where((position + 1) % ratio == 0)
        paging = _where((position % size == 0) & (position > 0))
        filling = _where((position + 1) % size == 0)
        who, entry = request[closing], position[closing] // ratio
        return Pooling(
            phase=position % ratio,
            before=self._sums(ratio, request, position - 1),
            sums=self._sums(ratio, request, position),
            opening=_where(position % ratio == 0),
            fresh=_where(position == 0),
            paging=paging,
            carry_in=self._carry(ratio, request[paging], position[paging] // size - 1),
            closing=closing,
            cis=self.entry_cis[ratio][rows[closing]],
            kv_out=self._entry(ratio, "kv", who, entry),
            key_out=self._key(ratio, who, entry),
            filling=filling,
            carry_out=self._carry(ratio, request[filling], position[filling] // size),
        )

    def _span(self, request: int, start: int, end: int, total: int) -> PrefillSpan:
        p0 = total - (end - start)
        device = self.tables.page.device
        who = torch.tensor(request, device=device)
        seen = torch.arange(max(0, p0 - self.window + 1), total, device=device)
        return PrefillSpan(
            start=start,
            end=end,
            p0=p0,
            p1=total,
            window_read=self._window(who, seen),
            entries={r: self._span_entries(r, who, p0, total) for r in self.layout.page},
            pooling={r: self._span_pooling(r, who, start, p0, total) for r in self.layout.page},
        )

    def _span_entries(self, ratio: int, who: Tensor, p0: int, p1: int) -> Entries:
        entry = torch.arange(p1 // ratio, device=who.device)
        visible = (torch.arange(p0, p1, device=who.device) + 1) // ratio
        hidden = entry >= visible[:, None]
        kv, key = self._entry(ratio, "kv", who, entry), self._key(ratio, who, entry)
        return Entries(visible, len(entry), hidden, kv, key)

    def _span_pooling(self, ratio: int, who: Tensor, start: int, p0: int, p1: int) -> SpanPooling:
        size = self.layout.page_size
        ends_at = torch.tensor([p0, p1], device=who.device)
        closed = torch.arange(p0 // ratio, p1 // ratio, device=who.device)
        ends = torch.arange(p0 // size, p1 // size, device=who.device)
        before = torch.arange(p0 // size - 1, p0 // size, device=who.device)
        return SpanPooling(
            before=self._sums(ratio, who[None], ends_at[:1] - 1),
            sums=self._sums(ratio, who[None], ends_at[1:] - 1),
            carry_in=self._carry(ratio, who, before) if p0 > 0 and p0 % size == 0 else None,
            kv_out=self._entry(ratio, "kv", who, closed),
            key_out=self._key(ratio, who, closed),
            cis=self.entry_cis[ratio][start + (closed + 1) * ratio - 1 - p0],
            carry_windows=(ends + 1) * (size // ratio) - 1 - p0 // ratio,
            carry_out=self._carry(ratio, who, ends),
        )


def _where(mask: Tensor) -> Tensor:
    """Indices int64 of the true places of a mask [n]."""
    return mask.nonzero()[:, 0]
