"""Triton: the k best of a row's scores, lower entry first among equals.

Scores become unsigned integers of their order. A program has up to a block of them in its registers
and halves the range in which the least to be taken lies: a step counts those above the middle. Few
steps do: the range begins between the largest score and the least of the best of k groups, and ends
as soon as exactly k reach its lower end.

A longer row is chosen from in rounds: the best of each block, in order of their entries, are what
the next round chooses from. Whoever is among a row's best is among its block's, ties included.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_plugin.kernels.launch import pick, require
from dsv4_plugin.kernels.programmatic import follow, kernel

BLOCKS = (1024, 4096, 16384)
"""How many scores a program looks at: the least that holds a row, or else the most."""


@dataclass(frozen=True)
class Launch:
    """values: scores that a thread has, at least. warps: of a program, at most."""

    values: int
    warps: int


# guessed: counting takes two instructions of each score, however many warps share them; fewer add
# their counts up sooner
LAUNCHES = {"any": Launch(16, 16)}


@triton.jit
def _ordered(x, real, FIRST: tl.constexpr):
    """float32 as uint32 of the same order, -0.0 as 0.0; 0, which no number is, where not real. The
    first round's are handed on as int32."""
    if FIRST:
        bits = (x + 0.0).to(tl.int32, bitcast=True)
        x = (bits ^ ((bits >> 31) & 0x7FFFFFFF)) ^ -0x80000000
    return tl.where(real, x.to(tl.uint32, bitcast=True), 0)


