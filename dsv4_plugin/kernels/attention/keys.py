"""Keys of attention: where the rows of a tile lie, and the tile itself, decoded once.

A tile is KEYS rows of what a query sees, all of its window or all of its entries. Their dims fall
into four quarters of W neighbouring dims, and each quarter becomes one bfloat16 [KEYS, W] that both
products read. A load's column is 8 dims: 8 bytes of e4m3 codes, or 16 of bfloat16.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dsv4_plugin.cache.paged import Paged
from dsv4_plugin.kernels.bits import e4m3_codes, halves
from dsv4_plugin.kernels.device import alignment
from dsv4_plugin.kernels.pin import pin

NEVER = 1 << 30
"""Tokens of an entry where there are no entries: a case of its own compiles to spills on sm_90."""


def part(rows: Paged) -> tuple[tuple[Tensor, Tensor, int, int], int, int]:
    """As kernels take it, in three arguments; `find_rows` takes them as one tuple."""
    table = rows.table
    fixed = rows.pool.storage, table, rows.stride, rows.offset
    return fixed, table.shape[1] - 1, table.stride(0)


def aligned(*parts: Paged) -> int:
    """Words that the address of every row is a multiple of: 2 or 4."""
    words = min(map(alignment, parts))
    assert words % 2 == 0, "rows do not begin at multiples of 8 bytes"
    return words


@triton.jit
def _either(near, a, b):
    """Of two `part` tuples: a where near, else b."""
    return (
        tl.where(near, a[0], b[0]), tl.where(near, a[1], b[1]), tl.where(near, a[2], b[2]),
        tl.where(near, a[3], b[3]), tl.where(near, a[4], b[4]), tl.where(near, a[5], b[5]),
    )  # fmt: skip


# A tile's rows are found in steps, since the addresses of each are made of what the one before has
# loaded: whoever goes through many tiles loads ahead, and uses nothing before a tile's products.
# near: is the tile the window's? window, entries: storage, table, stride, offset, last place and
# row stride of the table. THREADS threads look for each row, and one address is taken of theirs: a
# load with as many elements as a program has threads is not done again for every layout that its
# value is used in.


@triton.jit
def load_choices(
    near, count, chosen, CHOOSING: tl.constexpr, KEYS: tl.constexpr, THREADS: tl.constexpr
):
    """Where the tile's entries are listed, these: int32 [KEYS * THREADS]. count: there are so many
    up to the end."""
    i = tl.arange(0, KEYS * THREADS) // THREADS
    if CHOOSING:
        i = tl.load(chosen + i, mask=(i < count) & (not near), other=-1)
    return i


@triton.jit
def find_places(
    near, first, count, listed, visible, CHOOSING: tl.constexpr, KEYS: tl.constexpr,
    THREADS: tl.constexpr,
):  # fmt: skip
    """The tile's rows as indices among those of the window or the entries: int32 [KEYS * THREADS],
    -1 where there is none. first, count: of the first row, and how many there are up to the end.
    listed: from `load_choices`; those below `visible` are seen."""
    i = tl.arange(0, KEYS * THREADS) // THREADS
    index = first + i
    if CHOOSING:
        index = tl.where(near, index, tl.where(listed < visible, listed, -1))
    return tl.where(i < count, index, -1)


@triton.jit
def find_blocks(
    near, index, window, entries, who, WINDOW_ROWS: tl.constexpr, ENTRY_ROWS: tl.constexpr
):  # fmt: skip
    """The blocks of request `who` that hold its rows `index`; -1 where there is none."""
    _, table, _, _, last, tables = _either(near, window, entries)
    place = tl.where(near, index // WINDOW_ROWS, index // ENTRY_ROWS)
    real = (index >= 0) & (place <= last)
    return tl.load(table + who * tables + place, mask=real, other=-1)


@triton.jit
def find_rows(
    near, index, block, window, entries, WINDOW_ROWS: tl.constexpr, ENTRY_ROWS: tl.constexpr,
    WORDS: tl.constexpr, KEYS: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Byte addresses int64 [KEYS], 0 where there is no row."""
    storage, _, stride, offset, _, _ = _either(near, window, entries)
    inside = tl.where(near, index % WINDOW_ROWS, index % ENTRY_ROWS)
    word = block.to(tl.int64) * stride + (offset + inside * WORDS)
    address = tl.where(block >= 0, (storage + word).to(tl.int64), 0)
    if THREADS > 1:
        address = tl.max(tl.reshape(address, (KEYS, THREADS)), 1)
    return address


