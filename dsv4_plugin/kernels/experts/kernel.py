"""Triton: the routed experts, every step of a fixed shape and nothing asked of the device.

`count_pairs` and `sort_pairs` put the (token, expert) pairs into blocks of one expert each; there
is room for as many blocks as the shapes allow, and programs of those that stay empty leave at once.
`multiply_experts` runs twice, for the gated and for the down product, each pair's result in a row
of its own; `add_pairs` adds a token's rows in the order of its choices. So a token's result does
not depend on its company.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_plugin.kernels.packed import Matrix
from dsv4_plugin.kernels.packed.kernel import (
    DEPTH,
    Operand,
    multiply,
    operand,
    plain,
    round_inputs,
    tile_for,
)

CHUNK = 1024
"""Pairs that a program looks at together while it counts or sorts."""
COLUMNS = 1024
"""Columns that a program of `add_pairs` adds."""

ALIGNED = 4
"""Numbers of 4 bytes up to the next address that Triton calls aligned."""


@triton.jit(do_not_specialize=["pairs"])
def count_pairs(ids, counts, pairs, CHUNK: tl.constexpr):
    """Program e: counts int32 [E], the pairs of its expert."""
    e = tl.program_id(0)
    mine = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, pairs, CHUNK):
        at = start + tl.arange(0, CHUNK)
        mine += (tl.load(ids + at, mask=at < pairs, other=-1) == e).to(tl.int32)
    tl.store(counts + e, tl.sum(mine, 0))


@triton.jit(do_not_specialize=["pairs"])
def sort_pairs(
    ids,
    counts,
    expert_of,
    row_of,
    used,
    pairs,
    E: tl.constexpr,
    EXPERTS: tl.constexpr,
    M: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Program e writes its expert's blocks: expert_of int32 [B], e; row_of int32 [B * M], pairs in
    order, then -1; used int32 [1], the blocks of all experts. Pairs of no expert have no block."""
    e = tl.program_id(0)
    number = tl.arange(0, EXPERTS)
    blocks = (tl.load(counts + number, mask=number < E, other=0) + (M - 1)) // M
    first = tl.sum(tl.where(number < e, blocks, 0), 0)
    last = tl.sum(tl.where(number <= e, blocks, 0), 0)
    if e == 0:
        tl.store(used, tl.sum(blocks, 0))
    for block in range(first, last):
        tl.store(expert_of + block, e)
    next_row = first * M
    for start in range(0, pairs, CHUNK):
        at = start + tl.arange(0, CHUNK)
        mine = tl.load(ids + at, mask=at < pairs, other=-1) == e
        place = next_row + tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(row_of + place, at, mask=mine)
        next_row += tl.sum(mine.to(tl.int32), 0)
    rest = next_row + tl.arange(0, M)
    tl.store(row_of + rest, -1, mask=rest < last * M)


