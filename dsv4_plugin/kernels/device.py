"""Functions for Triton kernels: `exact`'s twins, and cache rows in their formats.

Launch kernels that use the twins with enable_fp_fusion=False: a fused multiply-add rounds once
where the twins round twice.
"""

from __future__ import annotations

from math import gcd

import triton
import triton.language as tl

from dsv4_plugin.cache.paged import Paged
from dsv4_plugin.cache.rows import RowFormat
from dsv4_plugin.kernels.bits import e4m3_encode, e4m3_scale, ue8m0_decode

FLOAT32 = tl.constexpr(int(RowFormat.FLOAT32))
BFLOAT16 = tl.constexpr(int(RowFormat.BFLOAT16))
FP8 = tl.constexpr(int(RowFormat.FP8))
FP4 = tl.constexpr(int(RowFormat.FP4))
"""How a cache row is stored."""


@triton.jit
def exp(x):
    """e^x for float32 x <= 0; 0 below -87."""
    low = tl.maximum(x, -87.0)
    n = tl.floor(low * 1.4426950408889634 + 0.5)
    r = low - n * 0.693359375
    r = r - n * -2.12194440e-4
    y = r * 1.9875691500e-4 + 1.3981999507e-3
    y = y * r + 8.3334519073e-3
    y = y * r + 4.1665795894e-2
    y = y * r + 1.6666665459e-1
    y = y * r + 5.0000001201e-1
    y = y * (r * r)
    y = y + r
    y = y + 1.0
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(x < -87.0, 0.0, y * power)


@triton.jit
def log(x):
    """Natural logarithm of normal positive float32 x."""
    bits = x.to(tl.int32, bitcast=True)
    n = (bits >> 23) - 127
    m = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    big = m > 1.41421356
    m = tl.where(big, m * 0.5, m)
    n = (n + big.to(tl.int32)).to(tl.float32)
    s = tl.div_rn(m - 1.0, m + 1.0)
    z = s * s
    y = z * (1 / 9) + (1 / 7)
    y = y * z + (1 / 5)
    y = y * z + (1 / 3)
    y = y * z + 1.0
    y = y * (s + s)
    y = y + n * -2.12194440e-4
    return y + n * 0.693359375


@triton.jit
def inverse_rms(squares, width, eps):
    """1 / sqrt(mean + eps) from the float64 sum of squares over `width` values."""
    mean = (squares / width).to(tl.float32)
    return tl.div_rn(tl.full(mean.shape, 1.0, tl.float32), tl.sqrt_rn(mean + eps))


@triton.jit
def sum_of_squares(x, axis: tl.constexpr):
    """float64."""
    x64 = x.to(tl.float64)
    return tl.sum(x64 * x64, axis)


@triton.jit
def tail_angles(cis, at, PLAIN: tl.constexpr, D: tl.constexpr):
    """What `turn` takes, [B, N]: cos and sin of a pair side by side.

    at: which dim each value is, [B, N], neighbours side by side. cis: pointer to (cos, sin) pairs.
    """
    return tl.load(cis + at - PLAIN, mask=(at >= PLAIN) & (at < D), other=0.0)


