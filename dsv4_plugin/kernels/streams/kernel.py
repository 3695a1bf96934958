"""One launch: programs spread and multiply, CHUNK columns of every stream at a time; the last one
of a tile of tokens adds the chunks up in order, so that a token's sums do not depend on its batch.

The product is float32 in effect: bfloat16 streams times three bfloat16 parts of each weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_plugin.kernels.arrival import counters, is_last
from dsv4_plugin.kernels.launch import require
from dsv4_plugin.kernels.streams import Mixer, Spread

CHUNK = 256
"""Columns of each stream that one program takes."""
FEW = 128
"""Up to this many tokens, products of 16; above, of 32."""
GROUP = 4
"""Tokens whose `Spread` is made at once."""
WIDTH = 32
"""Columns of the partial products: N outputs, padding, and last the sum of squares."""


@triton.jit
def _outputs(partial, rms, base, scale, t, chunks, n, CHUNKS: tl.constexpr, WIDTH: tl.constexpr):
    """Outputs n [O] of the mixing product of tokens t [G]: the sum over chunks, normed, scaled."""
    chunk = tl.arange(0, CHUNKS)[None, :, None]
    at = (t[:, None, None] * chunks + chunk) * WIDTH + n[None, None, :]
    parts = tl.load(partial + at, mask=chunk < chunks, other=0.0, cache_modifier=".cg")
    return tl.sum(parts, 1) * rms[:, None] * tl.load(scale + n) + tl.load(base + n)


@triton.jit
def _inverse_rms(partial, t, chunks, size, eps, CHUNKS: tl.constexpr, WIDTH: tl.constexpr):
    """Of the streams of tokens t [G], `size` values each."""
    chunk = tl.arange(0, CHUNKS)[None, :]
    at = (t[:, None] * chunks + chunk) * WIDTH + WIDTH - 1
    parts = tl.load(partial + at, mask=chunk < chunks, other=0.0, cache_modifier=".cg")
    return tl.rsqrt(tl.sum(parts, 1) / size + eps)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _collapse(
    h, norm, x_out, pre, t, D, eps, NORM: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr
):
    """The next sublayer's input of token t: its streams by their weights pre [R], normed."""
    r = tl.arange(0, R)
    d = tl.arange(0, COLUMNS)
    y = tl.zeros((COLUMNS,), tl.float32)
    for k in tl.static_range(R):
        at = (t * R + k) * D + d
        stream = tl.load(h + at, mask=d < D, other=0.0, cache_modifier=".cg").to(tl.float32)
        y += tl.sum(tl.where(r == k, pre, 0.0), 0) * stream
    y = y.to(h.dtype.element_ty).to(tl.float32)
    if NORM:
        y = y * tl.rsqrt(tl.sum(y * y, 0) / D + eps)
        y = y * tl.load(norm + d, mask=d < D, other=0.0)
    tl.store(x_out + t * D + d, y, mask=d < D)


@triton.jit
def _sinkhorn(m, iters, eps, R: tl.constexpr):
    """m [G, R * R] -> [G, source, target], rows and columns of sum one."""
    c = tl.reshape(m, (m.shape[0], R, R))
    c = tl.exp(c - tl.max(c, 2)[:, :, None])
    c = c / tl.sum(c, 2)[:, :, None] + eps
    c = c / (tl.sum(c, 1) + eps)[:, None, :]
    for _ in range(1, iters):
        c = c / (tl.sum(c, 2) + eps)[:, :, None]
        c = c / (tl.sum(c, 1) + eps)[:, None, :]
    return c


