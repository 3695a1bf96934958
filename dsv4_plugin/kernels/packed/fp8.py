"""Triton: FP8 linears, weights as e4m3 codes in blocks of 128 x 128 under float32 scales.

A program has W outputs and M rows; it goes over the inputs in blocks of 128, each of which adds its
sums times the block's scales. The weight is the left operand, [W, 128] x [128, M], in one of two
ways:

- by bits, on every chip: 32 words of 4 codes become bfloat16 in registers, codes 0 and 2 as well as
  1 and 3 together, by instructions that take pairs. `arranged` has put the codes so that the pairs
  of all words meet 64 neighbouring inputs, in their order: nothing is moved between registers, and
  Triton brings the words from memory straight to those in which the tensor cores take them.
- e4m3 x e4m3, where a chip multiplies these (from sm_89 on) and the inputs are rounded: they come
  as codes, with a power of two for each block.

Up to so many rows (`Launch.line`) the inputs are cut into pieces, as many as the weight's shape
says, so that there are programs enough; whoever of an output tile arrives last adds the pieces in
order. Beyond, tiles are large and a program sums all of its inputs. So there are two families of
bits, on either side of that line; within each a row has the same sums in every company.

Shapes: T rows, G groups, K inputs, N outputs of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_plugin.kernels.arrival import counters, in_order, is_last
from dsv4_plugin.kernels.bits import (
    E4M3_UNIT,
    e4m3_block,
    e4m3_decode,
    e4m3_pairs,
    scaled_pairs,
    side_by_side,
)
from dsv4_plugin.kernels.launch import pick, require
from dsv4_plugin.kernels.packed import ROUNDED, FP8Matrix, Inputs, Rounded
from dsv4_plugin.kernels.programmatic import follow, kernel, prefetch
from dsv4_plugin.kernels.swiglu.kernel import clamped

PLAIN = tl.constexpr(0)
VALUES = tl.constexpr(1)
CODES = tl.constexpr(2)
"""What rows are written as: as they are; rounded, as values or as codes and scales."""
UNITS = tl.constexpr(0x7B807B80)
"""Two bfloat16 values of 2^120, by which e4m3's bits are divided."""


@dataclass(frozen=True)
class Tile:
    """outputs and rows that a program computes; warps; stages of its loads (one, of float32 inputs,
    which take twice the room); turned: the rows are the left operand, by which a thread needs fewer
    of their scales."""

    outputs: int
    rows: int
    warps: int
    stages: int
    turned: bool = False


@dataclass(frozen=True)
class Tiles:
    """few: up to as many rows as the tile has; some: up to the line; many: beyond."""

    few: Tile
    some: Tile
    many: Tile

    def of(self, rows: int, line: int) -> Tile:
        return self.few if rows <= self.few.rows else self.some if rows <= line else self.many


@dataclass(frozen=True)
class Way:
    """plain: outputs as they are; rounded: tiles of a whole block of 128 outputs; gated: of both
    weights of a SwiGLU."""

    plain: Tiles
    rounded: Tiles
    gated: Tiles


@dataclass(frozen=True)
class Launch:
    """bits, codes (None: the chip has no such products): the tiles. Up to `line` rows inputs are
    cut until `programs` run, into at most `most` pieces of `least` inputs or more. group: row tiles
    that are computed side by side, while the weight's tile is in L2."""

    bits: Way
    codes: Way | None
    programs: int
    least: int = 512
    most: int = 16
    line: int = 128  # guessed: about where the large tiles become as fast
    group: int = 8