@triton.jit
def load_quarter(
    address, quarter, NOPE: tl.constexpr, ROPE: tl.constexpr, W: tl.constexpr, FP8: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """What is stored of dims quarter * W .. of the rows at `address`, 0 where there is no row."""
    some = (address != 0)[:, None]
    if FP8:
        return _packed(address, some, quarter, NOPE, ROPE, W)
    else:  # noqa: RET505  (Triton 3.6 compiles what follows a return)
        i = quarter * W + tl.arange(0, W)
        if 4 * W > NOPE + ROPE:
            some = some & (i < NOPE + ROPE)[None, :]
        row = tl.multiple_of(address.to(tl.pointer_type(tl.bfloat16)), 4 * ALIGN)
        return (tl.load(row[:, None] + i[None, :], mask=some, other=0.0),)


@triton.jit
def decode_quarter(stored, quarter, NOPE: tl.constexpr, W: tl.constexpr, FP8: tl.constexpr):
    """Dims quarter * W .., bfloat16 [KEYS, W], of what `load_quarter` found."""
    return _decoded(stored, quarter, NOPE, W) if FP8 else stored[0]


@triton.jit
def _packed(address, some, quarter, NOPE: tl.constexpr, ROPE: tl.constexpr, W: tl.constexpr):
    """Of e4m3 rows - NOPE codes, ROPE bfloat16, then a UE8M0 byte for every 64 codes - per column
    of 8 dims: 8 bytes, the 8 after these where it is RoPE's, and the word with its scale; of 256
    dims or less that is one word for all columns, [KEYS, 1]."""
    u = quarter * (W // 8) + tl.arange(0, W // 8)
    row = address.to(tl.pointer_type(tl.int64))
    words = address.to(tl.pointer_type(tl.int32))
    rope = (u >= NOPE // 8)[None, :]
    real = some & (u < (NOPE + ROPE) // 8)[None, :]
    # A column of RoPE takes two of the 8 bytes that a column of codes takes one of. (The hint is
    # not quite true of those: without it threads would run along the rows. An element is 8 bytes.)
    at = tl.max_contiguous(tl.where(u < NOPE // 8, u, 2 * u - NOPE // 8), 2)
    a = tl.load(row[:, None] + at[None, :], mask=real, other=0)
    b = tl.load(row[:, None] + (at + 1)[None, :], mask=real & rope, other=0)
    SCALES: tl.constexpr = NOPE // 4 + ROPE // 2
    if W > 256:
        at = (SCALES + u // 32)[None, :]
        scale = tl.load(words[:, None] + at, mask=real & ~rope, other=0)
    else:
        if 3 * W >= NOPE:  # There are quarters without codes, behind the last scale.
            some = some & (quarter * W < NOPE)
        scale = tl.load(words[:, None] + (SCALES + quarter * W // 256), mask=some, other=0)
    return a, b, scale


@triton.jit
def _decoded(stored, quarter, NOPE: tl.constexpr, W: tl.constexpr):
    a, b, packed = stored
    u = quarter * (W // 8) + tl.arange(0, W // 8)
    rope = (u >= NOPE // 8)[None, :]
    byte = (packed >> (u // 8 % 4 * 8)[None, :]) & 0xFF
    # Codes become float16 of the same bits: values divided by 2^8, subnormals included.
    scale = (((byte + 8) & 0xFF) << 23).to(tl.float32, bitcast=True)
    x0, x1, x2, x3 = _four(a.to(tl.int32), scale)
    x4, x5, x6, x7 = _four((a >> 32).to(tl.int32), scale)
    y0, y1 = halves(a.to(tl.int32), tl.bfloat16)
    y2, y3 = halves((a >> 32).to(tl.int32), tl.bfloat16)
    y4, y5 = halves(b.to(tl.int32), tl.bfloat16)
    y6, y7 = halves((b >> 32).to(tl.int32), tl.bfloat16)
    x0, x1, x2, x3 = _choose(rope, y0, x0, y1, x1, y2, x2, y3, x3)
    x4, x5, x6, x7 = _choose(rope, y4, x4, y5, x5, y6, x6, y7, x7)
    even = tl.join(tl.join(x0, x4), tl.join(x2, x6))
    odd = tl.join(tl.join(x1, x5), tl.join(x3, x7))
    x = tl.reshape(tl.join(even, odd), (a.shape[0], W))
    # Pinned, or Triton 3.6 takes a product of what was joined in another order of its dims.
    return pin(x)


@triton.jit
def _choose(first, y0, x0, y1, x1, y2, x2, y3, x3):
    """Each y where first, else its x."""
    return (
        tl.where(first, y0, x0), tl.where(first, y1, x1),
        tl.where(first, y2, x2), tl.where(first, y3, x3),
    )  # fmt: skip


@triton.jit
def _four(codes, scale):
    """The four e4m3 codes of words times scale, bfloat16."""
    k0, k1, k2, k3 = e4m3_codes(codes, tl.float16)
    return (
        (k0.to(tl.float32) * scale).to(tl.bfloat16), (k1.to(tl.float32) * scale).to(tl.bfloat16),
        (k2.to(tl.float32) * scale).to(tl.bfloat16), (k3.to(tl.float32) * scale).to(tl.bfloat16),
    )  # fmt: skip
