"""Triton: the routed experts, every step of a fixed shape and nothing asked of the device.

The (token, expert) pairs are put into blocks of one expert each; there is room for as many blocks
as the shapes allow, and programs of those that stay empty leave at once. `prepare` does so, a
program for each expert, and puts the inputs into the form that products take. `multiply_experts`
runs twice, for the gated and for the down product, each pair's result in a row of its own;
`add_pairs` adds a token's rows in the order of its choices. So a token's result does not depend on
its company, but for the tiles of few and of many rows an expert (`Launch`), which add in different
orders.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_plugin.kernels.arrival import counters
from dsv4_plugin.kernels.experts.product import (
    BLOCK,
    FP8,
    PLAIN,
    Operand,
    multiply_experts,
    operand,
    plain,
    position,
    rounded,
)
from dsv4_plugin.kernels.launch import pick, require
from dsv4_plugin.kernels.packed import Matrix
from dsv4_plugin.kernels.programmatic import follow, kernel

CHUNK, STAGES = 512, 4
"""Pairs that a program looks at together while it counts or places them, and stages of their loads:
of many pairs each would else wait for the one before."""
COLUMNS = 512
"""Columns that a program of `add_pairs` adds."""
PREPARED = 8
"""Blocks of inputs that a program of `prepare` takes."""
ALIGNED = 4
"""Numbers of 4 bytes up to the next address that Triton calls aligned."""


@dataclass(frozen=True)
class Tile:
    """What a program computes of a product: rows, and columns of the result; depth: inputs of a
    step (FP8 at most a block); warps; stages of its loads (of float32 inputs, which take twice the
    room: one). turned: see `product`."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    turned: bool = False


@dataclass(frozen=True)
class Launch:
    """Tiles where an expert has `limit` rows on average or less, and where it has more: of packed
    weights, FP8 ones among these, and plain ones. piece: inputs of a turned product of few whose
    sum is made apart; split: up to so many pairs, by a program of its own (0: never)."""

    few: Tile
    many: Tile
    many_fp8: Tile
    plain_few: Tile
    plain_many: Tile
    limit: int = 16
    piece: int = 1024
    split: int = 16

    def tile(self, few: bool, kind: int) -> Tile:
        if kind == PLAIN.value:
            return self.plain_few if few else self.plain_many
        if few:
            return self.few
        return self.many_fp8 if kind == FP8.value else self.many


# measured: H200, MXFP4, 1 / 4 / 16 / 64 / 256 rows in 73 / 173 / 519 / 1,239 / 1,556 us, not split
# (straight: 87 / 280 / 886 / 2,175 / 2,728); 64 columns and 4 warps: 70 / 173 / 510 / 1,225 / 1,538
# with a launch more, since a tile must have whole blocks to round them.
# compiled: no spills, 80 KiB
FEW = Tile(16, 128, 256, 8, 3, turned=True)
# compiled: no spills
PLAIN_FEW, PLAIN_MANY = Tile(16, 32, 128, 4, 3), Tile(64, 64, 128, 8, 2)
# guessed: 1,024 inputs to a piece, and split up to 16 pairs, where a tile's blocks are so few that
# most of a large chip is idle
LAUNCHES = {
    # measured: H200, MXFP4, 4,096 rows: 5,180 us (64 x 64: 7,675; turned: 6,140); 1 and 16 rows: 64
    # and 616 us (256 inputs a step and 8 warps: 71 and 700), when inputs were not copied ahead
    # compiled: 128 rows spill in FP8
    # guessed: plain ones of 128 rows, about as many as an expert has of 4,096, whose weights are
    # then read once. compiled: no spills, 144 KiB
    "hopper": Launch(
        Tile(16, 128, 128, 4, 3, True),
        Tile(128, 128, 128, 8, 3),
        Tile(64, 128, 128, 8, 3),
        PLAIN_FEW,
        Tile(128, 128, 64, 8, 3),
    ),
    # compiled: many rows take half the instructions for a multiply-add that 64 turned ones did,
    # whose weights 8 warps move into tensor memory through shared memory, or 64 x 64 plain ones; in
    # FP8 2 stages spill 8 bytes, 3 spill 24. 4 warps have the weights of few rows where tensor
    # memory takes them, 8 would move them, too
    "blackwell": Launch(
        Tile(16, 128, 128, 4, 3, True),
        Tile(128, 128, 128, 8, 3),
        Tile(128, 128, 128, 8, 2),
        PLAIN_FEW,
        Tile(128, 128, 64, 8, 3),
    ),
    # compiled: as below; 64 plain rows spill in loops
    "consumer": Launch(
        FEW, Tile(64, 128, 128, 8, 3, True), Tile(32, 128, 128, 8, 3, True), PLAIN_FEW, PLAIN_FEW
    ),
    # compiled: in FP8 32 rows spill in loops, and few ones with 256 inputs a step
    "cdna": Launch(
        Tile(16, 128, 128, 8, 3, True),
        Tile(64, 128, 128, 8, 2, True),
        Tile(16, 128, 128, 8, 2, True),
        PLAIN_FEW,
        PLAIN_MANY,
    ),
    # compiled: straight tiles spill on chips with mma.sync, turned ones do not; in FP8, which has
    # sums of its own for every block, 64 rows do
    "any": Launch(
        FEW, Tile(64, 128, 128, 8, 3, True), Tile(32, 128, 128, 8, 3, True), PLAIN_FEW, PLAIN_MANY
    ),
}


