"""Triton: products with weights as they are stored, decoded by their bits in registers.

A tile of a weight becomes values of the inputs' dtype, exactly: e2m1 and e4m3 codes are the leading
bits of bfloat16 numbers, so nothing is looked up and no fp8 type is used. Sums are float32 and run
over the inputs in steps of DEPTH, whatever the tile: a row has the same sum in every batch.

Shapes: T rows, K inputs, N outputs; tiles of M rows and W outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_plugin.config import FP8_BLOCK
from dsv4_plugin.kernels.bits import (
    e2m1_codes,
    e4m3_codes,
    e4m3_decode,
    int4_codes,
)
from dsv4_plugin.kernels.launch import pick
from dsv4_plugin.kernels.packed import (
    FP4Matrix,
    FP8Matrix,
    Inputs,
    Int4Matrix,
    Matrix,
    NVFP4Matrix,
    fp8,
)
from dsv4_plugin.kernels.packed.fp8 import (
    arranged,
    gated_product,
    grouped_product,
    products,
    round_inputs,
    round_rows,
)

__all__ = [
    "arranged", "gated_product", "grouped_product", "products", "round_inputs", "round_rows",
]  # fmt: skip

PLAIN = tl.constexpr(0)
FP8 = tl.constexpr(1)
MXFP4 = tl.constexpr(2)
NVFP4 = tl.constexpr(3)
INT4 = tl.constexpr(32)
"""How a weight is stored. PLAIN is [in, out], the others are [out, in]. From INT4 on: int4 with so
many inputs to a scale."""

DEPTH = 128
"""Inputs of one step: a block of FP8's scales."""
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
    """few, many: for few and many rows of a weight, see FEW."""

    few: Tile
    many: Tile


SMALL = Tile(16, 32, 4, 3)
TILES = {
    "any": Tiles(few=SMALL, many=Tile(64, 64, 8, 2)),
    "consumer": Tiles(few=SMALL, many=SMALL),  # 64 rows and columns spill in FP8
}


def tile_for(rows: int) -> Tile:
    """rows: of one weight, on average."""
    tiles = pick(TILES)
    return tiles.few if rows <= FEW else tiles.many


@dataclass(frozen=True)
class Operand:
    """A weight as kernels take it, or those of all experts, the expert first.

    data: PLAIN values, else int32 words of codes; row, each, scale_each: elements from one row to
    the next and from one expert to the next; height: rows that share an FP8 scale.
    """

    kind: int
    data: Tensor
    scale: Tensor
    top: Tensor
    outputs: int
    inputs: int
    row: int
    each: int
    scale_each: int
    height: int = FP8_BLOCK


def plain(data: Tensor) -> Operand:
    """data [E, in, out], perhaps a part of wider rows."""
    _, inputs, outputs = data.shape
    each, row, _ = data.stride()
    return Operand(PLAIN.value, data, data, data, outputs, inputs, row, each, 0)


def operand(matrix: Matrix) -> Operand:
    """matrix: of one weight or, with the expert as first dim of its tensors, of all experts'.

    Raises ValueError where rows are no whole words."""
    assert isinstance(matrix, FP8Matrix | FP4Matrix | NVFP4Matrix | Int4Matrix)
    codes, kind, height, top = _parts(matrix)
    if codes.shape[-1] % 4:
        raise ValueError(f"a packed weight's rows have {codes.shape[-1]} bytes; the kernels take 4")
    words, scale = codes.view(torch.int32), matrix.scale
    if scale.dtype == torch.uint8 and scale.shape[-1] % 4 == 0:
        scale = scale.view(torch.int32)
    outputs, inputs = matrix.shape
    each, scale_each = (t.stride(0) if t.dim() == 3 else 0 for t in (words, scale))
    row = words.stride(-2)
    return Operand(
        kind, words, scale, scale if top is None else top, outputs, inputs, row, each,
        scale_each, height,
    )  # fmt: skip


def _parts(
    matrix: FP8Matrix | FP4Matrix | NVFP4Matrix | Int4Matrix,
) -> tuple[Tensor, int, int, Tensor | None]:
    if isinstance(matrix, FP8Matrix):
        return matrix.codes, FP8.value, matrix.height, None
    if isinstance(matrix, FP4Matrix):
        return matrix.data, MXFP4.value, 1, None
    if isinstance(matrix, Int4Matrix):
        return matrix.data, matrix.block, 1, None
    return matrix.data, NVFP4.value, 1, matrix.top


@triton.jit
def _e4m3(words):
    """int32 [N, W] of 4 codes -> bfloat16 [N, 4 W]."""
    N: tl.constexpr = words.shape[0]
    W: tl.constexpr = words.shape[1]
    k0, k1, k2, k3 = e4m3_codes(words, tl.bfloat16)
    values = tl.join(tl.join(k0, k2), tl.join(k1, k3))
    return tl.reshape(values, (N, 4 * W)) * (2.0**120)


