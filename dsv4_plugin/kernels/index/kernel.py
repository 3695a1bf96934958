"""Triton: index queries, scores against keys where they lie, and the exact choice.

Keys are read as words, whose bytes fall into four parts of the dims (4w, 4w + 1, ...), as the
query is stored. e4m3 codes become float16 of the same bits, exactly; products are float16 with
float32 sums, on every architecture.

A captured step is launched for the longest request there may be. Programs go by the lengths on the
device: they share the blocks of entries that are there, and a row of few takes a short way through
the choice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_plugin.cache.paged import Paged
from dsv4_plugin.cache.rows import RowFormat
from dsv4_plugin.cache.step import Step
from dsv4_plugin.kernels.bits import e2m1_codes, e4m3_codes
from dsv4_plugin.kernels.device import BFLOAT16, FP4, FP8, alignment, row_pointers
from dsv4_plugin.kernels.index.topk import topk
from dsv4_plugin.kernels.launch import pick, require

SCORE_VALUES = 1 << 26
"""Most scores kept at a time (256 MiB): more rows take their turn."""


@dataclass(frozen=True)
class Launch:
    """entries of a block; warps; programs that share the blocks, at least, where there are so
    many; rows that share a read of the keys where requests bring many tokens, warps then, and
    blocks that a program gets then where there are programs enough."""

    entries: int
    warps: int
    programs: int
    rows: int
    row_warps: int
    blocks: int


LAUNCH = {"any": Launch(entries=64, warps=4, programs=864, rows=4, row_warps=8, blocks=8)}


@triton.jit
def _hadamard(x, STAGES: tl.constexpr):
    """Unscaled, over the last dim of x [N, 2^STAGES]."""
    N: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    for _ in tl.static_range(STAGES):
        a, b = tl.split(tl.reshape(x, (N, C // 2, 2)))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (N, C))
    return x


@triton.jit
def _round_e2m1(x, C: tl.constexpr):
    """x [N, C] to the nearest e2m1 value, ties to even, under a power of two per 32 dims."""
    N: tl.constexpr = x.shape[0]
    blocks = tl.reshape(x, (N, C // 32, 32))
    bits = tl.maximum(tl.max(tl.abs(blocks), 2), 6 * 2.0**-126).to(tl.int32, bitcast=True)
    # The power's exponent: the largest is at most 6 = 1.5 * 2^2 times it.
    byte = (bits >> 23) - 2 + ((bits & 0x7FFFFF) > 0x400000).to(tl.int32)
    power = (byte << 23).to(tl.float32, bitcast=True)[:, :, None]
    size = tl.abs(blocks) * ((254 - byte) << 23).to(tl.float32, bitcast=True)[:, :, None]
    step = tl.where(size < 2.0, 0.5, tl.where(size < 4.0, 1.0, 2.0))
    # Adding 1.5 * 2^23 steps rounds to whole ones.
    near = (size + 12582912.0 * step) - 12582912.0 * step
    return tl.reshape(tl.where(blocks < 0, -near, near) * power, (N, C))


@triton.jit
def index_queries(
    q,
    weight,
    cis,
    out,
    weight_out,
    q_stride,
    weight_stride,
    norm,
    INDEX_HEADS,
    C: tl.constexpr,
    ROPE: tl.constexpr,
    STAGES: tl.constexpr,
    E2M1: tl.constexpr,
    PARTS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Program (row, head block). Dim PARTS * w + j is stored at j * C / PARTS + w."""
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    ok = (h < INDEX_HEADS)[:, None]
    i = tl.arange(0, C)
    x = tl.load(q + t * q_stride + h[:, None] * C + i[None, :], mask=ok, other=0.0)
    a, b = tl.split(tl.reshape(x.to(tl.float32), (HEADS, C // 2, 2)))
    pair = tl.arange(0, C // 2) - (C - ROPE) // 2
    turned = pair >= 0
    cos = tl.load(cis + t * ROPE + 2 * pair, mask=turned, other=1.0)[None, :]
    sin = tl.load(cis + t * ROPE + 2 * pair + 1, mask=turned, other=0.0)[None, :]
    y = tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), (HEADS, C))
    y = y.to(x.dtype).to(tl.float32)
    if STAGES > 0:
        y = _hadamard(y, STAGES) * norm
    if E2M1:
        y = _round_e2m1(y, C)
    # 2^exponent is the least power of two above the largest value; the weight takes it over.
    bits = tl.max(tl.abs(y), 1).to(tl.int32, bitcast=True)
    exponent = tl.where(bits == 0, 127, (bits >> 23) + 1)
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    power = (exponent << 23).to(tl.float32, bitcast=True)
    z = tl.permute(tl.reshape(y * inverse[:, None], (HEADS, C // PARTS, PARTS)), (0, 2, 1))
    z = tl.reshape(z, (HEADS, C)).to(tl.float16)
    tl.store(out + (t * INDEX_HEADS + h[:, None]) * C + i[None, :], z, mask=ok)
    w = tl.load(weight + t * weight_stride + h, mask=h < INDEX_HEADS, other=0.0).to(tl.float32)
    tl.store(weight_out + t * INDEX_HEADS + h, w * power, mask=h < INDEX_HEADS)


@triton.jit
def _keys(row, ok, C: tl.constexpr, P: tl.constexpr):
    """An e4m3 key's four parts float16 [N, P], divided by 2^8, and its scale float32 [N]."""
    w = tl.arange(0, P)[None, :]
    words = tl.load(row[:, None] + w, mask=ok[:, None] & (w < C // 4), other=0)
    scale = tl.load(row + C // 4, mask=ok, other=0).to(tl.float32, bitcast=True)
    k0, k1, k2, k3 = e4m3_codes(words, tl.float16)
    return k0, k1, k2, k3, scale * 256.0


@triton.jit(do_not_specialize=["last", "table_stride", "rows", "out_stride"])
def index_scores(
    q,
    weight,
    position,
    request,
    storage,
    table,
    block_stride,
    offset,
    last,
    table_stride,
    out,
    rows,
    out_stride,
    INDEX_HEADS,
    IP: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    FORMAT: tl.constexpr,
    WORDS: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    ALIGN: tl.constexpr,
    RATIO: tl.constexpr,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Program (row tile, share of the blocks of ENTRIES entries that a row of the tile sees)."""
    first = tl.program_id(0) * ROWS
    tile = first + tl.arange(0, ROWS)
    last_pos = tl.max(tl.load(position + tile, mask=tile < rows, other=-1), 0)
    blocks = tl.cdiv((last_pos + 1) // RATIO, ENTRIES)
    h = tl.arange(0, IP)
    p = tl.arange(0, P)
    some_q = (h < INDEX_HEADS)[:, None] & (p < C // 4)[None, :]
    for block in range(tl.program_id(1), blocks, tl.num_programs(1)):
        begin = block * ENTRIES
        entry = begin + tl.arange(0, ENTRIES)
        k0 = tl.zeros((ENTRIES, P), tl.float16)
        k1 = k0
        k2 = k0
        k3 = k0
        scale = tl.zeros((ENTRIES,), tl.float32)
        holds = first * 0 - 1  # The request whose keys these are. (No constant: it changes.)
        for j in range(ROWS):
            t = first + j
            pos = tl.load(position + t, mask=t < rows, other=-1)
            who = tl.load(request + t, mask=t < rows, other=-1)
            seen = (pos + 1) // RATIO
            if begin < seen:
                if who != holds:
                    # All of the request's entries that a row of this tile may see.
                    near = tile < rows
                    mine = tl.load(request + tile, mask=near, other=-1) == who
                    far = tl.max(tl.where(mine, tl.load(position + tile, mask=near, other=-1), -1))
                    ok = entry < (far + 1) // RATIO
                    row, ok = row_pointers(
                        storage, table + who * table_stride, entry, ok, block_stride, offset, last,
                        PAGE_ROWS, WORDS, ALIGN,
                    )  # fmt: skip
                    if FORMAT == FP8:
                        k0, k1, k2, k3, scale = _keys(row, ok, C, P)
                    elif FORMAT == FP4:
                        k0, k1, k2, k3, scale = _narrow_keys(row, ok, C, P)
                    else:
                        tl.static_assert(FORMAT == BFLOAT16)
                        k0, k1, k2, k3, scale = _wide_keys(row, ok, C, P)
                    holds = who
                at = q + (t.to(tl.int64) * INDEX_HEADS + h[:, None]) * C + p[None, :]
                quarter: tl.constexpr = C // 4
                q0 = tl.load(at, mask=some_q, other=0.0)
                q1 = tl.load(at + quarter, mask=some_q, other=0.0)
                q2 = tl.load(at + 2 * quarter, mask=some_q, other=0.0)
                q3 = tl.load(at + 3 * quarter, mask=some_q, other=0.0)
                s = tl.dot(q0, tl.trans(k0))
                s = tl.dot(q1, tl.trans(k1), acc=s)
                s = tl.dot(q2, tl.trans(k2), acc=s)
                s = tl.dot(q3, tl.trans(k3), acc=s)
                w = tl.load(
                    weight + t.to(tl.int64) * INDEX_HEADS + h, mask=h < INDEX_HEADS, other=0.0
                )
                total = tl.sum(tl.maximum(s, 0.0) * w[:, None], 0) * scale
                to = out + t.to(tl.int64) * out_stride + entry
                tl.store(to, total, mask=entry < seen)


@triton.jit
def _wide_keys(row, ok, C: tl.constexpr, P: tl.constexpr):
    """A bfloat16 key's parts as float16 under a power of two, and that power [N]; even dims of
    both halves, then odd ones, as queries with PARTS = 2 are stored."""
    w = tl.arange(0, P)[None, :]
    inside = ok[:, None] & (w < C // 4)
    low = tl.load(row[:, None] + w, mask=inside, other=0)
    high = tl.load(row[:, None] + C // 4 + w, mask=inside, other=0)
    x0 = (low << 16).to(tl.float32, bitcast=True)
    x1 = (low & -65536).to(tl.float32, bitcast=True)
    x2 = (high << 16).to(tl.float32, bitcast=True)
    x3 = (high & -65536).to(tl.float32, bitcast=True)
    top = tl.maximum(tl.maximum(tl.abs(x0), tl.abs(x1)), tl.maximum(tl.abs(x2), tl.abs(x3)))
    exponent = (tl.max(top, 1).to(tl.int32, bitcast=True) >> 23) + 1
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)[:, None]
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    return (
        (x0 * inverse).to(tl.float16),
        (x2 * inverse).to(tl.float16),
        (x1 * inverse).to(tl.float16),
        (x3 * inverse).to(tl.float16),
        scale,
    )


@triton.jit
def _narrow_keys(row, ok, C: tl.constexpr, P: tl.constexpr):
    """An e2m1 key's parts as float16 under the largest of its scales, and that [N].

    A word's eight codes are dims 8w .. 8w + 7; code j of its lower and of its upper half are
    neighbours in part j. e2m1 bits are float16's under 2^14.
    """
    N: tl.constexpr = row.shape[0]
    w = tl.arange(0, P // 2)[None, :]
    words = tl.load(row[:, None] + w, mask=ok[:, None] & (w < C // 8), other=0)
    packed = tl.load(row + C // 8, mask=ok, other=0)
    b = tl.arange(0, P // 8)[None, :]
    byte = tl.where(b < C // 32, (packed[:, None] >> (b * 8)) & 0xFF, 0)
    top = tl.maximum(tl.max(byte, 1), 1)
    power = tl.maximum(byte - top[:, None] + 127 + 14, 1)
    factor = (power << 23).to(tl.float32, bitcast=True)
    k0 = _nibbles(words, factor, N, P)
    k1 = _nibbles(words >> 4, factor, N, P)
    k2 = _nibbles(words >> 8, factor, N, P)
    k3 = _nibbles(words >> 12, factor, N, P)
    return k0, k1, k2, k3, (top << 23).to(tl.float32, bitcast=True)


@triton.jit
def _nibbles(words, factor, N: tl.constexpr, P: tl.constexpr):
    """The lowest codes of both halves of each word, times factor [N, P // 8]: float16 [N, P]."""
    low, high = e2m1_codes(words, tl.float16)
    x = tl.reshape(tl.join(low, high).to(tl.float32), (N, P // 8, 8))
    return tl.reshape(x * factor[:, :, None], (N, P)).to(tl.float16)


def choose(
    q: Tensor,
    weight: Tensor,
    cis: Tensor,
    keys: Paged,
    step: Step,
    ratio: int,
    k: int,
    reduce: Callable[[Tensor], Tensor],
) -> Tensor:
    """As in `index`."""
    q, weight = queries(q, weight, cis, keys.pool.codec.format)
    n = max(1, step.longest // ratio)
    size = max(1, SCORE_VALUES // n)
    parts = []
    for first in range(0, max(1, len(q)), size):
        rows = slice(first, first + size)
        at = step.position[rows]
        score = scores(q[rows], weight[rows], keys, at, step.request[rows], ratio, n, step.tiles)
        parts.append(topk(reduce(score), at, ratio, k))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def queries(q: Tensor, weight: Tensor, cis: Tensor, keys: RowFormat) -> tuple[Tensor, Tensor]:
    """As in `reference`, with the dims of a head in the order that `scores` reads."""
    n, heads, c = q.shape
    require(cis)
    assert q.stride()[1:] == (c, 1)
    assert weight.stride(1) == 1
    out = torch.empty((n, heads, c), dtype=torch.float16, device=q.device)
    scaled = torch.empty((n, heads), dtype=torch.float32, device=q.device)
    if n:
        block = min(16, triton.next_power_of_2(heads))
        wide = keys == RowFormat.BFLOAT16
        index_queries[(n, triton.cdiv(heads, block))](
            q, weight, cis, out, scaled, q.stride(0), weight.stride(0), c**-0.5, heads,
            C=c, ROPE=cis.shape[1], STAGES=0 if wide else c.bit_length() - 1,
            E2M1=keys == RowFormat.FP4, PARTS=2 if wide else 4, HEADS=block, num_warps=4,
        )  # fmt: skip
    return out, scaled


def scores(
    q: Tensor,
    weight: Tensor,
    keys: Paged,
    position: Tensor,
    request: Tensor,
    ratio: int,
    n: int,
    tiles: bool = False,
) -> Tensor:
    """As in `reference`, but left unwritten where undefined.

    Raises:
        ValueError: keys of a format the kernel does not read.
    """
    stored = keys.pool.codec.format
    if stored == RowFormat.FLOAT32:
        raise ValueError(f"indexer keys are {stored}; the Triton indexer reads bfloat16, fp8, fp4")
    t, heads, c = q.shape
    require(q, weight, position, request)
    assert keys.table.stride(1) == 1
    width = triton.cdiv(n, 4) * 4
    out = torch.empty((t, width), dtype=torch.float32, device=q.device)
    if t == 0:
        return out
    launch = pick(LAUNCH)
    rows = launch.rows if tiles else 1
    tiles_of_rows, blocks = triton.cdiv(t, rows), triton.cdiv(n, launch.entries)
    shares = triton.cdiv(launch.programs, tiles_of_rows)
    if tiles:
        shares = max(shares, triton.cdiv(blocks, launch.blocks))
    index_scores[(tiles_of_rows, min(blocks, shares))](
        q, weight, position, request, keys.pool.storage, keys.table, keys.stride, keys.offset,
        keys.table.shape[1] - 1, keys.table.stride(0), out, t, width, heads,
        IP=max(16, triton.next_power_of_2(heads)), C=c,
        P=max(16, triton.next_power_of_2(c // 4)), FORMAT=int(stored),
        WORDS=keys.pool.codec.words, PAGE_ROWS=keys.rows, ALIGN=alignment(keys), RATIO=ratio,
        ROWS=rows, ENTRIES=launch.entries,
        num_warps=launch.row_warps if rows > 1 else launch.warps, num_stages=1,
    )  # fmt: skip
    return out