@triton.jit
def _put(row_of, row, pairs, mine):
    """Those of the pairs that are `mine`, in order, from `row` on; the row behind them."""
    count = tl.cumsum(mine.to(tl.int32), 0)
    tl.store(row_of + row + count - 1, pairs, mask=mine)
    return row + tl.sum(mine.to(tl.int32), 0)


@triton.jit
def _place(
    ids, expert_of, row_of, used, pairs, e,
    E: tl.constexpr, EXPERTS: tl.constexpr, M: tl.constexpr, CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Expert e's blocks: expert_of int32 [B], e; row_of int32 [B * M], its pairs in order, then -1;
    expert 0's program too, used int32 [1], the blocks of all experts. Every program counts the
    pairs of all, by which it knows where its own begin, and nobody waits for another."""
    at = tl.arange(0, CHUNK)
    head = tl.load(ids + at, mask=at < pairs, other=-1).to(tl.int32)  # of a step of decode, all
    counts = tl.histogram(head, EXPERTS, mask=(head >= 0) & (head < E))
    if pairs > CHUNK:
        for start in tl.range(CHUNK, pairs, CHUNK, num_stages=STAGES):
            id = tl.load(ids + start + at, mask=start + at < pairs, other=-1).to(tl.int32)
            counts += tl.histogram(id, EXPERTS, mask=(id >= 0) & (id < E))
    number = tl.arange(0, EXPERTS)
    blocks = (counts + (M - 1)) // M
    first = tl.sum(tl.where(number < e, blocks, 0), 0)
    last = tl.sum(tl.where(number <= e, blocks, 0), 0)
    if e == 0:
        tl.store(used, tl.sum(blocks, 0))
    for block in range(first, last):
        tl.store(expert_of + block, e)
    if first < last:
        next_row = _put(row_of, first * M, at, head == e)
        if pairs > CHUNK:
            for start in tl.range(CHUNK, pairs, CHUNK, num_stages=STAGES):
                id = tl.load(ids + start + at, mask=start + at < pairs, other=-1)
                next_row = _put(row_of, next_row, start + at, id == e)
        rest = next_row + tl.arange(0, M)
        tl.store(row_of + rest, -1, mask=rest < last * M)


@kernel(do_not_specialize=["pairs"])
def prepare(
    x, out, ids, expert_of, row_of, used, pairs,
    K: tl.constexpr, OUT: tl.constexpr, ORDER: tl.constexpr, ROUND: tl.constexpr,
    BLOCKS: tl.constexpr, E: tl.constexpr, EXPERTS: tl.constexpr, M: tl.constexpr,
    CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The first programs place the pairs, an expert each. Then program (row, BLOCKS blocks): x
    [T, K] -> out [T, OUT], each block rounded if ROUND, in the order for products of ORDER codes a
    word, zeros behind the last."""
    follow()
    column, columns = tl.program_id(1), tl.num_programs(1)
    row = tl.program_id(0) - tl.cdiv(E, columns)
    if row >= 0:
        t = row.to(tl.int64)
        i = tl.arange(0, BLOCK)
        first = (column * BLOCKS + tl.arange(0, BLOCKS))[:, None] * BLOCK
        at = first + i[None, :]
        value = tl.load(x + t * K + at, mask=at < K, other=0.0).to(tl.float32)
        if ROUND:
            value = rounded(value, 1)
        to = first + position(i, ORDER)[None, :]
        tl.store(out + t * OUT + to, value, mask=at < OUT)
    else:
        e = tl.program_id(0) * columns + column
        if e < E:
            _place(ids, expert_of, row_of, used, pairs, e, E, EXPERTS, M, CHUNK, STAGES)


@kernel()
def add_pairs(
    y, ids, also, out,
    E: tl.constexpr, D: tl.constexpr, K: tl.constexpr, ALSO: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program (token, columns): the sum of its pairs' rows y [T * K, D], float32, one by one. If
    ALSO, what else there is [T, D] joins the rounded sum."""
    follow()
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    # All choices, then all rows are asked for together: no load passes a barrier.
    here = ()  # type: tuple[Tensor, ...]
    for i in tl.static_range(K):
        id = tl.load(ids + t * K + i)
        here += ((id >= 0) & (id < E),)
    if ALSO:
        more = tl.load(also + t * D + d, mask=d < D, other=0.0).to(tl.float32)
    tl.debug_barrier()
    rows = ()  # type: tuple[Tensor, ...]
    for i in tl.static_range(K):
        rows += (tl.load(y + (t * K + i) * D + d, mask=here[i] & (d < D), other=0.0),)
    tl.debug_barrier()
    for i in tl.static_range(K):
        total += rows[i].to(tl.float32)
    if ALSO:
        total = total.to(out.dtype.element_ty).to(tl.float32) + more
    tl.store(out + t * D + d, total, mask=d < D)


def experts(
    x: Tensor,
    ids: Tensor,
    weight: Tensor,
    w13: Tensor,
    w2: Tensor,
    limit: float,
    also: Tensor | None = None,
) -> Tensor:
    gate, up = w13.chunk(2, -1)
    return _experts(x, ids, weight, plain(gate), plain(up), plain(w2), limit, False, also)


def packed_experts(
    x: Tensor,
    ids: Tensor,
    weight: Tensor,
    w1: Matrix,
    w3: Matrix,
    w2: Matrix,
    limit: float,
    rounding: bool,
    also: Tensor | None = None,
) -> Tensor:
    return _experts(x, ids, weight, operand(w1), operand(w3), operand(w2), limit, rounding, also)


def blocks_of(pairs: int, experts: int, rows: int) -> int:
    """Most blocks of `rows` rows that so many pairs can fall into."""
    return (pairs + min(pairs, experts) * (rows - 1)) // rows


@dataclass(frozen=True)
class Blocks:
    """Of `rows` pairs each, of one expert of `experts`: expert_of int32 [most]; row_of int32
    [most * rows], pairs, in order, and -1; used int32 [1], how many there are. most: the number of
    blocks that there is room for."""

    used: Tensor
    row_of: Tensor
    expert_of: Tensor
    most: int
    rows: int
    experts: int

    @classmethod
    def room(cls, ids: Tensor, experts: int, rows: int) -> Blocks:
        most = blocks_of(ids.numel(), experts, rows)
        plan = torch.empty(ALIGNED + most * (rows + 1), dtype=torch.int32, device=ids.device)
        used, row_of, expert_of = plan.split([ALIGNED, most * rows, most])
        return cls(used, row_of, expert_of, most, rows, experts)


def padded(width: int) -> int:
    """To whole blocks."""
    return int(triton.cdiv(width, BLOCK.value) * BLOCK.value)


@dataclass(frozen=True)
class Products:
    """Of the pairs of ids [T, k] with weight [T, k], contiguous, in their blocks; few: rows of an
    expert; rounding: of the inputs of packed weights."""

    ids: Tensor
    weight: Tensor
    blocks: Blocks
    launch: Launch
    tile: Tile
    few: bool
    limit: float
    rounding: bool

    @classmethod
    def of(cls, ids: Tensor, weight: Tensor, w: Operand, limit: float, rounding: bool) -> Products:
        """w: one of the weights."""
        launch, experts = pick(LAUNCHES), len(w.data)
        few = ids.numel() // experts <= launch.limit
        tile = launch.tile(few, w.kind)
        ids, weight = ids.contiguous(), weight.contiguous()
        blocks = Blocks.room(ids, experts, tile.rows)
        return cls(ids, weight, blocks, launch, tile, few, limit, rounding)

    def order(self, w: Operand) -> int:
        """Codes of a word of w, where its inputs are ordered by them; else 1."""
        return w.codes if self.tile.turned else 1

    def prepared(self, x: Tensor, w: Operand) -> Tensor:
        """x [T, K] as the product with w takes it, and the pairs put into their blocks."""
        return prepared(x, self.ids, self.blocks, self.order(w), self.rounding)

    def multiply(
        self, x: Tensor, w: Operand, too: Operand, per: int, after: Operand | None = None
    ) -> Tensor:
        """Every pair's row of x, [pairs / per, K], times its expert's w; gated, where `too` is
        another weight. after: that of the next product, whose inputs the results are."""
        tile, blocks, pairs, gated = self.tile, self.blocks, self.ids.numel(), too is not w
        width = w.outputs if after is None else padded(w.outputs)
        out, tiles = x.new_empty(pairs, width), triton.cdiv(width, tile.columns)
        # Float32 takes twice the room, as with stages.
        deep = w.kind != FP8.value and w.inputs % tile.depth == 0 and x.dtype == torch.bfloat16
        piece = self.launch.piece if self.few and tile.turned else padded(w.inputs)
        pieces = triton.cdiv(w.inputs, piece)
        split = pieces > 1 and pairs <= self.launch.split
        partial = counter = self.weight
        if split:
            partial = self.weight.new_empty(pieces * (1 + gated) * pairs * w.outputs)
            counter = counters("experts", x.device, blocks.most * tiles)
        multiply_experts[(blocks.most, tiles, pieces if split else 1)](
            x, w.data, w.scale, w.top, too.data, too.scale, too.top, self.weight,
            blocks.expert_of, blocks.row_of, blocks.used, out, partial, counter,
            pairs, self.limit,
            N=w.outputs, K=w.inputs, IN=x.shape[1], OUT=width, ROW=w.row, EACH=w.each,
            SCALE_EACH=w.scale_each, KIND=w.kind, CODES=self.order(w), PAIRS=per, GATED=gated,
            ROUND=self.rounding and after is not None, ORDER=self.order(after) if after else 1,
            M=tile.rows, W=tile.columns,
            DEPTH=tile.depth if deep else min(tile.depth, BLOCK.value),
            PIECE=piece, SPLIT=split, num_warps=tile.warps,
            num_stages=tile.stages if x.dtype == torch.bfloat16 else 1,
        )  # fmt: skip
        return out


def prepared(x: Tensor, ids: Tensor, blocks: Blocks, order: int, rounding: bool) -> Tensor:
    """As `Products.prepared`; x itself where a product takes it as it is."""
    (rows, k), e = x.shape, blocks.experts
    width, columns, out = padded(k), 1, x
    if order == 1 and not rounding:
        rows = 0
    else:
        columns = triton.cdiv(width, PREPARED * BLOCK.value)
        out = x.new_empty(rows, width)
    prepare[(triton.cdiv(e, columns) + rows, columns)](
        x, out, ids, blocks.expert_of, blocks.row_of, blocks.used, ids.numel(),
        K=k, OUT=width, ORDER=order, ROUND=rounding, BLOCKS=PREPARED,
        E=e, EXPERTS=triton.next_power_of_2(e), M=blocks.rows, CHUNK=CHUNK, STAGES=STAGES,
        num_warps=4,
    )  # fmt: skip
    return out


def _experts(
    x: Tensor,
    ids: Tensor,
    weight: Tensor,
    w1: Operand,
    w3: Operand,
    w2: Operand,
    limit: float,
    rounding: bool,
    also: Tensor | None,
) -> Tensor:
    (tokens, k), d = ids.shape, x.shape[1]
    require(x, also)
    products = Products.of(ids, weight, w1, limit, rounding)
    h = products.multiply(products.prepared(x, w1), w1, w3, k, w2)
    y = products.multiply(h, w2, w2, 1)
    out = torch.empty_like(x)
    add_pairs[(tokens, triton.cdiv(d, COLUMNS))](
        y, products.ids, y if also is None else also, out,
        E=len(w1.data), D=d, K=k, ALSO=also is not None, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
    return out