@triton.jit
def _e2m1(words):
    """int32 [N, W] of 8 codes -> bfloat16 [N, 8 W], divided by 2^126."""
    N: tl.constexpr = words.shape[0]
    W: tl.constexpr = words.shape[1]
    k0, k4 = e2m1_codes(words, tl.bfloat16)
    k1, k5 = e2m1_codes(words >> 4, tl.bfloat16)
    k2, k6 = e2m1_codes(words >> 8, tl.bfloat16)
    k3, k7 = e2m1_codes(words >> 12, tl.bfloat16)
    even = tl.join(tl.join(k0, k4), tl.join(k2, k6))
    odd = tl.join(tl.join(k1, k5), tl.join(k3, k7))
    return tl.reshape(tl.join(even, odd), (N, 8 * W))


@triton.jit
def _int4(words):
    """int32 [N, W] of 8 codes -> bfloat16 [N, 8 W]."""
    N: tl.constexpr = words.shape[0]
    W: tl.constexpr = words.shape[1]
    k0, k4 = int4_codes(words)
    k1, k5 = int4_codes(words >> 4)
    k2, k6 = int4_codes(words >> 8)
    k3, k7 = int4_codes(words >> 12)
    even = tl.join(tl.join(k0, k4), tl.join(k2, k6))
    odd = tl.join(tl.join(k1, k5), tl.join(k3, k7))
    return tl.reshape(tl.join(even, odd), (N, 8 * W))


