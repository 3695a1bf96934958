"""Two launches: `mix_part` lets the output join the streams and multiplies a chunk of columns of
each by fn, every chunk's sums apart; `mix_end` adds them up in one order for all, makes the next
`Spread` for several tokens at a time (Sinkhorn), and collapses the streams of each.

The product is float32 in effect: bfloat16 streams times three bfloat16 parts of each weight, into
which a program splits its columns of fn once. A token's bits depend neither on the number of tokens
nor on which program takes it, because the chunks are the same for all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_plugin.kernels.launch import pick, require
from dsv4_plugin.kernels.packed import ROUNDED, Both
from dsv4_plugin.kernels.packed.fp8 import PLAIN, room, store_rounded_row
from dsv4_plugin.kernels.pin import pin, takes_ptx
from dsv4_plugin.kernels.programmatic import follow, kernel, prefetch
from dsv4_plugin.kernels.streams import Mixer, Spread

TILE = 16
"""Tokens that are multiplied together."""
WIDTH = 32
"""Columns of the partial sums: N outputs, padding, and last the sum of squares."""
SHARES = 8
"""Of the chunks; each is added up in order, then the shares."""
COLUMNS = 1024
"""That a program of `join` takes."""


@dataclass(frozen=True)
class Launch:
    """How streams are dealt out to programs.

    block: columns of every stream in a chunk; group: tokens whose `Spread` is made together. The
    order of sums follows from these. few: of up to so many tokens, a program takes one tile, and
    asks for it and its weights at once; of more, it takes one of `parts` shares, its next
    tiles on their way into `stages` buffers. slab: most tokens whose partial sums are kept at a
    time, 128 bytes for each and chunk.
    """

    block: int
    few: int
    parts: int
    stages: int
    group: int
    slab: int
    warps: int
    end_warps: int


LAUNCHES = {
    # measured: H200, Flash, 1 / 64 / 4,096 tokens: 11 / 12 / 227 us (one launch: 55 / 72 / 657);
    # blocks of 32 columns: 10 / 12 / 282; slabs of 1,024 tokens: 254; 16 warps at the end: 2 more
    "hopper": Launch(64, few=64, parts=4, stages=3, group=8, slab=4096, warps=4, end_warps=8),
    # compiled: no spills; guessed: as on Hopper
    "any": Launch(64, few=64, parts=4, stages=3, group=8, slab=4096, warps=4, end_warps=8),
}


@triton.jit
def _tile(begin, end, M: tl.constexpr):
    """M tokens from begin on, int64, and which there are; begin's number is that of the others."""
    t = begin + tl.arange(0, M)
    return tl.where(t < end, t, begin).to(tl.int64), t < end


@triton.jit
def _joined(asked, k: tl.constexpr, R: tl.constexpr):
    """Stream k of the tokens `asked` for after the output has joined, float32."""
    FIRST: tl.constexpr = R + 1 + k * (R + 1)
    value = asked[FIRST][:, None] * asked[R].to(tl.float32)
    for j in tl.static_range(R):
        share = asked[FIRST + 1 + j][:, None]
        value = tl.fma(share, asked[j].to(tl.float32), value)  # not left to the compiler
    return value


@triton.jit
def _asked(
    out, h, post, mixing, t, real, d, D: tl.constexpr, R: tl.constexpr, SPREAD: tl.constexpr
):
    """Columns d of tokens t [M]: R streams and, if SPREAD, the output and by what they join: for
    each stream the output's weight [M] and those of the streams."""
    inside = real[:, None] & (d < D)[None, :]
    at = (t * R * D)[:, None] + d[None, :]
    asked: tl.tuple = ()
    for k in tl.static_range(R):
        asked += (tl.load(h + at + k * D, mask=inside, other=0.0),)
    if SPREAD:
        at = (t * D)[:, None] + d[None, :]
        asked += (tl.load(out + at, mask=inside, other=0.0),)
        for k in tl.static_range(R):
            tk = t * R + k
            asked += (tl.load(post + tk),)
            for j in tl.static_range(R):
                asked += (tl.load(mixing + tk * R + j),)
    return asked


@triton.jit
def _weights(fn, d, D: tl.constexpr, R: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr):
    """fn's columns d of each stream, [len(d), WIDTH]."""
    n = tl.arange(0, WIDTH)
    at = n[None, :] * (R * D) + d[:, None]
    weights: tl.tuple = ()
    for k in tl.static_range(R):
        inside = (n < N)[None, :] & (d < D)[:, None]
        weights += (tl.load(fn + at + k * D, mask=inside, other=0.0),)
    return weights