BITS = Way(
    # measured, H200: many 690 us for wo_a's 4,096 rows. compiled: few 309 instructions a block
    plain=Tiles(Tile(64, 16, 4, 4), Tile(64, 32, 4, 4), Tile(128, 128, 8, 3)),
    rounded=Tiles(Tile(128, 16, 4, 3), Tile(128, 32, 4, 3), Tile(128, 128, 8, 3)),
    # compiled: no spills; two sums of 128 x 128 would
    gated=Tiles(Tile(128, 16, 8, 3), Tile(128, 32, 8, 3), Tile(128, 64, 8, 3)),
)
# compiled: no spills in loops, up to 98 KiB; 128 x 128 takes 3.7 instructions for each of tensor
# cores, 128 x 64 took 5.1. With mma.sync two sums of 128 x 64 spill.
SMALL_BITS = Way(
    plain=Tiles(Tile(64, 16, 4, 4), Tile(64, 32, 4, 4), Tile(128, 128, 8, 3)),
    rounded=Tiles(Tile(128, 16, 4, 3), Tile(128, 32, 4, 3), Tile(128, 128, 8, 3)),
    gated=Tiles(Tile(128, 16, 8, 3), Tile(128, 32, 8, 3), Tile(128, 32, 8, 3)),
)
# compiled: 64 KiB of shared memory, which is all that gfx942 has
LEAST_BITS = Way(
    plain=Tiles(Tile(64, 16, 4, 2), Tile(64, 32, 4, 2), Tile(64, 64, 8, 2)),
    rounded=Tiles(Tile(128, 16, 4, 2), Tile(128, 32, 4, 2), Tile(128, 64, 8, 2)),
    # compiled: gfx950 spills with 32 rows
    gated=Tiles(Tile(128, 16, 8, 2), Tile(128, 16, 8, 2), Tile(128, 16, 8, 2)),
)
EIGHT = Way(
    # measured, H200: many 345 us for wo_b's 4,096 rows; few, with its rows on the left and by
    # mma.sync, 13 us. compiled: few as it is 112 instructions a block, where that had 181
    plain=Tiles(Tile(64, 16, 4, 4), Tile(64, 64, 4, 4), Tile(128, 128, 8, 3, True)),
    rounded=Tiles(Tile(128, 16, 4, 3), Tile(128, 64, 4, 3), Tile(128, 128, 8, 3, True)),
    # compiled: no spills
    gated=Tiles(Tile(128, 16, 8, 3), Tile(128, 32, 8, 3), Tile(128, 64, 8, 3)),
)
LINEARS = {
    "a100": Launch(SMALL_BITS, None, programs=160),  # guessed: 1.5 for each of 108 SMs
    "sm86": Launch(SMALL_BITS, None, programs=128),  # guessed: 82 SMs
    "sm87": Launch(SMALL_BITS, None, programs=32),  # guessed: 16 SMs
    "consumer": Launch(SMALL_BITS, EIGHT, programs=192),  # guessed: 128 to 188 SMs
    "hopper": Launch(BITS, EIGHT, programs=192),  # measured: pieces of 192 to 256 programs
    "blackwell": Launch(BITS, EIGHT, programs=192),  # guessed: as hopper
    "any": Launch(LEAST_BITS, None, programs=192),  # guessed
}