@triton.jit
def turn(x, angles, at, PLAIN: tl.constexpr, D: tl.constexpr):
    """Rotary embedding of dims PLAIN .. D-1 of float32 x [B, N] by `tail_angles`."""
    B: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    even_at, _ = tl.split(tl.reshape(at, (B, N // 2, 2)))
    turned = (even_at >= PLAIN) & (even_at < D)
    cos, sin = tl.split(tl.reshape(angles, (B, N // 2, 2)))
    a, b = tl.split(tl.reshape(x, (B, N // 2, 2)))
    even = tl.where(turned, a * cos - b * sin, a)
    odd = tl.where(turned, a * sin + b * cos, b)
    return tl.reshape(tl.join(even, odd), (B, N))


@triton.jit
def hadamard(x, WIDTH: tl.constexpr, STAGES: tl.constexpr):
    """Orthonormal Hadamard transform of float32 [WIDTH], WIDTH = 2^STAGES."""
    for _ in tl.static_range(STAGES):
        a, b = tl.split(tl.reshape(x, (WIDTH // 2, 2)))
        x = tl.reshape(tl.trans(tl.join(a + b, a - b)), (WIDTH,))
    return x * (WIDTH**-0.5)


@triton.jit
def bfloat16_bits(x):
    """float32 or bfloat16 to the bits of the nearest bfloat16, as int32."""
    return x.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def pack_pairs(x):
    """float32 [N, 2 * words] to bfloat16 pairs in int32 words [N, words]."""
    low, high = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    return bfloat16_bits(low) | (bfloat16_bits(high) << 16)


@triton.jit
def pack_bytes(code):
    """Codes 0..255 of any integer type [N, 4 * words] to int32 words [N, words]."""
    four = tl.reshape(code.to(tl.int32), (code.shape[0], code.shape[1] // 4, 4))
    shift = tl.arange(0, 4)[None, None, :] * 8
    return tl.sum(four << shift, 2)


@triton.jit
def store_kv_row(
    row, x, PLAIN: tl.constexpr, D: tl.constexpr, WORDS: tl.constexpr, FORMAT: tl.constexpr
):
    """Write a KV row, float32 [blocks, 64] of which D are used, at the int32 pointer `row`.

    The first PLAIN dims are those that fp8 quantises; all WORDS are written, padding as zero.
    """
    BLOCKS: tl.constexpr = x.shape[0]
    block = tl.arange(0, BLOCKS)[:, None]
    if FORMAT == FLOAT32:
        at = block * 64 + tl.arange(0, 64)[None, :]
        tl.store(row + at, x.to(tl.int32, bitcast=True), mask=at < D)
    else:
        pairs = pack_pairs(x)
        pair = block * 32 + tl.arange(0, 32)[None, :]
        if FORMAT == BFLOAT16:
            tl.store(row + pair, pairs, mask=pair < D // 2)
        else:
            tl.static_assert(FORMAT == FP8)
            at = block * 64 + tl.arange(0, 64)[None, :]
            plain = tl.where(at < PLAIN, x, 0.0)
            byte, inverse = e4m3_scale(tl.max(tl.abs(plain), 1))
            codes = pack_bytes(e4m3_encode(plain * inverse[:, None]))
            word = block * 16 + tl.arange(0, 16)[None, :]
            tl.store(row + word, codes, mask=word < PLAIN // 4)
            rope = (pair >= PLAIN // 2) & (pair < D // 2)
            tl.store(row + pair - PLAIN // 4, pairs, mask=rope)
            byte = tl.where(tl.arange(0, BLOCKS) * 64 < PLAIN, byte, 0)
            scales = pack_bytes(byte[None, :])
            word = PLAIN // 4 + (D - PLAIN) // 2 + tl.arange(0, BLOCKS // 4)[None, :]
            tl.store(row + word, scales, mask=word < WORDS)


@triton.jit
def e2m1_encode(x):
    """float32 to e2m1 codes as int32: nearest, ties to even."""
    a = tl.abs(x)
    code = (a > 0.25).to(tl.int32) + (a >= 0.75).to(tl.int32) + (a > 1.25).to(tl.int32)
    code += (a >= 1.75).to(tl.int32) + (a > 2.5).to(tl.int32) + (a >= 3.5).to(tl.int32)
    code += (a > 5.0).to(tl.int32)
    return code | ((x.to(tl.int32, bitcast=True) >> 28) & 8)


@triton.jit
def e2m1_scale(largest):
    """The UE8M0 byte (int32) and the inverse of 2^ceil(log2(max(largest, 6 * 2^-126) / 6)).

    6 is 1.5 * 2^2, so a mantissa above 1.5 takes the next power.
    """
    bits = tl.maximum(largest, 7.052966104933725e-38).to(tl.int32, bitcast=True)
    byte = (bits >> 23) - 2 + ((bits & 0x7FFFFF) > 0x400000).to(tl.int32)
    return byte, ((254 - byte) << 23).to(tl.float32, bitcast=True)


@triton.jit
def store_key_row(row, x, WIDTH: tl.constexpr, FORMAT: tl.constexpr):
    """Write one indexer key, float32 [1, WIDTH], at the int32 pointer `row`."""
    if FORMAT == FLOAT32:
        at = tl.arange(0, WIDTH)[None, :]
        tl.store(row + at, x.to(tl.int32, bitcast=True))
    elif FORMAT == BFLOAT16:
        at = tl.arange(0, WIDTH // 2)[None, :]
        tl.store(row + at, pack_pairs(x))
    elif FORMAT == FP8:
        byte, inverse = e4m3_scale(tl.max(tl.abs(x), 1))
        at = tl.arange(0, WIDTH // 4)[None, :]
        tl.store(row + at, pack_bytes(e4m3_encode(x * inverse[:, None])))
        one = WIDTH // 4 + tl.arange(0, 1)
        tl.store(row + one, ue8m0_decode(byte).to(tl.int32, bitcast=True))
    else:
        tl.static_assert(FORMAT == FP4)
        BLOCKS: tl.constexpr = WIDTH // 32
        blocks = tl.reshape(x, (BLOCKS, 32))
        byte, inverse = e2m1_scale(tl.max(tl.abs(blocks), 1))
        eight = tl.reshape(e2m1_encode(blocks * inverse[:, None]), (BLOCKS, 4, 8))
        words = tl.sum(eight << (tl.arange(0, 8)[None, None, :] * 4), 2)
        at = tl.arange(0, BLOCKS)[:, None] * 4 + tl.arange(0, 4)[None, :]
        tl.store(row + at, words)
        scales = tl.sum(byte << (tl.arange(0, BLOCKS) * 8), 0)  # up to four blocks: one word
        tl.store(row + WIDTH // 8, scales)


@triton.jit
def row_pointers(
    storage, table, first, end, stride, offset, last, ROWS: tl.constexpr, WORDS: tl.constexpr,
    ALIGN: tl.constexpr, N: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Pointers int32 [N] to the rows of a request from `first` on, those below `end`, and which of
    them exist. THREADS look for each: a load with as many elements as a program has threads is not
    done again for every layout that its value is used in."""
    index = first + tl.arange(0, N * THREADS) // THREADS
    place = index // ROWS
    block = tl.load(table + place, mask=(index < end) & (place <= last), other=-1).to(tl.int64)
    address = block * stride + offset + (index % ROWS) * WORDS
    address = tl.where(block >= 0, address, -1)
    if THREADS > 1:
        address = tl.max(tl.reshape(address, (N, THREADS)), 1)
    ok = address >= 0
    return storage + tl.multiple_of(tl.where(ok, address, 0), ALIGN), ok


def alignment(rows: Paged) -> int:
    """Words, at most 4, that every row's address is a multiple of."""
    return gcd(rows.stride, rows.offset, rows.pool.codec.words, 4)
