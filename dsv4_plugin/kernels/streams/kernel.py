"""Two launches: `mix` spreads and multiplies, CHUNK columns of every stream at a time; `finish`
adds the chunks up in order, so that a token's sums do not depend on its batch.

The product is float32 in effect: bfloat16 streams times three bfloat16 parts of each weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_plugin.kernels.streams import Mixer, Spread

CHUNK = 256
"""Columns of each stream that one program of `mix` takes."""
FEW = 128
"""Up to this many tokens, tiles of 16; above, of 32."""
WIDTH = 32
"""Columns of the partial products: N outputs, padding, and last the sum of squares."""


@triton.jit(do_not_specialize=["tokens", "chunks"])
def mix(
    out,
    h,
    post,
    mixing,
    fn,
    h_out,
    partial,
    tokens,
    D,
    chunks,
    R: tl.constexpr,
    N: tl.constexpr,
    SPREAD: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    chunk = tl.program_id(1)
    real = t < tokens
    n = tl.arange(0, WIDTH)
    total = tl.zeros((TILE, WIDTH), tl.float32)
    squares = tl.zeros((TILE,), tl.float32)
    for start in range(0, CHUNK, BLOCK):
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


@triton.jit
def _outputs(partial, rms, base, scale, row, chunks, n, CHUNKS: tl.constexpr, WIDTH: tl.constexpr):
    """Outputs n of the mixing product: the sum over chunks, normed, scaled."""
    chunk = tl.arange(0, CHUNKS)
    at = (row * chunks + chunk[:, None]) * WIDTH + n[None, :]
    m = tl.sum(tl.load(partial + at, mask=(chunk < chunks)[:, None], other=0.0), 0)
    return m * rms * tl.load(scale + n) + tl.load(base + n)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit(do_not_specialize=["chunks"])
def finish(
    h,
    partial,
    base,
    scale,
    weight,
    x_out,
    post,
    mixing,
    D,
    chunks,
    iters,
    eps,
    norm_eps,
    R: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Program (t, 0): the sublayer's input. Program (t, 1): how its output will return."""
    t = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNKS)
    at = (t * chunks + chunk) * WIDTH + WIDTH - 1
    squares = tl.sum(tl.load(partial + at, mask=chunk < chunks, other=0.0), 0)
    rms = tl.rsqrt(squares / (R * D) + norm_eps)
    r = tl.arange(0, R)
    if tl.program_id(1) == 0:
        pre = _sigmoid(_outputs(partial, rms, base, scale, t, chunks, r, CHUNKS, WIDTH)) + eps
        d = tl.arange(0, COLUMNS)
        y = tl.zeros((COLUMNS,), tl.float32)
        for k in tl.static_range(R):
            stream = tl.load(h + (t * R + k) * D + d, mask=d < D, other=0.0).to(tl.float32)
            y += tl.sum(tl.where(r == k, pre, 0.0), 0) * stream
        y = y.to(h.dtype.element_ty).to(tl.float32)
        y = y * tl.rsqrt(tl.sum(y * y, 0) / D + norm_eps)
        y = y * tl.load(weight + d, mask=d < D, other=0.0)
        tl.store(x_out + t * D + d, y, mask=d < D)
    else:
        m = _outputs(partial, rms, base, scale, t, chunks, R + r, CHUNKS, WIDTH)
        tl.store(post + t * R + r, 2.0 * _sigmoid(m))
        n = tl.arange(0, R * R)
        m = _outputs(partial, rms, base, scale, t, chunks, 2 * R + n, CHUNKS, WIDTH)
        c = tl.reshape(m, (R, R))  # [source, target]
        c = tl.exp(c - tl.max(c, 1)[:, None])
        c = c / tl.sum(c, 1)[:, None] + eps
        c = c / (tl.sum(c, 0) + eps)[None, :]
        for _ in range(1, iters):
            c = c / (tl.sum(c, 1) + eps)[:, None]
            c = c / (tl.sum(c, 0) + eps)[None, :]
        tl.store(mixing + t * (R * R) + r[None, :] * R + r[:, None], c)


def streams(
    out: Tensor | None, h: Tensor, by: Spread | None, mixer: Mixer
) -> tuple[Tensor, Tensor, Spread | None]:
    tokens, r, d = h.shape
    chunks, head = triton.cdiv(d, CHUNK), len(mixer.fn) == r
    partial = h.new_empty((tokens, chunks, WIDTH), dtype=torch.float32)
    x = h.new_empty((tokens, d))
    spreading = out is not None and by is not None
    h_out = torch.empty_like(h) if spreading else h
    tile = 16 if tokens <= FEW else 32
    mix[(triton.cdiv(tokens, tile), chunks)](
        out if spreading else h, h, by.post if by else partial, by.mixing if by else partial,
        mixer.fn, h_out, partial, tokens, d, chunks,
        R=r, N=len(mixer.fn), SPREAD=spreading, TILE=tile, CHUNK=CHUNK, BLOCK=32, WIDTH=WIDTH,
        num_warps=4, num_stages=1,
    )  # fmt: skip
    post = partial if head else h.new_empty((tokens, r), dtype=torch.float32)
    mixing = partial if head else h.new_empty((tokens, r, r), dtype=torch.float32)
    finish[(tokens, 1 if head else 2)](
        h_out, partial, mixer.base, mixer.scale, mixer.weight, x, post, mixing,
        d, chunks, mixer.iters, mixer.eps, mixer.norm_eps,
        R=r, CHUNKS=triton.next_power_of_2(chunks), WIDTH=WIDTH,
        COLUMNS=triton.next_power_of_2(d), num_warps=8,
    )  # fmt: skip
    return h_out, x, None if head else Spread(post, mixing)