@triton.jit
def multiply_experts(
    x,
    w1,
    scale1,
    top1,
    w3,
    scale3,
    top3,
    weight,
    expert_of,
    row_of,
    used,
    out,
    x_stride,
    limit,
    N: tl.constexpr,
    K: tl.constexpr,
    ROW: tl.constexpr,
    EACH: tl.constexpr,
    SCALE_EACH: tl.constexpr,
    KIND: tl.constexpr,
    PAIRS: tl.constexpr,
    GATED: tl.constexpr,
    M: tl.constexpr,
    W: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Program (block, output tile): out [pair, N] = x [pair / PAIRS] times its expert's w1; if
    GATED, the clamped SwiGLU of that and of w3's, times the pair's weight."""
    block = tl.program_id(0)
    if block >= tl.load(used):
        return
    e = tl.load(expert_of + block).to(tl.int64)
    pair = tl.load(row_of + block * M + tl.arange(0, M))
    real = pair >= 0
    pair = tl.where(real, pair, 0)
    start = x + (pair // PAIRS).to(tl.int64) * x_stride
    n = tl.program_id(1) * W + tl.arange(0, W)
    gate, up = multiply(
        start, real, w1 + e * EACH, scale1 + e * SCALE_EACH, top1 + e,
        w3 + e * EACH, scale3 + e * SCALE_EACH, top3 + e,
        n, N, K, ROW, KIND, 128, GATED, DEPTH,
    )  # fmt: skip
    if GATED:
        # Rounded as a product of torch is.
        gate = tl.minimum(gate.to(x.dtype.element_ty).to(tl.float32), limit)
        up = up.to(x.dtype.element_ty).to(tl.float32)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        share = tl.load(weight + pair, mask=real, other=0.0)
        gate = gate / (1.0 + tl.exp(-gate)) * up * share[:, None]
    at = out + pair.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(at, gate, mask=real[:, None] & (n < N)[None, :])


@triton.jit
def add_pairs(
    y,
    ids,
    out,
    E: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Program (token, columns): the sum of its pairs' rows y [T * K, D], float32, one by one."""
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for i in tl.static_range(K):
        id = tl.load(ids + t * K + i)
        here = (id >= 0) & (id < E)
        total += tl.load(y + (t * K + i) * D + d, mask=here & (d < D), other=0.0).to(tl.float32)
    tl.store(out + t * D + d, total, mask=d < D)


def experts(
    x: Tensor, ids: Tensor, weight: Tensor, w13: Tensor, w2: Tensor, limit: float
) -> Tensor:
    gate, up = w13.chunk(2, -1)
    return _experts(x, ids, weight, plain(gate), plain(up), plain(w2), limit, False)


def packed_experts(
    x: Tensor,
    ids: Tensor,
    weight: Tensor,
    w1: Matrix,
    w3: Matrix,
    w2: Matrix,
    limit: float,
    rounding: bool,
) -> Tensor:
    return _experts(x, ids, weight, operand(w1), operand(w3), operand(w2), limit, rounding)


def blocks_of(pairs: int, experts: int, rows: int) -> int:
    """Most blocks of `rows` rows that so many pairs can fall into."""
    return (pairs + min(pairs, experts) * (rows - 1)) // rows


@dataclass(frozen=True)
class Blocks:
    """What `sort_pairs` fills; most: the number of blocks that there is room for."""

    used: Tensor
    row_of: Tensor
    expert_of: Tensor
    most: int


def sort(ids: Tensor, experts: int, rows: int) -> Blocks:
    """ids [T, k], contiguous, into blocks of `rows` pairs of one expert each."""
    pairs = ids.numel()
    most = blocks_of(pairs, experts, rows)
    plan = torch.empty(ALIGNED + most * (rows + 1), dtype=torch.int32, device=ids.device)
    used, row_of, expert_of = plan.split([ALIGNED, most * rows, most])
    counts = torch.empty(experts, dtype=torch.int32, device=ids.device)
    count_pairs[(experts,)](ids, counts, pairs, CHUNK=CHUNK, num_warps=4)
    sort_pairs[(experts,)](
        ids, counts, expert_of, row_of, used, pairs,
        E=experts, EXPERTS=triton.next_power_of_2(experts), M=rows, CHUNK=CHUNK, num_warps=4,
    )  # fmt: skip
    return Blocks(used, row_of, expert_of, most)


def _experts(
    x: Tensor,
    ids: Tensor,
    weight: Tensor,
    w1: Operand,
    w3: Operand,
    w2: Operand,
    limit: float,
    rounding: bool,
) -> Tensor:
    n_experts, (tokens, k) = len(w1.data), ids.shape
    pairs, d = tokens * k, x.shape[1]
    tile = tile_for(pairs // n_experts)
    assert x.stride(1) == 1
    ids, weight = ids.contiguous(), weight.contiguous()
    plan = sort(ids, n_experts, tile.rows)

    def multiply(x: Tensor, w: Operand, too: Operand, per: int) -> Tensor:
        x = round_inputs(x) if rounding else x
        out = x.new_empty(pairs, w.outputs)
        multiply_experts[(plan.most, triton.cdiv(w.outputs, tile.columns))](
            x, w.data, w.scale, w.top, too.data, too.scale, too.top, weight,
            plan.expert_of, plan.row_of, plan.used, out, x.stride(0), limit,
            N=w.outputs, K=w.inputs, ROW=w.row, EACH=w.each, SCALE_EACH=w.scale_each, KIND=w.kind,
            PAIRS=per, GATED=too is not w, M=tile.rows, W=tile.columns, DEPTH=DEPTH,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return out

    y = multiply(multiply(x, w1, w3, k), w2, w2, 1)
    out = torch.empty_like(x)
    add_pairs[(tokens, triton.cdiv(d, COLUMNS))](
        y, ids, out, E=n_experts, D=d, K=k, COLUMNS=COLUMNS, num_warps=4
    )
    return out
