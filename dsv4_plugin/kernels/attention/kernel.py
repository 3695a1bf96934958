"""Triton: a program takes the heads of one query, and decodes every key once for all of them.
Where a step's queries read the same rows many times, these are unpacked to bfloat16 first
(`unpack.py`), and every key is copied instead.

What a query sees is a list of tiles of KEYS rows: its window's, then its entries'. Of each tile a
program makes the scores, their maximum rounded up to a whole power of two, and the weighted sum of
its rows, from zero; then it folds that into what it has. Folding multiplies by powers of two only,
which rounds nothing: so it does not matter who folds. With few queries every tile goes to a program
of its own, which leaves it in a cell of scratch, and `merge` folds the cells in their order.

Every PIECE tiles begin a new sum, and pieces are folded in order too: in a long list a cell is a
piece. So a query's result has the same bits whatever the batch, the chunk and the launch, as long
as KEYS and PIECE are a constant of the chip's family.

The dims of a row are four quarters. Scores are (0 + 1) + (2 + 3) of their products; where a program
makes only some quarters of the output (its column part) it begins with those, and adds the same
pairs: a sum of two does not mind the order.

A captured step is launched for the longest request there may be. Programs go by the lengths on the
device: those that no cell is left for leave at once, a row of one cell is finished where it is
made, and scratch of cells that are not there is not touched.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_plugin.cache.paged import Paged
from dsv4_plugin.cache.rows import RowFormat
from dsv4_plugin.cache.step import Step
from dsv4_plugin.kernels.attention.keys import (
    NEVER,
    aligned,
    decode_quarter,
    find_blocks,
    find_places,
    find_rows,
    load_choices,
    load_quarter,
    part,
)
from dsv4_plugin.kernels.attention.unpack import ALL, unpacked
from dsv4_plugin.kernels.launch import pick, require
from dsv4_plugin.kernels.programmatic import follow, kernel

LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Way:
    """below: taken for fewer rows, times head blocks, than this. columns: parts that the output is
    cut into (1, 2 or 4: a program each). stages: of the loop over tiles, where nothing lies between
    loads and products. deal: lists of more tiles than this are dealt out, a tile to a program, as
    far as DEALT_BYTES go; else a program takes a piece. unpack: rows of fp8 that prompts read so
    many times, on average, are unpacked first."""

    below: float
    columns: int
    warps: int
    stages: int = 1
    deal: float = inf
    unpack: float = inf


@dataclass(frozen=True)
class Launch:
    """heads of a program, at most; keys of a tile; tiles of a piece; the ways of few to many rows,
    for keys in fp8 and in bfloat16, unpacked ones among them."""

    heads: int
    keys: int
    piece: int
    fp8: tuple[Way, ...]
    bfloat16: tuple[Way, ...]


LAUNCHES = {
    # measured, an H200, with other sums and cells of 128 keys: 32 keys; 4 columns for one row, 2
    # for many; unpacking a row takes as long as decoding it once or twice. compiled: up to 18
    # spilled words, some of them wgmma's descriptors. bfloat16 rows take 40 % of the instructions
    # of fp8's; stages would leave one program an SM (128 KiB) and spill. modelled: a window is
    # dealt out too, since one more tile takes as long as `merge`
    "hopper": Launch(
        64, 32, 40, (Way(4, 4, 4, deal=2), Way(32, 2, 4, deal=2), Way(inf, 2, 4, unpack=4)),
        (Way(4, 4, 4, deal=2), Way(32, 2, 4, deal=2), Way(inf, 2, 4)),
    ),
    # compiled: no spills; 64 heads would spill, 32 keys more of them. bfloat16 rows: 66 KiB, 56 %
    # of the instructions. counted: CSA, one row, 2.9 us of instructions at least, of 4 columns 3.9,
    # of 1 3.8; 16 rows 33 us, dealt out in 4 columns 57. A row's single tiles leave 2.6 MB, which
    # have to stay in L2
    "a100": Launch(
        32, 32, 40, (Way(16, 2, 4, deal=2), Way(64, 2, 4), Way(inf, 1, 8, unpack=4)),
        (Way(16, 2, 4, 2, deal=2), Way(64, 2, 4, 2), Way(inf, 1, 8, 2)),
    ),
    # compiled: no spills, 66 KiB
    "consumer": Launch(
        32, 32, 40, (Way(16, 2, 4, deal=2), Way(64, 2, 4), Way(inf, 1, 8, unpack=4)),
        (Way(16, 2, 4, 2, deal=2), Way(64, 2, 4, 2), Way(inf, 1, 8, 2)),
    ),
    # compiled: no spills; 32 heads would spill in the loop
    "cdna": Launch(
        16, 32, 40, (Way(64, 4, 4, deal=2), Way(inf, 1, 4, unpack=4)),
        (Way(64, 4, 4, deal=2), Way(inf, 1, 4)),
    ),
    # guessed; compiled for sm_100: no spills, 66 KiB
    "any": Launch(
        32, 32, 40, (Way(16, 2, 4, deal=2), Way(64, 2, 4), Way(inf, 1, 8, unpack=4)),
        (Way(16, 2, 4, 2, deal=2), Way(64, 2, 4, 2), Way(inf, 1, 8, 2)),
    ),
}  # fmt: skip
SCRATCH_BYTES = 1 << 27
"""Most of the cells of a launch: more rows take their turn."""
DEALT_BYTES = 1 << 26
"""Most of the cells of single tiles: beyond, cells are pieces."""
MIN_DOT = 16
"""Least size of any side of a product."""
AHEAD = tl.constexpr(16)
"""Cells that `merge` asks for ahead of the one it folds."""
LOWEST = tl.constexpr(-(2.0**20))
"""The exponent of nothing at all."""


@triton.jit
def _power(n):
    """2^n of whole float32 n <= 0, exactly; 0 below -64, where float32 sums lose it."""
    bits = (tl.maximum(n, -64.0).to(tl.int32) + 127) << 23
    return tl.where(n < -64.0, 0.0, bits.to(tl.float32, bitcast=True))


@triton.jit
def _weights(m_i, m):
    """The common exponent of two sums, and what each is multiplied by."""
    m_new = tl.maximum(m_i, m)
    return m_new, _power(m_i - m_new), _power(m - m_new)


@triton.jit
def _fold(total, alpha, part, beta):
    """total * alpha + part * beta, weights being powers of two: it rounds once, wherever it is
    compiled."""
    return tl.fma(total, alpha, part * beta)


@triton.jit
def _nothing(M: tl.constexpr, W: tl.constexpr, N: tl.constexpr):
    """Maximum, sum and N accumulators [M, W] of no key."""
    acc = ()  # type: tuple[object, ...]
    for _ in tl.static_range(N):
        acc += (tl.zeros((M, W), tl.float32),)
    return tl.full((M,), LOWEST, tl.float32), tl.zeros((M,), tl.float32), acc


@triton.jit
def _sum(a, b):
    """a + b, but for Triton no sum: it would make the second product go on from the first."""
    return tl.fma(a, 1.0, b)


@triton.jit
def _attend(q, k, real, scale, m_i, l_i, acc):
    """One more tile of keys. q, k: four quarters [M, W] and [KEYS, W], in an order that pairs 0
    with 1 and 2 with 3. m_i, l_i, acc: exponent of the maximum, sum, and the weighted first
    quarters so far."""
    s01 = _sum(tl.dot(q[0], tl.trans(k[0])), tl.dot(q[1], tl.trans(k[1])))
    s23 = _sum(tl.dot(q[2], tl.trans(k[2])), tl.dot(q[3], tl.trans(k[3])))
    s = tl.where(real[None, :], _sum(s01, s23), float("-inf"))
    m = tl.maximum(tl.ceil(tl.max(s, 1) * scale), LOWEST)
    p = tl.exp2(tl.fma(s, scale, -m[:, None]))
    m_i, alpha, beta = _weights(m_i, m)
    l_i = _fold(l_i, alpha, tl.sum(p, 1), beta)
    p = p.to(tl.bfloat16)
    new = ()  # type: tuple[object, ...]
    for i in tl.static_range(len(acc)):
        x = tl.dot(p, k[i])
        new += (_fold(acc[i], alpha[:, None], x, beta[:, None]),)
    return m_i, l_i, new


@triton.jit
def _shares(m_i, l_i, sink):
    """What the weighted rows of everything are multiplied by, once the sink has joined the sum."""
    at = sink * 1.4426950408889634
    m = tl.ceil(at)
    _, alpha, beta = _weights(m, m_i)
    return beta / _fold(tl.exp2(at - m), alpha, l_i, beta)


@triton.jit
def _angles(dim, cis, NOPE: tl.constexpr, D: tl.constexpr):
    """cos, sin [1, W / 2] of dims dim [W], from the pairs at pointer cis."""
    turned = (dim >= NOPE) & (dim < D)
    nothing = tl.where(dim % 2 == 0, 1.0, 0.0)
    pairs = tl.load(cis + (dim - NOPE), mask=turned, other=nothing)
    cos, sin = tl.split(tl.reshape(pairs, (dim.shape[0] // 2, 2)))
    return cos[None, :], sin[None, :]


@triton.jit
def _unrotated(x, cos, sin):
    """x [M, W] with RoPE undone: `device.turn` backwards, with fused multiply-adds, since it has no
    twin in torch that it would have to equal bit for bit."""
    M: tl.constexpr = x.shape[0]
    W: tl.constexpr = x.shape[1]
    a, b = tl.split(tl.reshape(x, (M, W // 2, 2)))
    # Written out, they are the same wherever this is compiled.
    return tl.reshape(tl.join(tl.fma(a, cos, b * sin), tl.fma(b, cos, -(a * sin))), (M, W))


@triton.jit
def _tiles(pos, choices, SPAN: tl.constexpr, RATIO: tl.constexpr, CHOOSING: tl.constexpr,
           KEYS: tl.constexpr):  # fmt: skip
    """Of a row that sees positions up to pos: rows of its window, entries, tiles of both."""
    front = tl.minimum(pos + 1, SPAN)
    seen = (pos + 1) // RATIO
    if CHOOSING:
        seen = tl.minimum(seen, choices)
    return front, seen, tl.cdiv(front, KEYS) + tl.cdiv(seen, KEYS)


@triton.jit
def _part(tile, end, pos, front, seen, KEYS: tl.constexpr):
    """Is the tile of a row's list the window's? Where its first row lies in its part of the list,
    and which that is of the window's rows or the entries; how many rows there are from it to that
    part's end: none from tile `end` on."""
    near_tiles = tl.cdiv(front, KEYS)
    near = tile < near_tiles
    begin = tl.where(near, tile, tile - near_tiles) * KEYS
    count = tl.where(tile < end, tl.where(near, front, seen) - begin, 0)
    return near, begin, begin + tl.where(near, pos + 1 - front, 0), count


