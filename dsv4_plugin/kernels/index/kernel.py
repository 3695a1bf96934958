"""Triton: index queries, scores against keys where they lie, and the exact choice.

Keys are read as words, whose bytes fall into four parts of the dims (4w, 4w + 1, ...), as the
query is stored. e4m3 codes become float16 of the same bits, exactly; products are float16 with
float32 sums, on every architecture. They are entries x heads, so that the sum over a row's heads
stays within a few lanes. For a step of prompts each request's keys are gathered out of its pages
once, decoded and side by side; the products add the same values in the same order.

e4m3 x e4m3, faster from sm_89 on (an H200: 141 us for 243), would not be what the definition says.
Queries for fp8 keys are float16: as e4m3 they change 2 % of the choices (of 512 among 8,192 random
keys). Queries and keys of fp4 are e4m3 under one power of two only where the powers of their blocks
are at most 2^14 apart; a block's power cannot wait until after the product, whose sum over all
blocks the relu takes; and sm_90's tensor cores keep some 14 bits of sums of e4m3 products.

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
from dsv4_plugin.kernels.bits import e2m1_pairs, e4m3_codes, halves
from dsv4_plugin.kernels.device import BFLOAT16, FP4, FP8, alignment, row_pointers
from dsv4_plugin.kernels.index.topk import topk
from dsv4_plugin.kernels.launch import pick, require
from dsv4_plugin.kernels.programmatic import follow, kernel

SCORE_VALUES = 1 << 26
"""Most scores kept at a time (256 MiB): more rows take their turn."""


FLAT_BYTES = 1 << 28
"""Most of the keys that are gathered for a step of prompts: where they would take more, they are
read in their pages."""


@dataclass(frozen=True)
class Way:
    """Warps of a program, stages of its loop over blocks."""

    warps: int
    stages: int


@dataclass(frozen=True)
class Launch:
    """entries of a block; ways of keys in pages and of gathered ones, which have to add a row's
    heads up in the same order: with as many warps. Programs that share a launch's blocks, at
    least, where there are so many; of gathered ones a program gets `blocks` at most."""

    entries: int
    paged: Way
    flat: Way
    programs: int = 864
    blocks: int = 32


LAUNCHES = {
    # measured, an H200: 5 us (65,536 tokens), 42 (a million) in pages; gathered, in blocks of 128,
    # 243 us for 4,096 rows at 8,192 tokens, where 1,525 were without gathering
    "any": Launch(entries=64, paged=Way(4, 1), flat=Way(4, 3)),
}
COUNTS = ("last", "tables", "padded", "ratio", "out_stride")
"""Arguments whose values are not compiled in."""


@dataclass(frozen=True)
class Flat:
    """Keys of all requests, side by side: float16 [B, N, c] in the order of the queries' dims, and
    what they are to be multiplied by, float32 [B, N]."""

    keys: Tensor
    scale: Tensor


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


@kernel()
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
    follow()
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
    p0, p1, p2, p3 = e2m1_pairs(words, tl.float16)
    return (
        _times(p0, factor, N, P), _times(p1, factor, N, P), _times(p2, factor, N, P),
        _times(p3, factor, N, P), (top << 23).to(tl.float32, bitcast=True),
    )  # fmt: skip


@triton.jit
def _times(pairs, factor, N: tl.constexpr, P: tl.constexpr):
    """Words of two float16 values [N, P // 2] times factor [N, P // 8]: float16 [N, P]."""
    low, high = halves(pairs, tl.float16)
    x = tl.reshape(tl.join(low, high).to(tl.float32), (N, P // 8, 8))
    return tl.reshape(x * factor[:, :, None], (N, P)).to(tl.float16)


@triton.jit
def _key_parts(row, ok, C: tl.constexpr, P: tl.constexpr, FORMAT: tl.constexpr):
    """A key's four parts float16 [N, P], in the order of the queries' dims, and its scale [N]."""
    if FORMAT == FP8:
        found = _keys(row, ok, C, P)
    elif FORMAT == FP4:
        found = _narrow_keys(row, ok, C, P)
    else:
        tl.static_assert(FORMAT == BFLOAT16)
        found = _wide_keys(row, ok, C, P)
    return found


@kernel(do_not_specialize=COUNTS)
def gather_keys(
    paged, last, tables, lengths, flat, scales, padded, ratio, C: tl.constexpr, P: tl.constexpr,
    FORMAT: tl.constexpr, WORDS: tl.constexpr, PAGE_ROWS: tl.constexpr, ALIGN: tl.constexpr,
    ENTRIES: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Program (request, block of entries): keys as the products take them, side by side; those in
    no page are zero. There is room for `padded` entries of each request."""
    follow()
    who = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * ENTRIES
    n = (tl.load(lengths + who) // ratio).to(tl.int32)
    if begin >= n:
        return
    storage, table, stride, offset = paged
    entry = begin + tl.arange(0, ENTRIES)
    row, ok = row_pointers(
        storage, table + who * tables, begin, n, stride, offset, last, PAGE_ROWS, WORDS, ALIGN,
        ENTRIES, THREADS,
    )  # fmt: skip
    k0, k1, k2, k3, scale = _key_parts(row, ok, C, P, FORMAT)
    w = tl.arange(0, P)[None, :]
    QUARTER: tl.constexpr = C // 4
    to = flat + (who * padded + entry)[:, None] * C + w
    # Blocks are read whole: what is past the last entry is zero, not what memory held.
    tl.store(to, k0, mask=w < QUARTER)
    tl.store(to + QUARTER, k1, mask=w < QUARTER)
    tl.store(to + 2 * QUARTER, k2, mask=w < QUARTER)
    tl.store(to + 3 * QUARTER, k3, mask=w < QUARTER)
    tl.store(scales + who * padded + entry, scale)


@kernel(do_not_specialize=COUNTS)
def index_scores(
    q, weight, position, request, paged, last, tables, flat, scales, padded, out, out_stride,
    INDEX_HEADS,
    IP: tl.constexpr, C: tl.constexpr, P: tl.constexpr, FORMAT: tl.constexpr, WORDS: tl.constexpr,
    PAGE_ROWS: tl.constexpr, ALIGN: tl.constexpr, RATIO: tl.constexpr, ENTRIES: tl.constexpr,
    FLAT: tl.constexpr, STAGES: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Program (row, share of the blocks of ENTRIES entries that it sees). FLAT: keys are
    `gather_keys`'s, else they are read in their pages."""
    follow()
    t = tl.program_id(0).to(tl.int64)
    seen = (tl.load(position + t) + 1) // RATIO
    who = tl.load(request + t).to(tl.int64)
    if (tl.program_id(1) * ENTRIES >= seen) | (who < 0):  # No request is; both are asked for.
        return
    h = tl.arange(0, IP)
    real = h < INDEX_HEADS
    weights = tl.load(weight + t * INDEX_HEADS + h, mask=real, other=0.0)
    from_q = q + ((t * INDEX_HEADS + h) * C)[None, :]
    QUARTER: tl.constexpr = C // 4
    c = tl.arange(0, P)
    some = real[None, :] & (c < QUARTER)[:, None]
    q0 = tl.load(from_q + c[:, None], mask=some, other=0.0)
    q1 = tl.load(from_q + QUARTER + c[:, None], mask=some, other=0.0)
    q2 = tl.load(from_q + 2 * QUARTER + c[:, None], mask=some, other=0.0)
    q3 = tl.load(from_q + 3 * QUARTER + c[:, None], mask=some, other=0.0)
    storage, table, stride, offset = paged
    blocks = tl.cdiv(seen, ENTRIES)
    for block in tl.range(tl.program_id(1), blocks, tl.num_programs(1), num_stages=STAGES):
        entry = block * ENTRIES + tl.arange(0, ENTRIES)
        if FLAT:
            at = who * padded + entry
            from_k = flat + at[:, None] * C + c[None, :]
            near = (c < QUARTER)[None, :]
            k0 = tl.load(from_k, mask=near, other=0.0)
            k1 = tl.load(from_k + QUARTER, mask=near, other=0.0)
            k2 = tl.load(from_k + 2 * QUARTER, mask=near, other=0.0)
            k3 = tl.load(from_k + 3 * QUARTER, mask=near, other=0.0)
            scale = tl.load(scales + at)
        else:
            row, ok = row_pointers(
                storage, table + who * tables, block * ENTRIES, seen, stride, offset, last,
                PAGE_ROWS, WORDS, ALIGN, ENTRIES, THREADS,
            )  # fmt: skip
            k0, k1, k2, k3, scale = _key_parts(row, ok, C, P, FORMAT)
        # As many products of gathered keys: Triton lays them out by that, and the sum with them.
        s = tl.dot(k0, q0)
        s = tl.dot(k1, q1, acc=s)
        s = tl.dot(k2, q2, acc=s)
        s = tl.dot(k3, q3, acc=s)
        total = tl.sum(tl.maximum(s, 0.0) * weights[None, :], 1) * scale
        tl.store(out + t * out_stride + entry, total, mask=entry < seen)


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
    flat = gathered(keys, step.seq_lens, ratio, n) if step.tiles else None
    size = max(4, SCORE_VALUES // n // 4 * 4)  # Pointers stay aligned.
    parts = []
    for first in range(0, max(1, len(q)), size):
        rows = slice(first, first + size)
        at = step.position[rows]
        score = scores(q[rows], weight[rows], keys, at, step.request[rows], ratio, n, flat)
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


def gathered(keys: Paged, lengths: Tensor, ratio: int, n: int) -> Flat | None:
    """All keys of requests that bring many rows, which so are found and decoded once; None where
    they would take more than FLAT_BYTES. lengths: int [B] tokens of each request; n: most keys."""
    requests, c = len(lengths), keys.pool.codec.width
    block = pick(LAUNCHES).entries
    padded = triton.cdiv(n, block) * block
    if requests * padded * (2 * c + 4) > FLAT_BYTES:
        return None
    device = keys.table.device
    found = Flat(
        torch.empty((requests, padded, c), dtype=torch.float16, device=device),
        torch.empty((requests, padded), dtype=torch.float32, device=device),
    )
    gather_keys[(requests, padded // block)](
        *_part(keys), lengths, found.keys, found.scale, padded, ratio, **_shape(keys, c),
        ENTRIES=block, THREADS=max(1, 128 // block), num_warps=4,
    )  # fmt: skip
    return found


def scores(
    q: Tensor,
    weight: Tensor,
    keys: Paged,
    position: Tensor,
    request: Tensor,
    ratio: int,
    n: int,
    flat: Flat | None = None,
) -> Tensor:
    """As in `reference`, but left unwritten where undefined. flat: the keys, gathered.

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
    launch = pick(LAUNCHES)
    way = launch.paged if flat is None else launch.flat
    blocks = triton.cdiv(n, launch.entries)
    shares = max(triton.cdiv(launch.programs, t), triton.cdiv(blocks, launch.blocks) if flat else 1)
    index_scores[(t, min(blocks, shares))](
        q, weight, position, request, *_part(keys),
        flat.keys if flat else q, flat.scale if flat else weight,
        flat.keys.shape[1] if flat else 0, out, width, heads,
        # With 16 heads ptxas takes 96 registers for sm_86, and spills in the loop.
        IP=max(32, triton.next_power_of_2(heads)), **_shape(keys, c), RATIO=ratio,
        ENTRIES=launch.entries, FLAT=flat is not None, STAGES=way.stages,
        THREADS=max(1, 32 * way.warps // launch.entries), num_warps=way.warps, num_stages=1,
    )  # fmt: skip
    return out


def _part(keys: Paged) -> tuple[tuple[Tensor, Tensor, int, int], int, int]:
    """As `row_pointers` takes it, and the row stride of the table; in three arguments, because
    numbers in tuples are compiled in where they are 1 or multiples of 16."""
    table = keys.table
    fixed = keys.pool.storage, table, keys.stride, keys.offset
    return fixed, table.shape[1] - 1, table.stride(0)


def _shape(keys: Paged, c: int) -> dict[str, int]:
    """What kernels that read keys are compiled for."""
    return {
        "C": c, "P": max(16, triton.next_power_of_2(c // 4)),
        "FORMAT": int(keys.pool.codec.format), "WORDS": keys.pool.codec.words,
        "PAGE_ROWS": keys.rows, "ALIGN": alignment(keys),
    }  # fmt: skip
