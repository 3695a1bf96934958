"""Triton: float32 products of bfloat16 inputs on tensor cores.

A float32 weight is the sum of three bfloat16 values, exactly, and often of one: it is stored as so
many parts. Each product of a part and an input is exact, and all of them are added in float32, the
least parts of a step first: what is lost is what float32 sums lose.

Sums are made in pieces of PIECE inputs, which are added up in order: of few rows each piece is a
program's, and the last to arrive adds them; of more, a program goes through all. The weight is the
left operand, [W outputs, M rows], so that few and many rows take the same steps of the same
instructions, and have the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_plugin.kernels.arrival import counters, in_order, is_last
from dsv4_plugin.kernels.launch import pick, require
from dsv4_plugin.kernels.pin import pin
from dsv4_plugin.kernels.programmatic import follow, kernel, prefetch

PARTS = 3
"""bfloat16 values that add up to any float32 one (24 = 3 * 8 bits)."""


@dataclass(frozen=True)
class Launch:
    """Up to `split` rows each piece of `piece` inputs is a program's, in tiles of `few` rows; of
    more rows tiles have `many`. columns: outputs of a tile; depth: inputs of a step, all of one
    part and then of the next; warps; stages of loads. taken: instead of torch's float32 product.
    together: so many steps are one of the loop, with more rows."""

    few: int
    many: int
    columns: int
    depth: int
    piece: int
    split: int
    warps: int
    stages: int
    taken: bool = True
    together: int = 1


LAUNCHES = {
    # guessed: CSA's compressors in one wave, 5 programs of 39 KiB on each SM (3 at Pro's width,
    # whose pieces take 160 registers to add). compiled: no spills; two steps together take 3.3
    # instructions for 2,048 multiply-adds and 96 KiB, one 5.5
    "hopper": Launch(16, 64, 64, depth=32, piece=256, split=128, warps=4, stages=3, together=2),
    # guessed; compiled: no spills, 96 KiB at most
    "any": Launch(16, 64, columns=64, depth=64, piece=512, split=128, warps=4, stages=3),
    # guessed: torch's product takes float32 on matrix cores there
    "cdna": Launch(16, 64, 64, 64, piece=512, split=128, warps=4, stages=2, taken=False),
}


def parts(weight: Tensor) -> Tensor:
    """float32 [N, K] -> bfloat16 [P, N, K], as few as add up to it, the least first."""
    found: list[Tensor] = []
    rest = weight
    while len(found) < PARTS and (not found or bool(rest.any())):
        found.append(rest.to(torch.bfloat16))
        rest = rest - found[-1].float()
    return torch.stack(found[::-1])


@triton.jit
def _step(
    total, x, w, k, inside, K: tl.constexpr, PARTS: tl.constexpr, SIZE: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """total [W, M] plus inputs k .. k + DEPTH - 1 of the rows at x [M] times those of the outputs
    at w [W], whose parts are SIZE values apart."""
    at = k + tl.arange(0, DEPTH)
    there = at < K
    part = tl.load(x[None, :] + at[:, None], mask=there[:, None], other=0.0)
    used = inside[:, None] & there[None, :]
    if part.dtype == tl.float32:
        weight = tl.zeros((w.shape[0], DEPTH), tl.float32)
        for p in tl.static_range(PARTS):
            weight += tl.load(w[:, None] + p * SIZE + at[None, :], mask=used, other=0.0)
        total = tl.dot(weight, part, total, input_precision="ieee")
    else:
        for p in tl.static_range(PARTS):
            weight = tl.load(w[:, None] + p * SIZE + at[None, :], mask=used, other=0.0)
            total = tl.dot(weight, part, total)
    return pin(total)  # waited for here: see `_turned` of the experts' product


@kernel(do_not_specialize=["rows"])
def float32_product(
    x, w, out, partial, counter, rows,
    N: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, M: tl.constexpr, W: tl.constexpr,
    DEPTH: tl.constexpr, TOGETHER: tl.constexpr, PIECE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Program (output tile, row tile, piece): out float32 [T, N] = x [T, K] times w [PARTS, N, K].
    If SPLIT, partial float32 [pieces, T, N] and a counter for each tile."""
    count = tl.where(tl.program_id(1) == 0, tl.minimum(N - tl.program_id(0) * W, W), 0)
    k = tl.program_id(2) * PIECE
    for p in tl.static_range(PARTS):
        part = w + (p * N + tl.program_id(0) * W) * K + k
        prefetch(part, count, K, tl.minimum(PIECE, K - k) if SPLIT else K, W)
    follow()
    t = (tl.program_id(1) * M + tl.arange(0, M)).to(tl.int64)
    n = tl.program_id(0) * W + tl.arange(0, W)
    real = t < rows
    inside = n < N
    start = x + tl.where(real, t, 0) * K
    w += n * K
    STRIDE: tl.constexpr = DEPTH * TOGETHER
    STEPS: tl.constexpr = PIECE // STRIDE
    PIECES: tl.constexpr = (K + PIECE - 1) // PIECE
    first = 0
    end = (K + STRIDE - 1) // STRIDE
    if SPLIT:
        first = tl.program_id(2) * STEPS
        end = tl.minimum(first + STEPS, end)
    total = tl.zeros((W, M), tl.float32)
    before = total
    for i in tl.range(first, end):
        if (PIECES > 1) & (not SPLIT):
            before = tl.where(i % STEPS == 0, before + total, before)
            total *= tl.where(i % STEPS == 0, 0.0, 1.0)  # a choice of 0 fails to compile, sm_100
        for j in tl.static_range(TOGETHER):
            at = (i * TOGETHER + j) * DEPTH
            total = _step(total, start, w, at, inside, K, PARTS, N * K, DEPTH)
    total = tl.trans(before + total)
    to = t[:, None] * N + n[None, :]
    mask = real[:, None] & inside[None, :]
    if SPLIT:
        step = rows.to(tl.int64) * N
        tl.store(partial + tl.program_id(2) * step + to, total, mask=mask)
        if not is_last(counter + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), PIECES):
            return
        total = in_order(partial + to, step, PIECES, mask)
    tl.store(out + to, total, mask=mask)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, K] in the model's dtype, weight bfloat16 [P, N, K], see `parts` -> float32 [T, N]."""
    (rows, k), (count, n, _), launch = x.shape, weight.shape, pick(LAUNCHES)
    require(x, weight)
    assert launch.piece % (launch.depth * launch.together) == 0, launch
    out = torch.empty((rows, n), dtype=torch.float32, device=x.device)
    pieces = triton.cdiv(k, launch.piece)
    few = rows <= launch.split
    split, m = few and pieces > 1, launch.few if few else launch.many
    tiles = triton.cdiv(n, launch.columns), triton.cdiv(rows, m)
    partial = counter = out
    if split:
        partial = out.new_empty(pieces, rows, n)
        counter = counters("linear", x.device, tiles[0] * tiles[1])
    float32_product[(*tiles, pieces if split else 1)](
        x, weight, out, partial, counter, rows,
        N=n, K=k, PARTS=count, M=m, W=launch.columns, DEPTH=launch.depth,
        TOGETHER=1 if few else launch.together, PIECE=launch.piece, SPLIT=split,
        num_warps=launch.warps,
        num_stages=launch.stages if x.dtype == torch.bfloat16 else 1,
    )  # fmt: skip
    return out
