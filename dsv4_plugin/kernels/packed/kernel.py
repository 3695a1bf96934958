"""Triton: the products with FP8 weights, see `fp8`, and with int4 ones, which are here.

An int4 tile becomes values of the inputs' dtype in registers, by its bits. Sums are float32 and run
over the inputs in steps of DEPTH, whatever the tile: with mma.sync a row has the same sum in every
batch. On sm_90, sm_100 and AMD few and many rows are products of different instructions, which
may add in another order within a step.

Shapes: T rows, K inputs, N outputs; tiles of M rows and W outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_plugin.kernels.experts.product import straight
from dsv4_plugin.kernels.launch import pick
from dsv4_plugin.kernels.packed import FP8Matrix, Inputs, Int4Matrix, Matrix, fp8
from dsv4_plugin.kernels.packed.fp8 import (
    arranged,
    gated_product,
    grouped_product,
    products,
    round_inputs,
    round_rows,
)
from dsv4_plugin.kernels.programmatic import follow, kernel, prefetch

__all__ = [
    "arranged", "gated_product", "grouped_product", "product", "products", "round_inputs",
    "round_rows",
]  # fmt: skip

DEPTH = 128
"""Inputs of one step, whole blocks of a scale."""
FEW = 16
"""Up to this many rows of a weight, the smallest tile."""


@dataclass(frozen=True)
class Tile:
    """rows and columns of the result that a program computes; warps; stages of its loads."""

    rows: int
    columns: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """few, many: for few and many rows, see FEW."""

    few: Tile
    many: Tile


SMALL = Tile(16, 32, 4, 3)
TILES = {
    "any": Tiles(few=SMALL, many=Tile(64, 64, 8, 2)),  # guessed
    "consumer": Tiles(few=SMALL, many=SMALL),  # guessed: larger tiles of other codes spilled
}


@kernel(do_not_specialize=["rows", "out_stride"])
def int4_product(
    x,
    w,
    scale,
    out,
    rows,
    x_stride,
    out_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK: tl.constexpr,
    M: tl.constexpr,
    W: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Program (row tile, output tile). ROW: words from one output to the next; BLOCK: inputs that
    share a scale."""
    first = (tl.program_id(1) * W).to(tl.int64)
    count = tl.where(tl.program_id(0) == 0, tl.minimum(N - first, W), 0)
    prefetch(w + first * ROW, count, ROW, K // 8, W)
    prefetch(scale + first * (K // BLOCK), count, K // BLOCK, K // BLOCK, W)
    follow()
    t = (tl.program_id(0) * M + tl.arange(0, M)).to(tl.int64)
    n = tl.program_id(1) * W + tl.arange(0, W)
    real = t < rows
    inside = n < N
    start = x + tl.where(real, t, 0) * x_stride
    WHOLE: tl.constexpr = (N % W == 0) & (K % DEPTH == 0)
    total = tl.zeros((M, W), tl.float32)
    for k in range(0, K, DEPTH):
        at = k + tl.arange(0, DEPTH)
        part = tl.load(start[:, None] + at[None, :], mask=(at < K)[None, :], other=0.0)
        total = straight(total, part, w, scale, n, k, inside, K, ROW, BLOCK, DEPTH, WHOLE)
    used = real[:, None] & inside[None, :]
    tl.store(out + t[:, None] * out_stride + n[None, :], total, mask=used)


def product(x: Inputs, matrix: Matrix) -> Tensor:
    """x [T, K], any stride of T. An FP8 weight is arranged, see `fp8`."""
    if isinstance(matrix, FP8Matrix):
        return fp8.product(x, matrix)
    assert isinstance(matrix, Int4Matrix)
    assert isinstance(x, Tensor)
    n, k = matrix.shape
    assert x.shape[1] == k
    assert x.stride(1) == 1
    words = matrix.data.view(torch.int32)
    out = x.new_empty(len(x), n)
    tiles = pick(TILES)
    tile = tiles.few if len(x) <= FEW else tiles.many
    int4_product[(triton.cdiv(len(x), tile.rows), triton.cdiv(n, tile.columns))](
        x, words, matrix.scale, out, len(x), x.stride(0), n,
        N=n, K=k, ROW=words.stride(0), BLOCK=matrix.block, M=tile.rows, W=tile.columns,
        DEPTH=DEPTH, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out