def pieces(tiles: int, inputs: int, launch: Launch) -> int:
    """How many a linear's inputs are cut into: by its shape alone. tiles: of few rows."""
    count, blocks = 1, -(-inputs // ROUNDED)
    while count < launch.most and count * tiles < launch.programs:
        if inputs < 2 * count * launch.least or blocks % (2 * count):
            break
        count *= 2
    return count


@triton.jit
def _block(
    total, x, x_scale, w, scale, i, k_end,
    EVEN: tl.constexpr, EIGHT: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """total [W, M], or [M, W] if TURNED, plus block i of the inputs; x [M], w [W]: pointers to
    rows; scale: to the rows' first scale, one or [W]."""
    factor = tl.load(scale + i)
    if EIGHT:
        # Two products: of one alone Triton carries a part from step to step, byte by byte.
        k = i * 128 + tl.arange(0, 64)
        codes = tl.load(w[:, None] + k[None, :])
        sums = _part(None, codes, x, k, k_end, EVEN, TURNED)
        codes = tl.load(w[:, None] + 64 + k[None, :])
        sums = _part(sums, codes, x, k + 64, k_end, EVEN, TURNED)
        by = tl.load(x_scale + i)
        factor *= by[:, None] if TURNED else by[None, :]
    else:
        words = tl.load(w[:, None] + (i * 32 + tl.arange(0, 32))[None, :])
        even, odd = e4m3_pairs(words, tl.bfloat16)
        k = i * 128 + tl.arange(0, 64)
        sums = _part(None, side_by_side(scaled_pairs(even, UNITS)), x, k, k_end, EVEN, TURNED)
        sums = _part(sums, side_by_side(scaled_pairs(odd, UNITS)), x, k + 64, k_end, EVEN, TURNED)
    return total + sums * factor


@triton.jit
def _part(sums, weights, x, k, k_end, EVEN: tl.constexpr, TURNED: tl.constexpr):
    """sums plus weights [W, k] times the inputs k of rows x."""
    at = x[None, :] + k[:, None]
    inputs = tl.load(at) if EVEN else tl.load(at, mask=(k < k_end)[:, None], other=0.0)
    weights = weights.to(inputs.dtype)
    if TURNED:
        weights, inputs = tl.trans(inputs), tl.trans(weights)
    return tl.dot(weights, inputs, sums, input_precision="ieee")


@triton.jit
def _place(rows_tiles, tiles, GROUP: tl.constexpr):
    """A program's row tile and output tile: those of GROUP row tiles follow one another."""
    pid = tl.program_id(0)
    first = pid // (GROUP * tiles) * GROUP
    size = tl.minimum(rows_tiles - first, GROUP)
    pid %= GROUP * tiles
    return first + pid % size, pid // size


@triton.jit
def _write(
    one, two, limit, out, out_scale, rows, m, n, N, first,
    FORM: tl.constexpr, GATED: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Sums [W, M] become outputs n of rows m, as a product of torch rounds them. Those from `first`
    on are a tensor of their own, behind the others'."""
    group, groups = tl.program_id(2), tl.num_programs(2)
    y = one.to(KIND)
    if GATED:
        y = clamped(y.to(tl.float32), two.to(KIND).to(tl.float32), limit).to(KIND)
    used = (n < N)[:, None] & (m < rows)[None, :]
    if FORM == PLAIN:
        later = tl.min(n, 0) >= first
        begin = tl.where(later, first, 0)
        width = tl.where(later, N - first, first) * groups
        at = out + begin.to(tl.int64) * rows + m.to(tl.int64)[None, :] * width
        tl.store(at + (group * N + n - begin)[:, None], y, mask=used)
    else:
        row = m.to(tl.int64) * (N * groups) + group * N
        store_rounded(
            y.to(tl.float32), out + row[None, :] + n[:, None], used,
            out_scale + ((row + tl.min(n, 0)) // 128)[None, :], (m < rows)[None, :], 0, FORM,
        )  # fmt: skip


@triton.jit
def store_rounded(y, at, used, scale_at, whole, AXIS: tl.constexpr, FORM: tl.constexpr):
    """Blocks of float32 y along AXIS, at the pointers `at` where `used`: rounded values, or codes
    and, where `whole`, their scales."""
    code, unit = e4m3_block(y, AXIS)
    if FORM == CODES:
        tl.store(at, code, mask=used)
        tl.store(scale_at, unit, mask=whole)
    else:
        tl.store(at, e4m3_decode(code) * E4M3_UNIT * unit, mask=used)


@triton.jit
def store_rounded_row(
    y, out, out_scale, t,
    D: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Row t, of D values, from float32 y [COLUMNS], which are of the model's dtype. BLOCK: 128, but
    not more than COLUMNS."""
    COUNT: tl.constexpr = (D + BLOCK - 1) // BLOCK
    block = tl.arange(0, COLUMNS // BLOCK)[:, None]
    at = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    y = tl.reshape(y, (COLUMNS // BLOCK, BLOCK))
    scale_at = out_scale + t * COUNT + block
    store_rounded(y, out + t * D + at, at < D, scale_at, block < COUNT, 1, FORM)


@triton.jit
def _prefetch(
    w, w_scale, row_tile, piece, group, n, N, BLOCKS,
    HEIGHT: tl.constexpr, W: tl.constexpr, WORDS: tl.constexpr, GATED: tl.constexpr,
    PIECES: tl.constexpr,
):  # fmt: skip
    """What a program reads of a weight, whose outputs begin at n: for all row tiles the first asks,
    for the few bytes of scales of all pieces the first piece."""
    each = BLOCKS // PIECES
    count = tl.where(row_tile == 0, tl.minimum(N - n, W), 0)
    SCALES: tl.constexpr = W if HEIGHT == 1 else 1
    scales = tl.where(piece == 0, tl.minimum(count, SCALES), 0)
    for half in tl.static_range(2 if GATED else 1):
        row = (group + half).to(tl.int64) * N + n  # a gated weight has one group
        at = w + (row * BLOCKS + piece * each) * WORDS
        prefetch(at, count, BLOCKS * WORDS, each * WORDS, W)
        prefetch(w_scale + row // HEIGHT * BLOCKS, scales, BLOCKS, BLOCKS, SCALES)


@kernel(do_not_specialize=["rows", "limit"])
def fp8_product(
    x, x_scale, w, w_scale, out, out_scale, partial, counter,
    rows, x_stride, x_group, inputs, BLOCKS, N, first, limit,
    HEIGHT: tl.constexpr, M: tl.constexpr, W: tl.constexpr, EVEN: tl.constexpr,
    EIGHT: tl.constexpr, TURNED: tl.constexpr, GATED: tl.constexpr, FORM: tl.constexpr,
    KIND: tl.constexpr, PIECES: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (tile of rows and outputs, piece of the inputs, group). BLOCKS: of 128 inputs."""
    row_tile, tile = _place(tl.cdiv(rows, M), tl.cdiv(N, W), GROUP)
    piece, group = tl.program_id(1), tl.program_id(2)
    WORDS: tl.constexpr = 128 if EIGHT else 32
    _prefetch(
        w, w_scale, row_tile, piece, group, tile * W, N, BLOCKS,
        HEIGHT, W, WORDS, GATED, PIECES,
    )  # fmt: skip
    follow()
    m, n = row_tile * M + tl.arange(0, M), tile * W + tl.arange(0, W)
    t = tl.where(m < rows, m, 0).to(tl.int64)
    x += t * x_stride + group * x_group
    x_scale += t * BLOCKS
    row = group.to(tl.int64) * N + tl.where(n < N, n, 0)
    w += row * (BLOCKS * WORDS)
    if HEIGHT == 1:
        scale = (w_scale + row * BLOCKS)[:, None]
    else:
        scale = w_scale + tile * W // HEIGHT * BLOCKS
    one = tl.zeros((M, W) if TURNED else (W, M), tl.float32)
    two = one
    each = BLOCKS // PIECES
    for i in tl.range(piece * each, (piece + 1) * each, num_stages=STAGES):
        one = _block(one, x, x_scale, w, scale, i, inputs, EVEN, EIGHT, TURNED)
        if GATED:
            up = w + N.to(tl.int64) * (BLOCKS * WORDS)
            up_scale = scale + N // HEIGHT * BLOCKS
            two = _block(two, x, x_scale, up, up_scale, i, inputs, EVEN, EIGHT, TURNED)
    if TURNED:
        one, two = tl.trans(one), tl.trans(two)
    if PIECES > 1:
        slot = group * tl.num_programs(0) + tl.program_id(0)
        SIZE: tl.constexpr = W * M
        mine = partial + slot.to(tl.int64) * (PIECES * SIZE * (2 if GATED else 1))
        at = tl.arange(0, W)[:, None] * M + tl.arange(0, M)[None, :]
        tl.store(mine + piece * SIZE + at, one)
        if GATED:
            tl.store(mine + (PIECES + piece) * SIZE + at, two)
        if not is_last(counter + slot, PIECES):
            return
        one = in_order(mine + at, SIZE, PIECES)
        if GATED:
            two = in_order(mine + PIECES * SIZE + at, SIZE, PIECES)
    _write(one, two, limit, out, out_scale, rows, m, n, N, first, FORM, GATED, KIND)


@kernel()
def round_blocks(
    x, out, out_scale, stride,
    K: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Program (row, BLOCKS blocks of BLOCK values)."""
    follow()
    t = tl.program_id(0).to(tl.int64)
    block = (tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS))[:, None]
    at = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    y = tl.load(x + t * stride + at, mask=at < K, other=0.0).to(tl.float32)
    COUNT: tl.constexpr = (K + BLOCK - 1) // BLOCK
    scale_at = out_scale + t * COUNT + block
    store_rounded(y, out + t * K + at, at < K, scale_at, block < COUNT, 1, FORM)


ROUNDED_AT_ONCE = 8
"""Blocks of a program."""


KINDS = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def arranged(matrix: FP8Matrix, rounded: bool) -> FP8Matrix:
    """The matrix in whole blocks of inputs and, where it is multiplied by bits, in their order.
    rounded: so are the inputs."""
    if matrix.inputs:
        return matrix
    rows, inputs = matrix.shape
    codes = torch.nn.functional.pad(matrix.codes, (0, -inputs % ROUNDED))
    bits = not rounded or pick(LINEARS).codes is None
    if bits:
        codes = codes.view(rows, -1, 2, 32, 2).permute(0, 1, 3, 4, 2).reshape(rows, -1)
    return FP8Matrix(codes, matrix.scale, matrix.height, inputs, bits)


def product(x: Inputs, matrix: FP8Matrix) -> Tensor:
    out = _product(_grouped(x), matrix, matrix.shape[0], rounded=False)
    assert isinstance(out, Tensor)
    return out


def products(x: Inputs, matrix: FP8Matrix, outputs: tuple[int, int]) -> tuple[Tensor, Tensor]:
    whole = _product(_grouped(x), matrix, outputs[0], rounded=False)
    assert isinstance(whole, Tensor)
    rows = len(x)
    first, second = whole.view(-1).split([rows * n for n in outputs])
    return first.view(rows, outputs[0]), second.view(rows, outputs[1])


def grouped_product(x: Tensor, matrix: FP8Matrix, rounded: bool) -> Inputs:
    n = matrix.shape[0] // x.shape[1]
    if rounded and n % ROUNDED:
        found = _product(x, matrix, n, rounded=False)
        assert isinstance(found, Tensor)
        return round_rows(found)
    return _product(x, matrix, n, rounded)


def gated_product(x: Inputs, matrix: FP8Matrix, limit: float, rounded: bool) -> Inputs:
    return _product(_grouped(x), matrix, matrix.shape[0] // 2, rounded, limit)


def _grouped(x: Inputs) -> Inputs:
    if isinstance(x, Tensor):
        return x[:, None]
    return Rounded(x.data[:, None], x.scale, x.dtype)


def _product(
    x: Inputs, matrix: FP8Matrix, first: int, rounded: bool, limit: float | None = None
) -> Inputs:
    """x [T, G, in]; the weight's rows fall to G groups."""
    data = x if isinstance(x, Tensor) else x.data
    scale = None if isinstance(x, Tensor) else x.scale
    (rows, groups, inputs), gated = data.shape, limit is not None
    n = matrix.shape[0] // groups // (2 if gated else 1)
    eight, launch = scale is not None, pick(LINEARS)
    assert inputs == matrix.inputs, "weights are arranged at load"
    assert eight != matrix.bits, "weights are arranged for inputs of the other kind"
    assert data.stride(2) == 1
    assert groups == 1 or matrix.height == 1
    assert matrix.height == 1 or first == n or first % ROUNDED == 0
    assert not (gated or rounded) or n % ROUNDED == 0
    require(matrix.codes, matrix.scale, scale)
    way = launch.codes if eight else launch.bits
    assert way is not None
    tiles_of = way.gated if gated else way.rounded if rounded else way.plain
    tile = tiles_of.of(rows, launch.line)
    columns = triton.cdiv(n, tiles_of.few.outputs) * groups
    count = pieces(columns, inputs, launch) if rows <= launch.line else 1
    tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(n, tile.outputs)
    size = tiles * groups * count * tile.rows * tile.outputs * (2 if gated else 1)
    partial = data.new_empty(size if count > 1 else 1, dtype=torch.float32)
    counter = counters("packed", data.device, tiles * groups)
    out: Inputs
    if rounded:
        out, to, to_scale, form = room(rows, n * groups, x.dtype, data.device)
    else:
        out = to = to_scale = torch.empty(rows, n * groups, dtype=x.dtype, device=data.device)
        form = PLAIN.value
    codes = matrix.codes.view(torch.float8_e4m3fn if eight else torch.int32)
    fp8_product[(tiles, count, groups)](
        data.view(torch.float8_e4m3fn) if eight else data, data if scale is None else scale,
        codes, matrix.scale, to, to_scale, partial, counter,
        rows, data.stride(0), data.stride(1), inputs, codes.shape[1] // (128 if eight else 32),
        n, first, 0.0 if limit is None else limit,
        HEIGHT=matrix.height, M=tile.rows, W=tile.outputs, EVEN=inputs % ROUNDED == 0,
        EIGHT=eight, TURNED=tile.turned, GATED=gated, FORM=form, KIND=KINDS[x.dtype],
        PIECES=count, GROUP=launch.group,
        STAGES=1 if data.dtype == torch.float32 else tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    return out


def room(
    rows: int, width: int, dtype: torch.dtype, device: torch.device
) -> tuple[Rounded, Tensor, Tensor, int]:
    """Rounded rows to be filled, in the form that this chip's products take; what a kernel writes
    them to, and the form."""
    if pick(LINEARS).codes is None:
        out = torch.empty(rows, width, dtype=dtype, device=device)
        return Rounded(out, None, dtype), out, out, VALUES.value
    out = torch.empty(rows, width, dtype=torch.uint8, device=device)
    scale = torch.empty(rows, -(-width // ROUNDED), dtype=torch.float32, device=device)
    return Rounded(out, scale, dtype), out, scale, CODES.value


def round_rows(x: Tensor) -> Rounded:
    """x [T, K], any stride of T."""
    rows, k = x.shape
    out, to, scale, form = room(rows, k, x.dtype, x.device)
    _round(x, to, scale, form)
    return out


def round_inputs(x: Tensor, block: int = ROUNDED) -> Tensor:
    """The same, as values."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _round(x, out, out, VALUES.value, block)
    return out


def _round(x: Tensor, to: Tensor, scale: Tensor, form: int, block: int = ROUNDED) -> None:
    rows, k = x.shape
    round_blocks[(rows, triton.cdiv(k, block * ROUNDED_AT_ONCE))](
        x, to, scale, x.stride(0), K=k, BLOCKS=ROUNDED_AT_ONCE, BLOCK=block, FORM=form, num_warps=4
    )