@triton.jit
def _finish(
    h,
    x_out,
    post_out,
    mixing_out,
    partial,
    base,
    scale,
    norm,
    first,
    end,
    D,
    chunks,
    iters,
    eps,
    norm_eps,
    NORM: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Tokens first .. end - 1, whose streams h and sums `partial` are complete."""
    g = tl.arange(0, GROUP)
    r = tl.arange(0, R)
    for begin in tl.range(first, end, GROUP, disable_licm=True):
        t = begin + g.to(tl.int64)
        some = t < end
        t = tl.where(some, t, begin)
        rms = _inverse_rms(partial, t, chunks, R * D, norm_eps, CHUNKS, WIDTH)
        if N > R:
            m = _outputs(partial, rms, base, scale, t, chunks, R + r, CHUNKS, WIDTH)
            at = t[:, None] * R + r[None, :]
            tl.store(post_out + at, 2.0 * _sigmoid(m), mask=some[:, None])
            n = 2 * R + tl.arange(0, R * R)
            m = _outputs(partial, rms, base, scale, t, chunks, n, CHUNKS, WIDTH)
            c = _sinkhorn(m, iters, eps, R)
            at = (t * (R * R))[:, None, None] + r[None, None, :] * R + r[None, :, None]
            tl.store(mixing_out + at, c, mask=some[:, None, None])
        pre = _outputs(partial, rms, base, scale, t, chunks, r, CHUNKS, WIDTH)
        pre = _sigmoid(pre) + eps
        for i in tl.range(0, tl.minimum(GROUP, end - begin), disable_licm=True):
            mine = tl.sum(tl.where((g == i)[:, None], pre, 0.0), 0)
            token = tl.sum(tl.where(g == i, t, 0), 0)
            _collapse(h, norm, x_out, mine, token, D, norm_eps, NORM, R, COLUMNS)


@triton.jit(do_not_specialize=["tokens", "chunks", "rows"])
def mix(
    out,
    h,
    post,
    mixing,
    fn,
    base,
    scale,
    norm,
    h_out,
    x_out,
    post_out,
    mixing_out,
    partial,
    counter,
    tokens,
    rows,
    D,
    chunks,
    iters,
    eps,
    norm_eps,
    NORM: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    SPREAD: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Program (tile of `rows` tokens, chunk)."""
    first = tl.program_id(0) * rows
    end = tl.minimum(first + rows, tokens)
    t = first.to(tl.int64) + tl.arange(0, TILE)
    chunk = tl.program_id(1)
    real = t < end
    n = tl.arange(0, WIDTH)
    total = tl.zeros((TILE, WIDTH), tl.float32)
    squares = tl.zeros((TILE,), tl.float32)
    for start in tl.range(0, CHUNK, BLOCK, disable_licm=True):
        d = chunk * CHUNK + start + tl.arange(0, BLOCK)
        inside = real[:, None] & (d < D)[None, :]
        if SPREAD:
            given = tl.load(out + t[:, None] * D + d[None, :], mask=inside, other=0.0)
            given = given.to(tl.float32)
        for k in range(R):
            at = (t[:, None] * R + k) * D + d[None, :]
            if SPREAD:
                weight = tl.load(post + t * R + k, mask=real, other=0.0)
                value = weight[:, None] * given
                for j in tl.static_range(R):
                    source = (t[:, None] * R + j) * D + d[None, :]
                    stream = tl.load(h + source, mask=inside, other=0.0).to(tl.float32)
                    share = tl.load(mixing + (t * R + k) * R + j, mask=real, other=0.0)
                    value += share[:, None] * stream
                x = value.to(h.dtype.element_ty)
                tl.store(h_out + at, x, mask=inside)
            else:
                x = tl.load(h + at, mask=inside, other=0.0)
            wide = x.to(tl.float32)
            squares += tl.sum(wide * wide, 1)
            place = n[None, :] * (R * D) + k * D + d[:, None]
            used = (n < N)[None, :] & (d < D)[:, None]
            w = tl.load(fn + place, mask=used, other=0.0)
            if h.dtype.element_ty == tl.bfloat16:
                high = w.to(tl.bfloat16)
                w = w - high.to(tl.float32)
                middle = w.to(tl.bfloat16)
                low = (w - middle.to(tl.float32)).to(tl.bfloat16)
                total = tl.dot(x, low, total)
                total = tl.dot(x, middle, total)
                total = tl.dot(x, high, total)
            else:
                total = tl.dot(x, w, total, input_precision="ieee")
    total = tl.where((n == WIDTH - 1)[None, :], squares[:, None], total)
    at = (t[:, None] * chunks + chunk) * WIDTH + n[None, :]
    tl.store(partial + at, total, mask=real[:, None])
    if is_last(counter + tl.program_id(0), chunks):
        _finish(
            h_out, x_out, post_out, mixing_out, partial, base, scale, norm, first, end, D,
            chunks, iters, eps, norm_eps, NORM, R, N, WIDTH, CHUNKS, COLUMNS, GROUP,
        )  # fmt: skip


def streams(
    out: Tensor | None, h: Tensor, by: Spread | None, mixer: Mixer
) -> tuple[Tensor, Tensor, Spread | None]:
    tokens, r, d = h.shape
    require(out, h, mixer.fn, mixer.base, mixer.scale, mixer.weight)
    assert mixer.fn.dtype == torch.float32
    if by is not None:
        require(by.post, by.mixing)
    chunks, head = triton.cdiv(d, CHUNK), len(mixer.fn) == r
    partial = h.new_empty((tokens, chunks, WIDTH), dtype=torch.float32)
    x = h.new_empty((tokens, d))
    spreading, plain = out is not None and by is not None, mixer.weight is None
    h_out = torch.empty_like(h) if spreading else h
    post = partial if head else h.new_empty((tokens, r), dtype=torch.float32)
    mixing = partial if head else h.new_empty((tokens, r, r), dtype=torch.float32)
    rows = _rows(tokens)
    tiles = triton.cdiv(tokens, rows)
    mix[(tiles, chunks)](
        out if spreading else h, h, by.post if by else partial, by.mixing if by else partial,
        mixer.fn, mixer.base, mixer.scale, mixer.base if plain else mixer.weight,
        h_out, x, post, mixing,
        partial, counters("streams", h.device, tiles),
        tokens, rows, d, chunks, mixer.iters, mixer.eps, mixer.norm_eps,
        NORM=not plain, R=r, N=len(mixer.fn), SPREAD=spreading, TILE=16 if tokens <= FEW else 32,
        CHUNK=CHUNK, BLOCK=32, WIDTH=WIDTH, CHUNKS=triton.next_power_of_2(chunks),
        COLUMNS=triton.next_power_of_2(d), GROUP=GROUP, num_warps=4, num_stages=1,
    )  # fmt: skip
    return h_out, x, None if head else Spread(post, mixing)


def _rows(tokens: int) -> int:
    """Tokens of a program: few, where they are few, so that many programs finish."""
    if tokens > FEW:
        return 32
    return 4 if tokens <= FEW // 8 else 8
