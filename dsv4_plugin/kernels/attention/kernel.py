"""Triton: one program takes some heads of one query, or of a tile of queries.

Keys come in pieces: the window, then every `piece` compressed rows. Each piece is a softmax of its
own, and pieces are merged in order. With few queries the pieces are dealt out to programs, the last
of which merges; with many, one program walks through all pieces. Both do the same arithmetic,
blocks of keys begin at multiples of their size, and rows that a query does not see leave its sums
as they are: so a query's result has the same bits whatever the batch, the chunk or the tile.

A captured step is launched for the longest request there may be. Programs go by the lengths on the
device: those that no piece is left for leave at once, and scratch of pieces that are not there is
not touched.

An e4m3 row is read as words. A word's bytes become four values by shifts, so the dims of a row
fall into four parts (4w, 4w + 1, ...) which the query is cut into alike; a bfloat16 row falls into
even and odd dims of its two halves. RoPE dims are a fifth part. Products do not mind the order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_plugin.cache.paged import Paged
from dsv4_plugin.cache.rows import RowFormat
from dsv4_plugin.cache.step import Step
from dsv4_plugin.kernels.arrival import counters, is_last
from dsv4_plugin.kernels.bits import e4m3_codes, halves
from dsv4_plugin.kernels.device import alignment, row_pointers
from dsv4_plugin.kernels.launch import pick, require

LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Launch:
    """heads of a program, keys of a block, warps; queries of a tile where requests bring many
    tokens; split: below this many programs pieces are dealt out to twice as many at most."""

    heads: int
    keys: int
    warps: int
    tile_rows: int
    split: int


LAUNCH = {
    "cdna": Launch(heads=16, keys=16, warps=8, tile_rows=16, split=216),  # keys=32 spills
    "any": Launch(heads=16, keys=32, warps=8, tile_rows=16, split=216),
}
PIECE = {0: 128, 4: 128, 128: 256}
"""Compressed rows of a piece, by ratio."""
MIN_DOT = 16
"""Least size of any side of a product."""


@triton.jit
def _scaled(x, scale, BLOCKS: tl.constexpr):
    """x [N, 16 * BLOCKS] times scale [N, BLOCKS], as bfloat16: a block of 64 dims is 16 words."""
    N: tl.constexpr = x.shape[0]
    W: tl.constexpr = x.shape[1]
    y = tl.reshape(x.to(tl.float32), (N, BLOCKS, W // BLOCKS)) * scale[:, :, None]
    return tl.reshape(y, (N, W)).to(tl.bfloat16)


@triton.jit
def _key_parts(row, ok, NOPE: tl.constexpr, ROPE: tl.constexpr, P: tl.constexpr, FP8: tl.constexpr):
    """Four parts bfloat16 [N, P] of the dims before RoPE's, and those [N, ROPE]; 0 where not ok."""
    w = tl.arange(0, P)
    some = ok[:, None]
    if FP8:
        words = tl.load(row[:, None] + w[None, :], mask=some & (w < NOPE // 4), other=0)
        BLOCKS: tl.constexpr = P // 16
        b = tl.arange(0, BLOCKS)
        at: tl.constexpr = NOPE // 4 + ROPE // 2
        real = some & (b * 64 < NOPE)[None, :]
        packed = tl.load(row[:, None] + (at + b // 4)[None, :], mask=real, other=0)
        byte = (packed >> ((b % 4) * 8)[None, :]) & 0xFF
        # Codes become float16 of the same bits: values divided by 2^8, subnormals included.
        scale = (((byte + 8) & 0xFF) << 23).to(tl.float32, bitcast=True)
        x0, x1, x2, x3 = e4m3_codes(words, tl.float16)
        k0, k1 = _scaled(x0, scale, BLOCKS), _scaled(x1, scale, BLOCKS)
        k2, k3 = _scaled(x2, scale, BLOCKS), _scaled(x3, scale, BLOCKS)
        rope = (row + NOPE // 4).to(tl.pointer_type(tl.bfloat16))
    else:
        half: tl.constexpr = NOPE // 4
        low = tl.load(row[:, None] + w[None, :], mask=some & (w < half), other=0)
        high = tl.load(row[:, None] + (half + w)[None, :], mask=some & (w < half), other=0)
        k0, k1 = halves(low, tl.bfloat16)
        k2, k3 = halves(high, tl.bfloat16)
        rope = (row + NOPE // 2).to(tl.pointer_type(tl.bfloat16))
    r = tl.arange(0, ROPE)
    kr = tl.load(rope[:, None] + r[None, :], mask=some, other=0.0)
    return k0, k1, k2, k3, kr


@triton.jit
def _query_part(q, ok, J: tl.constexpr, NOPE: tl.constexpr, P: tl.constexpr, FP8: tl.constexpr):
    """Part J of the queries at pointers q [M]."""
    w = tl.arange(0, P)
    dim = 4 * w + J if FP8 else (J // 2) * (NOPE // 2) + 2 * w + J % 2
    return tl.load(
        q[:, None] + dim[None, :], mask=ok[:, None] & (w < NOPE // 4)[None, :], other=0.0
    )


@triton.jit
def _attend(
    q0, q1, q2, q3, qr, k0, k1, k2, k3, kr, sees, scale, m_i, l_i, acc0, acc1, acc2, acc3, accr
):
    """One more block of keys: sees [M, N] says which query sees which. m_i, l_i, acc: the maximum,
    the sum and the weighted keys of the softmax so far."""
    s = tl.dot(q0, tl.trans(k0))
    s = tl.dot(q1, tl.trans(k1), acc=s)
    s = tl.dot(q2, tl.trans(k2), acc=s)
    s = tl.dot(q3, tl.trans(k3), acc=s)
    s = tl.dot(qr, tl.trans(kr), acc=s)
    s = tl.where(sees, s * scale, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(s, 1))
    safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = tl.exp2(m_i - safe)
    p = tl.exp2(s - safe[:, None])
    l_i = tl.fma(l_i, alpha, tl.sum(p, 1))
    p = p.to(tl.bfloat16)
    acc0 = tl.dot(p, k0, acc=acc0 * alpha[:, None])
    acc1 = tl.dot(p, k1, acc=acc1 * alpha[:, None])
    acc2 = tl.dot(p, k2, acc=acc2 * alpha[:, None])
    acc3 = tl.dot(p, k3, acc=acc3 * alpha[:, None])
    accr = tl.dot(p, kr, acc=accr * alpha[:, None])
    return m_new, l_i, acc0, acc1, acc2, acc3, accr


@triton.jit
def _merge(total, part, keep, add):
    """total * keep + part * add, rounded alike wherever it is compiled."""
    return tl.fma(total, keep, part * add)


@triton.jit
def _weights(m_total, m_part):
    """The common maximum and the factors of both sides; m_total is finite (the sink)."""
    m_new = tl.maximum(m_total, m_part)
    return m_new, tl.exp2(m_total - m_new), tl.exp2(m_part - m_new)


@triton.jit
def _unrotate(x, cis, ok):
    """Undo RoPE on x [M, ROPE] with (cos, sin) pairs at pointers cis [M]."""
    M: tl.constexpr = x.shape[0]
    R: tl.constexpr = x.shape[1]
    i = tl.arange(0, R)
    factors = tl.load(cis[:, None] + i[None, :], mask=ok[:, None], other=0.0)
    cos, sin = tl.split(tl.reshape(factors, (M, R // 2, 2)))
    a, b = tl.split(tl.reshape(x, (M, R // 2, 2)))
    return tl.reshape(tl.join(a * cos + b * sin, b * cos - a * sin), (M, R))


@triton.jit
def _store_parts(
    to, ok, acc0, acc1, acc2, acc3, accr, NOPE: tl.constexpr, P: tl.constexpr, FP8: tl.constexpr
):
    """Dims in their order again, at pointers `to` [M]."""
    M: tl.constexpr = acc0.shape[0]
    R: tl.constexpr = accr.shape[1]
    some = ok[:, None]
    if FP8:
        x = tl.reshape(tl.join(tl.join(acc0, acc2), tl.join(acc1, acc3)), (M, 4 * P))
        i = tl.arange(0, 4 * P)
        tl.store(to[:, None] + i[None, :], x, mask=some & (i < NOPE))
    else:
        i = tl.arange(0, 2 * P)
        inside = some & (i < NOPE // 2)
        tl.store(to[:, None] + i[None, :], tl.reshape(tl.join(acc0, acc1), (M, 2 * P)), mask=inside)
        second = to[:, None] + (NOPE // 2 + i)[None, :]
        tl.store(second, tl.reshape(tl.join(acc2, acc3), (M, 2 * P)), mask=inside)
    tl.store(to[:, None] + (NOPE + tl.arange(0, R))[None, :], accr, mask=some)


@triton.jit
def _combine(
    part_m,
    part_l,
    part_acc,
    sink,
    cis,
    out,
    t,
    h,
    ok,
    pieces,
    places,
    H,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Merge the pieces of heads h [M] of row t, in order; there is room for `places` of them."""
    D: tl.constexpr = NOPE + ROPE
    i = tl.arange(0, WIDTH)
    r = NOPE + tl.arange(0, ROPE)
    plain = ok[:, None] & (i < NOPE)[None, :]
    m_total = tl.load(sink + h, mask=ok, other=0.0) * 1.4426950408889634
    l_total = tl.full(h.shape, 1.0, tl.float32)
    x = tl.zeros((h.shape[0], WIDTH), tl.float32)
    xr = tl.zeros((h.shape[0], ROPE), tl.float32)
    for piece in range(pieces):
        cell = (t * places + piece) * H + h
        m_i = tl.load(part_m + cell, mask=ok, other=0.0, cache_modifier=".cg")
        l_i = tl.load(part_l + cell, mask=ok, other=0.0, cache_modifier=".cg")
        row = part_acc + cell[:, None] * D
        y = tl.load(row + i[None, :], mask=plain, other=0.0, cache_modifier=".cg")
        yr = tl.load(row + r[None, :], mask=ok[:, None], other=0.0, cache_modifier=".cg")
        m_total, keep, add = _weights(m_total, m_i)
        l_total = _merge(l_total, l_i, keep, add)
        x = _merge(x, y, keep[:, None], add[:, None])
        xr = _merge(xr, yr, keep[:, None], add[:, None])
    share = (1.0 / l_total)[:, None]
    xr = _unrotate(xr * share, cis + t * ROPE + h * 0, ok)
    to = out + (t * H + h[:, None]) * D
    dtype = out.dtype.element_ty
    tl.store(to + i[None, :], (x * share).to(dtype), mask=plain)
    tl.store(to + r[None, :], xr.to(dtype), mask=ok[:, None])


@triton.jit(
    do_not_specialize=[
        "window_last", "window_tables", "entry_last", "entry_tables", "rows", "places"
    ]
)  # fmt: skip
def attend(
    q,
    sink,
    position,
    request,
    cis,
    window,
    window_table,
    window_stride,
    window_offset,
    window_last,
    window_tables,
    entries,
    entry_table,
    entry_stride,
    entry_offset,
    entry_last,
    entry_tables,
    chosen,
    choices,
    out,
    part_m,
    part_l,
    part_acc,
    counter,
    scale,
    rows,
    places,
    q_stride,
    H,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    P: tl.constexpr,
    WIDTH: tl.constexpr,
    FP8: tl.constexpr,
    WORDS: tl.constexpr,
    ALIGN: tl.constexpr,
    SLIDING_WINDOW: tl.constexpr,
    WINDOW_ROWS: tl.constexpr,
    ENTRY_ROWS: tl.constexpr,
    RATIO: tl.constexpr,
    CHOOSING: tl.constexpr,
    PIECE: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Program (tile, head block, first of its pieces). A row has no more pieces than its own keys
    fill, and room for `places` of them."""
    D: tl.constexpr = NOPE + ROPE
    M: tl.constexpr = TILE * HEADS
    first = tl.program_id(0) * TILE
    if SPLIT:  # one row to a program
        own = tl.maximum(tl.load(position + first) + 1, 0) // RATIO
        if CHOOSING:
            own = tl.minimum(own, choices)
        if tl.program_id(2) > tl.cdiv(own, PIECE):
            return
    lane = tl.arange(0, M)
    t = first + lane // HEADS
    h = tl.program_id(1) * HEADS + lane % HEADS
    inside = t < rows
    pos = tl.load(position + t, mask=inside, other=-1)
    who = tl.load(request + t, mask=inside, other=-1)
    live = inside & (h < H) & (pos >= 0)
    from_q = q + t.to(tl.int64) * q_stride + h * D
    q0 = _query_part(from_q, live, 0, NOPE, P, FP8)
    q1 = _query_part(from_q, live, 1, NOPE, P, FP8)
    q2 = _query_part(from_q, live, 2, NOPE, P, FP8)
    q3 = _query_part(from_q, live, 3, NOPE, P, FP8)
    r = tl.arange(0, ROPE)
    qr = tl.load(from_q[:, None] + (NOPE + r)[None, :], mask=live[:, None], other=0.0)
    m_total = tl.load(sink + h, mask=h < H, other=0.0) * 1.4426950408889634
    l_total = tl.full((M,), 1.0, tl.float32)
    out0 = tl.zeros((M, P), tl.float32)
    out1 = tl.zeros((M, P), tl.float32)
    out2 = tl.zeros((M, P), tl.float32)
    out3 = tl.zeros((M, P), tl.float32)
    outr = tl.zeros((M, ROPE), tl.float32)
    n = tl.arange(0, KEYS)
    # Requests of a tile follow one another; a tile of one row has one.
    low_request = tl.max(who, 0)
    high_request = low_request
    if TILE > 1:
        low_request = tl.min(tl.where(pos >= 0, who, 0x7FFFFFFF), 0)
    for b in range(tl.minimum(low_request, high_request + 1), high_request + 1):
        mine = live & (who == b)
        last = tl.max(tl.where(mine, pos, -1), 0)
        least = tl.min(tl.where(mine, pos, 0x7FFFFFFF), 0)
        seen = (pos + 1) // RATIO if RATIO > 0 else pos * 0
        most = (last + 1) // RATIO if RATIO > 0 else 0
        if CHOOSING:
            most = tl.minimum(most, choices)
        pieces = 1 + tl.cdiv(most, PIECE)
        low_piece = 0
        step = 1
        if SPLIT:
            pieces = tl.minimum(pieces, places)
            low_piece = tl.program_id(2)
            step = tl.num_programs(2)
        from_row = first.to(tl.int64)
        some = h < H
        for piece in range(low_piece, pieces, step):
            m_i = tl.full((M,), float("-inf"), tl.float32)
            l_i = tl.zeros((M,), tl.float32)
            acc0 = tl.zeros((M, P), tl.float32)
            acc1 = tl.zeros((M, P), tl.float32)
            acc2 = tl.zeros((M, P), tl.float32)
            acc3 = tl.zeros((M, P), tl.float32)
            accr = tl.zeros((M, ROPE), tl.float32)
            start = (piece - 1) * PIECE
            end = tl.minimum(start + PIECE, most)
            if piece == 0:
                start = tl.maximum(least - SLIDING_WINDOW + 1, 0) // KEYS * KEYS
                end = last + 1
            for begin in range(start, end, KEYS):
                i = begin + n
                if piece == 0:
                    real = (i < end) & (i > least - SLIDING_WINDOW)
                    row, ok = row_pointers(
                        window, window_table + b * window_tables, i, real,
                        window_stride, window_offset, window_last, WINDOW_ROWS, WORDS, ALIGN,
                    )  # fmt: skip
                    sees = (i[None, :] <= pos[:, None]) & (
                        i[None, :] > pos[:, None] - SLIDING_WINDOW
                    )
                else:
                    real = i < end
                    if CHOOSING:
                        at = chosen + first.to(tl.int64) * choices + i
                        i = tl.load(at, mask=real, other=-1)
                        real = real & (i < (last + 1) // RATIO)
                    row, ok = row_pointers(
                        entries, entry_table + b * entry_tables, i, real,
                        entry_stride, entry_offset, entry_last, ENTRY_ROWS, WORDS, ALIGN,
                    )  # fmt: skip
                    sees = i[None, :] < seen[:, None]
                sees = sees & mine[:, None] & ok[None, :]
                k0, k1, k2, k3, kr = _key_parts(row, ok, NOPE, ROPE, P, FP8)
                m_i, l_i, acc0, acc1, acc2, acc3, accr = _attend(
                    q0, q1, q2, q3, qr, k0, k1, k2, k3, kr, sees, scale,
                    m_i, l_i, acc0, acc1, acc2, acc3, accr,
                )  # fmt: skip
            if SPLIT:
                cell = (from_row * places + piece) * H + h
                tl.store(part_m + cell, m_i, mask=some)
                tl.store(part_l + cell, l_i, mask=some)
                _store_parts(part_acc + cell * D, some, acc0, acc1, acc2, acc3, accr, NOPE, P, FP8)
            else:
                m_total, keep, add = _weights(m_total, m_i)
                l_total = _merge(l_total, l_i, keep, add)
                out0 = _merge(out0, acc0, keep[:, None], add[:, None])
                out1 = _merge(out1, acc1, keep[:, None], add[:, None])
                out2 = _merge(out2, acc2, keep[:, None], add[:, None])
                out3 = _merge(out3, acc3, keep[:, None], add[:, None])
                outr = _merge(outr, accr, keep[:, None], add[:, None])
        if SPLIT:
            place = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
            if is_last(counter + place, tl.minimum(pieces, step)):
                _combine(
                    part_m, part_l, part_acc, sink, cis, out, from_row, h, some,
                    pieces, places, H, NOPE, ROPE, WIDTH,
                )  # fmt: skip
    if not SPLIT:
        share = (1.0 / l_total)[:, None]
        outr = _unrotate(outr * share, cis + t * ROPE, inside)
        to = out + (t.to(tl.int64) * H + h) * D
        dtype = out.dtype.element_ty
        _store_parts(
            to, inside & (h < H), (out0 * share).to(dtype), (out1 * share).to(dtype),
            (out2 * share).to(dtype), (out3 * share).to(dtype), outr.to(dtype), NOPE, P, FP8,
        )  # fmt: skip


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
    """As in `reference`.

    Raises:
        ValueError: rows of a format the kernel does not read.
    """
    n, heads, d = q.shape
    rope = cis.shape[1]
    fp8 = _is_fp8(window)
    require(sink, cis, step.position, step.request, chosen)
    assert q.stride()[1:] == (d, 1)
    assert window.table.stride(1) == 1
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if n == 0:
        return out
    launch = pick(LAUNCH)
    tile, block = _tile(heads, launch, step.tiles and chosen is None)
    head_blocks = triton.cdiv(heads, block)
    entries_or_window = window if entries is None else entries
    longest = 0 if ratio == 0 else step.longest // ratio
    choices = 0 if chosen is None else chosen.shape[1]
    pieces = 1 + triton.cdiv(min(longest, choices) if choices else longest, PIECE[ratio])
    split = tile == 1 and pieces > 1 and n * head_blocks < launch.split
    cells = n * pieces * heads if split else 0
    part = torch.empty(cells * (d + 2), dtype=torch.float32, device=q.device)
    part_acc, part_m, part_l = part.split([cells * d, cells, cells])
    dealt = min(pieces, triton.cdiv(launch.split, n * head_blocks)) if split else 1
    grid = (triton.cdiv(n, tile), head_blocks, dealt)
    attend[grid](
        q, sink, step.sees, step.request, cis,
        *_arguments(window), *_arguments(entries_or_window),
        chosen if chosen is not None else step.sees, choices,
        out, part_m, part_l, part_acc, counters("attention", q.device, n * head_blocks * split),
        d**-0.5 * LOG2E, n, pieces, q.stride(0),
        heads, NOPE=d - rope, ROPE=rope, P=max(MIN_DOT, triton.next_power_of_2((d - rope) // 4)),
        WIDTH=triton.next_power_of_2(d - rope), FP8=fp8, WORDS=window.pool.codec.words,
        ALIGN=min(alignment(window), alignment(entries_or_window)), SLIDING_WINDOW=sliding_window,
        WINDOW_ROWS=window.rows, ENTRY_ROWS=entries_or_window.rows, RATIO=ratio,
        CHOOSING=chosen is not None, PIECE=PIECE[ratio], SPLIT=split,
        TILE=tile, HEADS=block, KEYS=launch.keys, num_warps=launch.warps, num_stages=1,
    )  # fmt: skip
    return out


def _tile(heads: int, launch: Launch, tiles: bool) -> tuple[int, int]:
    """Queries and heads of a program: together at least what a product needs."""
    block = min(launch.heads, triton.next_power_of_2(heads))
    if not tiles:
        return 1, max(block, MIN_DOT)
    return max(launch.tile_rows, MIN_DOT) // block, block


def _arguments(rows: Paged) -> tuple[Tensor, Tensor, int, int, int, int]:
    table = rows.table
    return rows.pool.storage, table, rows.stride, rows.offset, table.shape[1] - 1, table.stride(0)


def _is_fp8(rows: Paged) -> bool:
    stored = rows.pool.codec.format
    if stored not in (RowFormat.FP8, RowFormat.BFLOAT16):
        raise ValueError(f"kv_dtype is {stored}; Triton attention reads bfloat16 and fp8")
    return stored == RowFormat.FP8