COUNTS = (
    "window_last", "window_tables", "entries_last", "entries_tables", "cells_m", "cells_l",
    "places", "each", "choices", "take",
)  # fmt: skip
"""Arguments whose values are not compiled in. Numbers in tuples are, where they are 1 or multiples
of 16."""


@kernel(do_not_specialize=COUNTS)
def attend(
    q, sink, sees, request, cis, window, window_last, window_tables, entries, entries_last,
    entries_tables, starts, take, chosen, out, cells_m, cells_l, cells_acc, scale, choices, places,
    each, q_stride, H,
    NOPE: tl.constexpr, ROPE: tl.constexpr, W: tl.constexpr, FP8: tl.constexpr,
    WORDS: tl.constexpr, ALIGN: tl.constexpr, SPAN: tl.constexpr, WINDOW_ROWS: tl.constexpr,
    ENTRY_ROWS: tl.constexpr, RATIO: tl.constexpr, CHOOSING: tl.constexpr, COLUMNS: tl.constexpr,
    HEADS: tl.constexpr, KEYS: tl.constexpr, THREADS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (column part, head block, row; cell of the row): a cell is `each` tiles, and there is
    room for `places` of them. take: 1, rows of requests that are unpacked (by `starts`); 0, of
    those that are not; -1, all."""
    follow()
    D: tl.constexpr = NOPE + ROPE
    N: tl.constexpr = 4 // COLUMNS
    blocks = tl.cdiv(H, HEADS)
    t = (tl.program_id(0) // (COLUMNS * blocks)).to(tl.int64)
    column = tl.program_id(0) % COLUMNS
    h = tl.program_id(0) // COLUMNS % blocks * HEADS + tl.arange(0, HEADS)
    pos = tl.load(sees + t)
    who = tl.load(request + t).to(tl.int64)
    front, seen, tiles = _tiles(pos, choices, SPAN, RATIO, CHOOSING, KEYS)
    cells = tl.maximum(tl.cdiv(tiles, each), 1)
    cell = tl.program_id(1)
    if (cell >= cells) | (who < 0):  # No request is; but so both are asked for together.
        return
    start = tl.load(starts + 2 * who, mask=take >= 0, other=0)
    if (take >= 0) & ((start >= 0) != (take == 1)):
        return
    first = 0 if COLUMNS == 1 else column * N  # a constant, where it can be
    w = tl.arange(0, W)
    head = (h < H)[:, None]
    q_parts = ()  # type: tuple[object, ...]
    for i in tl.static_range(4):
        dim = (first ^ i) * W + w
        from_q = q + t * q_stride + h[:, None] * D + dim[None, :]
        q_parts += (tl.load(from_q, mask=head & (dim < D)[None, :], other=0.0),)
    own_sink = tl.load(sink + h, mask=h < H, other=0.0)
    m_i, l_i, acc = _nothing(HEADS, W, N)
    # (Triton unpacks no tuples.)
    window += (window_last, window_tables)
    entries += (entries_last, entries_tables)
    chosen += t * choices
    visible = (pos + 1) // RATIO
    tile = cell * each
    end = tl.minimum(tile + each, tiles)
    # While a tile is multiplied, the next one's blocks and the choices of the one behind that are
    # on their way.
    near, begin, offset, count = _part(tile, end, pos, front, seen, KEYS)
    listed = load_choices(near, count, chosen + begin, CHOOSING, KEYS, THREADS)
    index = find_places(near, offset, count, listed, visible, CHOOSING, KEYS, THREADS)
    block = find_blocks(near, index, window, entries, who, WINDOW_ROWS, ENTRY_ROWS)
    near, begin, _, count = _part(tile + 1, end, pos, front, seen, KEYS)
    listed = load_choices(near, count, chosen + begin, CHOOSING, KEYS, THREADS)
    for tile in tl.range(cell * each, end, num_stages=STAGES):
        near, _, _, _ = _part(tile, end, pos, front, seen, KEYS)
        address = find_rows(
            near, index, block, window, entries, WINDOW_ROWS, ENTRY_ROWS, WORDS, KEYS, THREADS
        )
        k = ()  # type: tuple[object, ...]
        for i in tl.static_range(0, 4, 2):  # Two are asked for at once; more would spill.
            one = load_quarter(address, first ^ i, NOPE, ROPE, W, FP8, ALIGN)
            two = load_quarter(address, first ^ (i + 1), NOPE, ROPE, W, FP8, ALIGN)
            k += (
                decode_quarter(one, first ^ i, NOPE, W, FP8),
                decode_quarter(two, first ^ (i + 1), NOPE, W, FP8),
            )
        near, _, offset, count = _part(tile + 1, end, pos, front, seen, KEYS)
        index = find_places(near, offset, count, listed, visible, CHOOSING, KEYS, THREADS)
        block = find_blocks(near, index, window, entries, who, WINDOW_ROWS, ENTRY_ROWS)
        near, begin, _, count = _part(tile + 2, end, pos, front, seen, KEYS)
        listed = load_choices(near, count, chosen + begin, CHOOSING, KEYS, THREADS)
        m_i, l_i, acc = _attend(q_parts, k, address != 0, scale, m_i, l_i, acc)
    if cells == 1:
        share = _shares(m_i, l_i, own_sink)[:, None]
        for i in tl.static_range(N):
            dim = (first + i) * W + w
            x = acc[i] * share
            if COLUMNS > 1 or (i + 1) * W > NOPE:
                x = _unrotated(x, *_angles(dim, cis + t * ROPE, NOPE, D))
            to = out + (t * H + h[:, None]) * D + dim[None, :]
            tl.store(to, x.to(out.dtype.element_ty), mask=head & (dim < D)[None, :])
    else:
        place = (t * places + cell) * H + h
        mine = (h < H) & (column == 0)  # The others have the same.
        tl.store(cells_m + place, m_i, mask=mine)
        tl.store(cells_l + place, l_i, mask=mine)
        for i in tl.static_range(N):
            column_dim = (first + i) * W + w
            at = cells_acc + place[:, None] * D + column_dim[None, :]
            tl.store(at, acc[i], mask=head & (column_dim < D)[None, :])


@triton.jit
def _join(m_i, l_i, acc, m, l, x):  # noqa: E741
    """A sum [1, 4 W] and one more."""
    m_i, alpha, beta = _weights(m_i, m)
    return m_i, _fold(l_i, alpha, l, beta), _fold(acc, alpha[:, None], x, beta[:, None])


@triton.jit
def _join_cells(
    m_i, l_i, acc, cells_m, cells_l, cells_acc, first, end, H, dim, D: tl.constexpr
):  # fmt: skip
    """A sum and the cells first .. end - 1 of a row, in order. AHEAD of them are on their way at
    any time: one after another, a program would do nothing but wait."""
    for cell in tl.range(first, end, num_stages=AHEAD):
        place = cell * H
        m = tl.load(cells_m + place)
        l = tl.load(cells_l + place)  # noqa: E741
        x = tl.load(cells_acc + place * D + dim, mask=dim < D, other=0.0)
        m_i, l_i, acc = _join(m_i, l_i, acc, m, l, x)
    return m_i, l_i, acc


@kernel(do_not_specialize=COUNTS)
def merge(
    sink, sees, cis, out, cells_m, cells_l, cells_acc, choices, places, each, H,
    NOPE: tl.constexpr, ROPE: tl.constexpr, W: tl.constexpr, SPAN: tl.constexpr,
    RATIO: tl.constexpr, CHOOSING: tl.constexpr, KEYS: tl.constexpr, PIECE: tl.constexpr,
    DEALT: tl.constexpr,
):  # fmt: skip
    """Program (head, row): fold the cells in order. DEALT: each is a tile, and PIECE of them are
    folded into a piece first."""
    follow()
    D: tl.constexpr = NOPE + ROPE
    h = tl.program_id(0) + tl.arange(0, 1)
    t = tl.program_id(1).to(tl.int64)
    own_sink = tl.load(sink + h)
    cos, sin = _angles(tl.arange(0, 4 * W), cis + t * ROPE, NOPE, D)
    _, _, tiles = _tiles(tl.load(sees + t), choices, SPAN, RATIO, CHOOSING, KEYS)
    cells = tl.cdiv(tiles, each)
    if cells <= 1:
        return
    place = t * places * H + h
    cells_m += place
    cells_l += place
    cells_acc += place[:, None] * D
    dim = tl.arange(0, 4 * W)[None, :]
    m_all, l_all, total = tl.full((1,), LOWEST, tl.float32), tl.zeros((1,), tl.float32), 0.0 * dim
    if DEALT:
        for first in range(0, cells, PIECE):
            m, l, x = tl.full((1,), LOWEST, tl.float32), tl.zeros((1,), tl.float32), 0.0 * dim  # noqa: E741
            end = tl.minimum(first + PIECE, cells)
            m, l, x = _join_cells(m, l, x, cells_m, cells_l, cells_acc, first, end, H, dim, D)  # noqa: E741
            m_all, l_all, total = _join(m_all, l_all, total, m, l, x)
    else:
        m_all, l_all, total = _join_cells(
            m_all, l_all, total, cells_m, cells_l, cells_acc, 0, cells, H, dim, D
        )
    y = _unrotated(total * _shares(m_all, l_all, own_sink)[:, None], cos, sin)
    to = out + (t * H + h[:, None]) * D + dim
    tl.store(to, y.to(out.dtype.element_ty), mask=dim < D)


@dataclass(frozen=True)
class Keys:
    """What a launch of `attend` reads, and of which requests: see its `take`."""

    window: Paged
    entries: Paged
    fp8: bool
    take: int


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
    assert d % 8 == rope % 8 == 0, f"{d} and {rope} dims are not columns of 8"
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if n == 0:
        return out
    launch = pick(LAUNCHES)
    block = max(MIN_DOT, min(launch.heads, triton.next_power_of_2(heads)))
    blocks = triton.cdiv(heads, block)
    ratio = ratio or NEVER
    longest = step.longest // ratio
    choices = 0 if chosen is None else chosen.shape[1]
    most = longest if chosen is None else min(longest, choices)
    tiles = triton.cdiv(sliding_window, launch.keys) + triton.cdiv(most, launch.keys)
    way = _way(launch, fp8, n * blocks)
    lies = Keys(window, window if entries is None else entries, fp8, -1)
    keys, starts = [lies], step.request
    if fp8 and step.tiles and way.unpack < inf:
        some = ALL if chosen is None else choices
        plain = unpacked(step, window, sliding_window, entries, ratio, rope, some, way.unpack)
        if plain is not None:
            others = [] if plain.all else [replace(lies, take=0)]
            starts, take = plain.starts, -1 if plain.all else 1
            keys = [Keys(plain.window, plain.entries, False, take), *others]
    cell_bytes = heads * (d + 2) * 4
    dealt = tiles > way.deal and n * tiles * cell_bytes <= DEALT_BYTES
    each = 1 if dealt else launch.piece
    places = triton.cdiv(tiles, each)
    turn = n if places == 1 else max(4, SCRATCH_BYTES // (places * cell_bytes) // 4 * 4)
    turn = min(n, turn)  # of four rows at least: pointers stay aligned
    cells = turn * places * heads if places > 1 else 0
    scratch = torch.empty(cells * (d + 2), dtype=torch.float32, device=q.device)
    cells_acc, cells_m, cells_l = scratch.split([cells * d, cells, cells])
    shape = {
        "NOPE": d - rope, "ROPE": rope, "W": max(MIN_DOT, triton.next_power_of_2(d) // 4),
        "SPAN": sliding_window, "RATIO": ratio, "CHOOSING": chosen is not None,
        "KEYS": launch.keys,
    }  # fmt: skip
    for first in range(0, n, turn):
        rows = slice(first, first + turn)
        count = min(turn, n - first)
        sees, cell_args = step.sees[rows], (cells_m, cells_l, cells_acc)
        for k in keys:
            way = _way(launch, k.fp8, n * blocks)
            attend[(count * blocks * way.columns, places)](
                q[rows], sink, sees, step.request[rows], cis[rows], *part(k.window),
                *part(k.entries), starts, k.take, sees if chosen is None else chosen[rows],
                out[rows], *cell_args, d**-0.5 * LOG2E, choices, places, each, q.stride(0), heads,
                **shape, FP8=k.fp8, WORDS=k.window.pool.codec.words,
                ALIGN=aligned(k.window, k.entries), WINDOW_ROWS=k.window.rows,
                ENTRY_ROWS=k.entries.rows, COLUMNS=way.columns, HEADS=block,
                THREADS=max(1, 32 * way.warps // launch.keys),
                STAGES=way.stages, num_warps=way.warps, num_stages=1,
            )  # fmt: skip
        if places > 1:
            merge[(heads, count)](
                sink, sees, cis[rows], out[rows], *cell_args, choices, places, each, heads,
                **shape, PIECE=launch.piece, DEALT=dealt, num_warps=4,
            )  # fmt: skip
    return out


def _way(launch: Launch, fp8: bool, rows: int) -> Way:
    return next(w for w in (launch.fp8 if fp8 else launch.bfloat16) if rows < w.below)


def _is_fp8(rows: Paged) -> bool:
    stored = rows.pool.codec.format
    if stored not in (RowFormat.FP8, RowFormat.BFLOAT16):
        raise ValueError(f"kv_dtype is {stored}; Triton attention reads bfloat16 and fp8")
    return stored == RowFormat.FP8