@triton.jit
def _codes(scale, n, first, N: tl.constexpr, COUNT: tl.constexpr, BLOCKS: tl.constexpr):
    """The bytes of blocks first .. first + BLOCKS - 1 of rows n, of COUNT a row: int32 [W, BLOCKS].
    Whole words, where `operand` found that rows consist of such."""
    W: tl.constexpr = n.shape[0]
    if scale.dtype.element_ty == tl.int32:
        word = first // 4 + tl.arange(0, BLOCKS // 4)
        used = (n < N)[:, None] & (word < COUNT // 4)[None, :]
        four = tl.load(scale + n[:, None] * (COUNT // 4) + word[None, :], mask=used, other=0)
        four = four[:, :, None] >> (tl.arange(0, 4) * 8)[None, None, :]
        code = tl.reshape(four & 0xFF, (W, BLOCKS))
    else:
        block = first + tl.arange(0, BLOCKS)
        used = (n < N)[:, None] & (block < COUNT)[None, :]
        at = scale + n[:, None] * COUNT + block[None, :]
        code = tl.load(at, mask=used, other=0).to(tl.int32)
    return code


@triton.jit
def _fp4_factor(code, KIND: tl.constexpr):
    """A block's scale times 2^62, bfloat16, from its byte. Powers beyond 2^65 count as that."""
    if KIND == MXFP4:
        bits = tl.minimum(code + 62, 254) << 7
        factor = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        factor = (e4m3_decode(code) * (2.0**120) * (2.0**62)).to(tl.bfloat16)
    return factor


FP4_UNIT = tl.constexpr(2.0**64)
"""What e2m1 values and their factors together leave out."""


@triton.jit
def _step(
    x,
    total,
    w,
    scale,
    n,
    k,
    N: tl.constexpr,
    K: tl.constexpr,
    ROW: tl.constexpr,
    KIND: tl.constexpr,
    HEIGHT: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """total [M, W] plus x [M, DEPTH] times the weight's inputs from k on and outputs n."""
    W: tl.constexpr = n.shape[0]
    if KIND == PLAIN:
        at = k + tl.arange(0, DEPTH)
        used = (at < K)[:, None] & (n < N)[None, :]
        tile = tl.load(w + at[:, None] * ROW + n[None, :], mask=used, other=0.0)
        total = tl.dot(x, tile, total, input_precision="ieee")
    elif KIND == FP8:
        word = k // 4 + tl.arange(0, DEPTH // 4)
        used = (n < N)[:, None] & (word < K // 4)[None, :]
        tile = _e4m3(tl.load(w + n[:, None] * ROW + word[None, :], mask=used, other=0))
        at = n // HEIGHT * ((K + DEPTH - 1) // DEPTH) + k // DEPTH
        factor = tl.load(scale + at, mask=n < N, other=0.0)
        sums = tl.dot(x, tl.trans(tile.to(x.dtype)), input_precision="ieee")
        total += sums * factor[None, :]
    elif KIND >= INT4:
        SCALES: tl.constexpr = DEPTH // KIND
        word = k // 8 + tl.arange(0, DEPTH // 8)
        used = (n < N)[:, None] & (word < K // 8)[None, :]
        tile = _int4(tl.load(w + n[:, None] * ROW + word[None, :], mask=used, other=0))
        block = k // KIND + tl.arange(0, SCALES)
        used = (n < N)[:, None] & (block < K // KIND)[None, :]
        at = scale + n[:, None] * (K // KIND) + block[None, :]
        factor = tl.load(at, mask=used, other=0.0).to(x.dtype)
        tile = tl.reshape(tile.to(x.dtype), (W, SCALES, KIND)) * factor[:, :, None]
        total = tl.dot(x, tl.trans(tl.reshape(tile, (W, DEPTH))), total, input_precision="ieee")
    else:
        BLOCK: tl.constexpr = 32 if KIND == MXFP4 else 16
        BLOCKS: tl.constexpr = DEPTH // BLOCK
        word = k // 8 + tl.arange(0, DEPTH // 8)
        used = (n < N)[:, None] & (word < K // 8)[None, :]
        tile = _e2m1(tl.load(w + n[:, None] * ROW + word[None, :], mask=used, other=0))
        factor = _fp4_factor(_codes(scale, n, k // BLOCK, N, K // BLOCK, BLOCKS), KIND)
        tile = tl.reshape(tile, (W, BLOCKS, BLOCK)) * factor[:, :, None]
        tile = tl.reshape(tile, (W, DEPTH)).to(x.dtype)
        total = tl.dot(x, tl.trans(tile), total, input_precision="ieee")
    return total


@triton.jit
def multiply(
    x,
    real,
    w,
    scale,
    top,
    w_too,
    scale_too,
    top_too,
    n,
    N: tl.constexpr,
    K: tl.constexpr,
    ROW: tl.constexpr,
    KIND: tl.constexpr,
    HEIGHT: tl.constexpr,
    TWO: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Rows at the pointers x [M], where real, times outputs n [W] of one weight or, if TWO, of
    each of two: float32 [M, W] twice."""
    M: tl.constexpr = x.shape[0]
    W: tl.constexpr = n.shape[0]
    one = tl.zeros((M, W), tl.float32)
    two = one
    for k in range(0, K, DEPTH):
        at = k + tl.arange(0, DEPTH)
        used = real[:, None] & (at < K)[None, :]
        part = tl.load(x[:, None] + at[None, :], mask=used, other=0.0)
        one = _step(part, one, w, scale, n, k, N, K, ROW, KIND, HEIGHT, DEPTH)
        if TWO:
            two = _step(part, two, w_too, scale_too, n, k, N, K, ROW, KIND, HEIGHT, DEPTH)
    if KIND == MXFP4:
        one *= FP4_UNIT
        two *= FP4_UNIT
    if KIND == NVFP4:
        one *= tl.load(top) * FP4_UNIT
        two *= tl.load(top_too) * FP4_UNIT
    return one, two


@triton.jit(do_not_specialize=["rows", "out_stride"])
def packed_product(
    x,
    w,
    scale,
    top,
    out,
    rows,
    x_stride,
    out_stride,
    group_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    ROW: tl.constexpr,
    KIND: tl.constexpr,
    HEIGHT: tl.constexpr,
    M: tl.constexpr,
    W: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Program (row tile, output tile, group): a group's inputs, rows of the weight and outputs."""
    group = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    n = tl.program_id(1) * W + tl.arange(0, W)
    w += group * N * ROW
    scale += group * (N // HEIGHT) * ((K + DEPTH - 1) // DEPTH)
    start = x + t * x_stride + group * group_stride
    real = t < rows
    total, _ = multiply(
        start, real, w, scale, top, w, scale, top, n, N, K, ROW, KIND, HEIGHT, False, DEPTH
    )
    at = out + t[:, None] * out_stride + group * N + n[None, :]
    tl.store(at, total, mask=real[:, None] & (n < N)[None, :])


def product(x: Inputs, matrix: Matrix) -> Tensor:
    """Of FP8 weights that are arranged, by their own kernel; of others by bits."""
    if isinstance(matrix, FP8Matrix):
        return fp8.product(x, matrix)
    assert isinstance(x, Tensor)
    x = x[:, None]
    w, (rows, groups, inputs) = operand(matrix), x.shape
    assert inputs == w.inputs
    assert x.stride(2) == 1
    assert groups == 1 or w.height == 1
    n = w.outputs // groups
    out = x.new_empty(rows, w.outputs)
    tile = tile_for(rows)
    packed_product[(triton.cdiv(rows, tile.rows), triton.cdiv(n, tile.columns), groups)](
        x, w.data, w.scale, w.top, out, rows, x.stride(0), w.outputs, x.stride(1),
        N=n, K=inputs, ROW=w.row, KIND=w.kind, HEIGHT=w.height,
        M=tile.rows, W=tile.columns, DEPTH=DEPTH, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out
