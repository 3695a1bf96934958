"""One launch: program (t, 0) writes the window row of token t, the others take heads of q."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_plugin.cache.rows import RowPool
from dsv4_plugin.kernels.device import (
    inverse_rms,
    store_kv_row,
    sum_of_squares,
    tail_angles,
    turn,
)
from dsv4_plugin.kernels.launch import require
from dsv4_plugin.kernels.programmatic import follow, kernel

HEADS = 4
"""Heads of q per program."""


@kernel()
def norm_rope_write(
    q,
    kv,
    weight,
    cis,
    address,
    storage,
    out,
    eps,
    q_stride,
    kv_stride,
    H: tl.constexpr,
    D: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCKS: tl.constexpr,
    WORDS: tl.constexpr,
    FORMAT: tl.constexpr,
    HEADS: tl.constexpr,
):
    follow()
    t = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    PLAIN: tl.constexpr = D - ROPE
    at = tl.arange(0, BLOCKS)[:, None] * 64 + tl.arange(0, 64)[None, :]
    # Everything is asked for before the first of it is used: a load takes as long as many.
    angles = tail_angles(cis + t * ROPE, at, PLAIN, D)
    if part == 0:
        row = tl.load(address + t)
        w = tl.load(weight + at, mask=at < D, other=0.0)
        x = tl.load(kv + t * kv_stride + at, mask=at < D, other=0.0)
        kind: tl.constexpr = kv.dtype.element_ty
        rms = inverse_rms(tl.sum(sum_of_squares(x, 1), 0), D, eps)
        x = (x.to(tl.float32) * rms * w).to(kind).to(tl.float32)
        x = turn(x, angles, at, PLAIN, D).to(kind).to(tl.float32)
        if row >= 0:
            store_kv_row(storage + row, x, PLAIN, D, WORDS, FORMAT)
    else:
        first = (part - 1) * HEADS
        heads: tl.tuple = ()
        for i in tl.static_range(HEADS):
            used = (at < D) & (first + i < H)
            heads += (tl.load(q + t * q_stride + (first + i) * D + at, mask=used, other=0.0),)
        scales: tl.tuple = ()
        for i in tl.static_range(HEADS):
            z = heads[i].to(tl.float32)
            scales += (tl.rsqrt(tl.sum(tl.sum(z * z, 1), 0) / D + eps),)
        for i in tl.static_range(HEADS):
            z = turn(heads[i].to(tl.float32) * scales[i], angles, at, PLAIN, D)
            inside = (at < D) & (first + i < H)
            tl.store(out + (t * H + first + i) * D + at, z, mask=inside)


def qkv(
    q: Tensor,
    kv: Tensor,
    weight: Tensor,
    eps: float,
    cis: Tensor,
    address: Tensor,
    window: RowPool,
) -> Tensor:
    n, heads, d = q.shape
    assert q.stride()[1:] == (d, 1)
    assert kv.stride(1) == 1
    require(weight, cis, address)
    rope = cis.shape[1]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    norm_rope_write[(n, 1 + triton.cdiv(heads, HEADS))](
        q, kv, weight, cis, address, window.storage, out, eps, q.stride(0), kv.stride(0),
        H=heads, D=d, ROPE=rope, BLOCKS=blocks_of(d), WORDS=window.codec.words,
        FORMAT=int(window.codec.format), HEADS=HEADS, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def blocks_of(d: int) -> int:
    """Blocks of 64 dims, a power of two, enough for a row and for its scale words."""
    return max(8, 1 << (-(-d // 64) - 1).bit_length())