@triton.jit
def _least(order, seen, K: tl.constexpr, KP: tl.constexpr):
    """(least, room): what is above `least` is among the K best of `seen`, and so is the first
    `room` of what equals it."""
    BLOCK: tl.constexpr = order.shape[0]
    GROUPS: tl.constexpr = min(KP, BLOCK)
    best = tl.max(tl.reshape(order, (BLOCK // GROUPS, GROUPS)), 0)
    # Each group has one that reaches `low`, which makes K at least; none is above `high`.
    low = tl.where(seen > K, tl.min(best, 0), 0)
    high = tl.where(seen > K, tl.max(best, 0), 0)
    reach = tl.full((), K + 1, tl.int32)
    above = tl.full((), 0, tl.int32)
    while (low < high) & (reach != K):
        middle = high - (high - low) // 2
        count = tl.sum((order >= middle).to(tl.int32), 0)
        enough = count >= K
        reach = tl.where(enough, count, reach)
        above = tl.where(enough, above, count)
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    alone = (reach == K) | (seen <= K)  # Exactly those from `low` on, or all.
    return tl.where(reach == K, low - 1, low), tl.where(alone, 0, K - above)


@triton.jit
def _quarters(x):
    """Each fourth of the values [4 N], from the first on, from the second, ...: four times [N]."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0] // 4, 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _best(
    score, entry, begin, seen, out, keys, BLOCK: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    ALIGN: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """The K best of the row's scores `begin` .. `seen` - 1, BLOCK at most."""
    i = begin + tl.arange(0, BLOCK)
    real = i < seen
    whole = i < (seen + ALIGN - 1) // ALIGN * ALIGN  # vectors
    order = _ordered(tl.load(score + i, mask=whole, other=0), real, FIRST)
    least, room = _least(order, seen - begin, K, KP)
    found = i if FIRST else tl.load(entry + i, mask=whole, other=0)
    # A thread has four neighbours at a time. One scan counts those above in the upper half of its
    # words, those tied in the lower.
    orders, entries = _quarters(order), _quarters(found)
    counts = tl.zeros_like(entries[0])
    for j in tl.static_range(4):
        counts += tl.where(orders[j] > least, 65536, (orders[j] == least).to(tl.int32))
    before = tl.cumsum(counts, 0) - counts
    ties = before & 65535
    place = (before >> 16) + tl.minimum(ties, room)
    for j in tl.static_range(4):
        tied = orders[j] == least
        take = (orders[j] > least) | (tied & (ties < room))
        tl.store(out + place, entries[j], mask=take)
        if not LAST:
            tl.store(keys + place, orders[j].to(tl.int32, bitcast=True), mask=take & (seen > BLOCK))
        ties += tied.to(tl.int32)
        place += take.to(tl.int32)


@kernel(do_not_specialize=["stride", "next_stride", "n"])
def choose_best(
    score, entry, position, out, next_key, next_entry, stride, next_stride, n, K: tl.constexpr,
    KP: tl.constexpr, RATIO: tl.constexpr, SMALL: tl.constexpr, MIDDLE: tl.constexpr,
    BLOCK: tl.constexpr, FULL: tl.constexpr, ALIGN: tl.constexpr, ROUND: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    """Program (row, block): its K best, for the next round where the row has more blocks. Rows of
    few scores take shorter ways. FULL: the block of the rounds before. LAST: the last round, in
    which no row has more than a block."""
    follow()
    t = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1)
    seen = tl.minimum((tl.load(position + t) + 1) // RATIO, n)
    is_chosen = False
    for _ in tl.static_range(ROUND):
        is_chosen = seen <= FULL
        seen = seen // FULL * K + tl.minimum(seen % FULL, K)
    if is_chosen | ((p > 0) & (p * BLOCK >= seen)):
        return
    row = tl.multiple_of(t * stride, ALIGN)
    to = out + t * K
    place = t * next_stride + p * K
    if seen > BLOCK:
        to = next_entry + place
    rest = tl.arange(0, KP)
    tl.store(to + rest, tl.full((KP,), -1, tl.int32), mask=(rest >= seen) & (rest < K))
    first: tl.constexpr = ROUND == 0
    score += row
    entry += row
    if seen <= SMALL:
        _best(score, entry, 0, seen, to, next_key, SMALL, K, KP, ALIGN, first, True)
    elif (BLOCK > SMALL) & (seen <= MIDDLE):
        _best(score, entry, 0, seen, to, next_key, MIDDLE, K, KP, ALIGN, first, True)
    elif BLOCK > MIDDLE:
        _best(
            score, entry, p * BLOCK, seen, to, next_key + place, BLOCK, K, KP, ALIGN, first, LAST
        )  # fmt: skip


def topk(score: Tensor, position: Tensor, ratio: int, k: int) -> Tensor:
    """As in `reference`.

    Raises:
        ValueError: of a row longer than a block more are to be chosen than half a block, so that
            rounds would not end.
    """
    t, n = score.shape
    if n > BLOCKS[-1] and k > BLOCKS[-1] // 2:
        most = BLOCKS[-1] // 2
        raise ValueError(
            f"index_topk is {k}; of {n} entries the Triton indexer chooses at most {most}"
        )
    require(position)
    assert score.stride(1) == 1
    out = torch.empty((t, k), dtype=torch.int32, device=score.device)
    if t == 0:
        return out
    launch = pick(LAUNCHES)
    key, entry, left, done = score, out, n, 0
    while done == 0 or left > k:
        # Later rounds take the largest, whatever is left: fewer variants are compiled.
        block = next((b for b in BLOCKS if b >= left and not done), BLOCKS[-1])
        chunks = triton.cdiv(left, block)
        width = triton.cdiv(chunks * k, 4) * 4  # Pointers stay aligned.
        next_key, next_entry = (out, out) if chunks == 1 else out.new_empty((2, t, width))
        choose_best[(t, chunks)](
            key, entry, position, out, next_key, next_entry, key.stride(0), next_key.stride(0), n,
            K=k, KP=triton.next_power_of_2(k), RATIO=ratio, SMALL=BLOCKS[0], MIDDLE=BLOCKS[1],
            BLOCK=block, FULL=BLOCKS[-1], ALIGN=gcd(key.stride(0), 4), ROUND=done,
            LAST=chunks == 1, num_warps=min(max(4, block // (32 * launch.values)), launch.warps),
        )  # fmt: skip
        key, entry, left, done = next_key, next_entry, chunks * k, done + 1
    return out