@triton.jit
def _split(w, KIND: tl.constexpr):
    """Values of KIND that add up to w, the least first."""
    if KIND == tl.float32:  # noqa: SIM300
        return (w,)
    else:  # noqa: RET505  (Triton 3.6 compiles what follows such a return)
        high = w.to(KIND)
        w -= high.to(tl.float32)
        middle = w.to(KIND)
        return (w - middle.to(tl.float32)).to(KIND), middle, high


@triton.jit
def _multiply(
    asked, weights, h_out, partial, t, real, d,
    D: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    """A chunk's sums of tokens t [M], stored at partial [M]; the new streams into h_out."""
    n = tl.arange(0, WIDTH)
    total = tl.zeros((t.shape[0], WIDTH), tl.float32)
    squares = tl.zeros((t.shape[0],), tl.float32)
    for k in tl.static_range(R):
        x = asked[k]
        if SPREAD:
            x = pin(_joined(asked, k, R).to(x.dtype))
            at = ((t * R + k) * D)[:, None] + d[None, :]
            tl.store(h_out + at, x, mask=real[:, None] & (d < D)[None, :])
        wide = x.to(tl.float32)
        squares += tl.sum(wide * wide, 1)
        for part in tl.static_range(len(weights[k])):
            total = tl.dot(x, weights[k][part], total, input_precision="ieee")
    total = tl.where((n == WIDTH - 1)[None, :], squares[:, None], total)
    tl.store(partial[:, None] + n[None, :], total, mask=real[:, None])


@kernel(do_not_specialize=["first", "end", "rows", "chunks"])
def mix_part(
    out, h, post, mixing, fn, h_out, partial, first, end, rows, chunks,
    D: tl.constexpr, R: tl.constexpr, N: tl.constexpr, SPREAD: tl.constexpr, M: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (chunk, share of `rows` of the tokens first .. end - 1). partial float32 [tokens,
    chunks, WIDTH]. STAGES 0: a share is one tile."""
    chunk = tl.program_id(0)
    count = tl.where(tl.program_id(1) == 0, N * R, 0)
    prefetch(fn + chunk * BLOCK, count, D, tl.minimum(BLOCK, D - chunk * BLOCK), WIDTH * R)
    follow()
    d = chunk * BLOCK + tl.arange(0, BLOCK)
    begin = first + tl.program_id(1) * rows
    stop = tl.minimum(begin + rows, end)
    partial += chunk * WIDTH
    if STAGES == 0:
        t, real = _tile(begin, stop, M)
        asked = _asked(out, h, post, mixing, t, real, d, D, R, SPREAD)
    whole = _weights(fn, d, D, R, N, WIDTH)
    tl.debug_barrier()  # all is asked for before the first of it is used
    weights: tl.tuple = ()
    for k in tl.static_range(R):
        # Pinned, or what loads it also waits for it, and brings it into shared memory.
        weights += (_split(pin(whole[k]), h.dtype.element_ty),)
    if STAGES == 0:
        to = partial + (t - first) * chunks * WIDTH
        _multiply(asked, weights, h_out, to, t, real, d, D, R, WIDTH, SPREAD)
    else:
        for tile in tl.range(0, tl.cdiv(stop - begin, M), num_stages=STAGES):
            t, real = _tile(begin + tile * M, stop, M)
            asked = _asked(out, h, post, mixing, t, real, d, D, R, SPREAD)
            to = partial + (t - first) * chunks * WIDTH
            _multiply(asked, weights, h_out, to, t, real, d, D, R, WIDTH, SPREAD)


@triton.jit
def _asked_sums(
    partial, base, scale, chunks, n,
    SHARES: tl.constexpr, PER: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """For `_outputs` n [O] of the mixing product at partial [G]: the sums of each share's first
    chunk, second and so on, of squares after those of outputs; then scale and base."""
    chunk = (tl.arange(0, SHARES) * PER)[None, :, None]
    rows = partial[:, None, None] + chunk * WIDTH
    asked: tl.tuple = ()
    for i in tl.static_range(PER):
        at = rows + i * WIDTH
        inside = chunk + i < chunks
        asked += (tl.load(at + n[None, None, :], mask=inside, other=0.0),)
        squares = WIDTH - 1 + tl.arange(0, 1)
        asked += (tl.load(at + squares[None, None, :], mask=inside, other=0.0),)
    asked += (tl.load(scale + n), tl.load(base + n))
    return asked


@triton.jit
def _outputs(asked, eps, SIZE: tl.constexpr, PER: tl.constexpr):
    """Outputs [G, O] of the mixing product of SIZE values each: summed up over the chunks of a
    share in order, then over the shares, normed, scaled."""
    total, squares = asked[0], asked[1]
    for i in tl.static_range(1, PER):
        total += asked[2 * i]
        squares += asked[2 * i + 1]
    m = tl.sum(total, 1) * tl.rsqrt(tl.sum(squares, 1) / SIZE + eps)
    return m * asked[2 * PER] + asked[2 * PER + 1]


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _over(x, sums):
    """x / sums, both from 2^-126 to 2^126. On NVIDIA's chips x times MUFU's 1 / sums, as Triton's
    division is there, but without the steps that scale what is larger or smaller."""
    if takes_ptx():
        x, sums = tl.broadcast(x, sums)
        return tl.inline_asm_elementwise(
            "div.approx.ftz.f32 $0, $1, $2;", "=r,r,r", [x, sums], tl.float32, True, 1
        )
    else:  # noqa: RET505  (Triton 3.6 compiles what follows such a return)
        return x / sums


@triton.jit
def _sinkhorn(m, iters, eps, R: tl.constexpr):
    """m [G, R * R] -> [G, source, target], rows and columns of sum one."""
    c = tl.reshape(m, (m.shape[0], R, R))
    c = tl.exp(c - tl.max(c, 2)[:, :, None])
    c = c / tl.sum(c, 2)[:, :, None] + eps
    c = c / (tl.sum(c, 1) + eps)[:, None, :]
    for _ in range(1, iters):
        c = _over(c, (tl.sum(c, 2) + eps)[:, :, None])
        c = _over(c, (tl.sum(c, 1) + eps)[:, None, :])
    return c


@triton.jit
def _make_spreads(
    partial, base, scale, post_out, mixing_out, t, real, chunks, iters, eps, norm_eps,
    D: tl.constexpr, R: tl.constexpr, SHARES: tl.constexpr, PER: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Of tokens t [G], whose sums are at partial [G]."""
    r = tl.arange(0, R)
    n = 2 * R + tl.arange(0, R * R)
    of_post = _asked_sums(partial, base, scale, chunks, R + r, SHARES, PER, WIDTH)
    of_mixing = _asked_sums(partial, base, scale, chunks, n, SHARES, PER, WIDTH)
    # There always are chunks. The branch keeps loads before it: without one, the compiler moves
    # some of them to where they are used, behind a wait for others.
    if chunks > 0:
        post = _outputs(of_post, norm_eps, R * D, PER)
        tl.store(post_out + t[:, None] * R + r[None, :], 2.0 * _sigmoid(post), mask=real[:, None])
        mixing = _outputs(of_mixing, norm_eps, R * D, PER)
        at = (t * (R * R))[:, None, None] + r[None, None, :] * R + r[None, :, None]
        tl.store(mixing_out + at, _sinkhorn(mixing, iters, eps, R), mask=real[:, None, None])


@triton.jit
def _collapse(
    h, partial, base, scale, norm, x_out, rounded, rounded_scale, t, chunks, eps, norm_eps,
    D: tl.constexpr, R: tl.constexpr, NORM: tl.constexpr, SHARES: tl.constexpr, PER: tl.constexpr,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """The next sublayer's input of token t [1]: its streams by their weights, normed; rounded too,
    in another FORM than PLAIN."""
    r = tl.arange(0, R)
    d = tl.arange(0, COLUMNS)
    # All that it needs is asked for at once.
    asked = _asked_sums(partial, base, scale, chunks, r, SHARES, PER, WIDTH)
    streams: tl.tuple = ()
    for k in tl.static_range(R):
        streams += (tl.load(h + (t * R + k) * D + d, mask=d < D, other=0.0),)
    if NORM:
        by = tl.load(norm + d, mask=d < D, other=0.0)
    pre = tl.reshape(_sigmoid(_outputs(asked, norm_eps, R * D, PER)) + eps, (R,))
    y = tl.zeros((COLUMNS,), tl.float32)
    for k in tl.static_range(R):
        y += tl.sum(tl.where(r == k, pre, 0.0), 0) * streams[k].to(tl.float32)
    y = y.to(h.dtype.element_ty).to(tl.float32)
    if NORM:
        y = y * tl.rsqrt(tl.sum(y * y, 0) / D + norm_eps)
        y = y * by
    tl.store(x_out + t * D + d, y, mask=d < D)
    if FORM != PLAIN:
        y = y.to(h.dtype.element_ty).to(tl.float32)
        store_rounded_row(y, rounded, rounded_scale, tl.sum(t, 0), D, COLUMNS, BLOCK, FORM)


@kernel(do_not_specialize=["first", "end", "chunks"])
def mix_end(
    h, partial, base, scale, norm, x_out, rounded, rounded_scale, post_out, mixing_out, first, end,
    chunks, iters, eps, norm_eps,
    D: tl.constexpr, R: tl.constexpr, NORM: tl.constexpr, SPREADS: tl.constexpr,
    SHARES: tl.constexpr, PER: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Of tokens first .. end - 1, whose streams h and sums `partial` are complete: if SPREADS, the
    first programs make the `Spread` of GROUP tokens each; then one a token makes x."""
    follow()
    makers = tl.cdiv(end - first, GROUP) if SPREADS else 0
    program = tl.program_id(0)
    if program < makers:
        t, real = _tile(first + program * GROUP, end, GROUP)
        _make_spreads(
            partial + (t - first) * chunks * WIDTH, base, scale, post_out, mixing_out, t, real,
            chunks, iters, eps, norm_eps, D, R, SHARES, PER, WIDTH,
        )  # fmt: skip
    else:
        token = first + program - makers + tl.arange(0, 1).to(tl.int64)
        _collapse(
            h, partial + (token - first) * chunks * WIDTH, base, scale, norm, x_out, rounded,
            rounded_scale, token, chunks, eps, norm_eps, D, R, NORM, SHARES, PER, WIDTH, COLUMNS,
            BLOCK, FORM,
        )  # fmt: skip


@kernel()
def join(out, h, post, mixing, h_out, D: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr):
    """Program (token, BLOCK columns): the join of `mix_part` alone."""
    follow()
    t, real = _tile(tl.program_id(0), tl.num_programs(0), 1)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (d < D)[None, :]
    asked = _asked(out, h, post, mixing, t, real, d, D, R, True)
    for k in tl.static_range(R):
        x = _joined(asked, k, R)
        tl.store(h_out + ((t * R + k) * D)[:, None] + d[None, :], x, mask=inside)


def streams(
    out: Tensor | None, h: Tensor, by: Spread | None, mixer: Mixer
) -> tuple[Tensor, Tensor | Both, Spread | None]:
    tokens, r, d = h.shape
    require(out, h, mixer.fn, mixer.base, mixer.scale, mixer.weight)
    assert mixer.fn.dtype == torch.float32
    spreading, plain, head = by is not None, mixer.weight is None, len(mixer.fn) == r
    launch = pick(LAUNCHES)
    chunks, slab = triton.cdiv(d, launch.block), min(tokens, launch.slab)
    partial = h.new_empty((slab, chunks, WIDTH), dtype=torch.float32)
    x = h.new_empty((tokens, d))
    given: Tensor | Both = x
    to, to_scale, form, columns = x, x, PLAIN.value, triton.next_power_of_2(d)
    if mixer.rounds:
        rounded, to, to_scale, form = room(tokens, d, x.dtype, x.device)
        given = Both(x, rounded)
    h_out = torch.empty_like(h) if spreading else h
    post = partial if head else h.new_empty((tokens, r), dtype=torch.float32)
    mixing = partial if head else h.new_empty((tokens, r, r), dtype=torch.float32)
    few = tokens <= launch.few
    for first in range(0, tokens, launch.slab):
        end = min(first + launch.slab, tokens)
        rows = TILE if few else TILE * triton.cdiv(triton.cdiv(end - first, launch.parts), TILE)
        mix_part[(chunks, triton.cdiv(end - first, rows))](
            out if spreading else h, h, by.post if by else partial, by.mixing if by else partial,
            mixer.fn, h_out, partial, first, end, rows, chunks,
            D=d, R=r, N=len(mixer.fn), SPREAD=spreading, M=TILE, BLOCK=launch.block, WIDTH=WIDTH,
            STAGES=0 if few else launch.stages, num_warps=launch.warps,
        )  # fmt: skip
        makers = 0 if head else triton.cdiv(end - first, launch.group)
        mix_end[(makers + end - first,)](
            h_out, partial, mixer.base, mixer.scale, mixer.base if plain else mixer.weight,
            x, to, to_scale, post, mixing, first, end, chunks, mixer.iters, mixer.eps,
            mixer.norm_eps,
            D=d, R=r, NORM=not plain, SPREADS=not head, WIDTH=WIDTH, SHARES=SHARES,
            PER=triton.cdiv(chunks, SHARES), COLUMNS=columns, GROUP=launch.group,
            BLOCK=min(ROUNDED, columns), FORM=form, num_warps=launch.end_warps,
        )  # fmt: skip
    return h_out, given, None if head else Spread(post, mixing)


def spread(out: Tensor, h: Tensor, by: Spread) -> Tensor:
    tokens, r, d = h.shape
    require(out, h, by.post, by.mixing)
    h_out = torch.empty_like(h)
    join[(tokens, triton.cdiv(d, COLUMNS))](
        out, h, by.post, by.mixing, h_out, D=d, R=r, BLOCK=COLUMNS, num_warps=4
    )
    return h_out
