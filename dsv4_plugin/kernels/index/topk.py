"""Triton: the k best of a row's scores, lower entry first among equals.

Scores become unsigned integers of their order; which is the least to be taken is found digit by
digit. A program that has the whole row in registers does it alone, a bit at a time. Of few rows, or
long ones, every CHUNK scores have a program: four launches count digits of 8 bits among the scores
that begin as the threshold does, each program its own, and the next launch's all add the counts up;
the fifth writes what is taken, behind what the chunks before have. Programs meet nowhere, and no
count is left over for the next launch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_plugin.kernels.launch import pick, require
from dsv4_plugin.kernels.programmatic import follow, kernel

BLOCKS = (1024, 4096, 16384)
"""How many scores a program looks at that has a whole row: the least that holds it."""


@dataclass(frozen=True)
class Launch:
    """Up to `rows` rows go in chunks where they have more than `least` scores; all do that are
    longer than BLOCKS[-1]. Chunks are small up to `long` scores; warps of a chunk."""

    rows: int
    least: int
    long: int
    small_chunk: int
    chunk: int
    warps: int

    def chunk_of(self, n: int) -> int:
        return self.small_chunk if n <= self.long else self.chunk


# measured, an H200, one row, with counts added up by atomics: 14 us of 16,384 in chunks of 512,
# 24 us of 262,144 in chunks of 2,048; 64 rows are as fast with a program each
LAUNCHES = {"any": Launch(32, 4096, 1 << 16, 512, 2048, 8)}


@triton.jit
def _ordered(x, real):
    """float32 as uint32 of the same order, -0.0 as 0.0; 0, which no number is, where not real."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000
    return tl.where(real, order, 0)


@triton.jit
def _store_rest(out, taken, K: tl.constexpr, KP: tl.constexpr):
    """-1 in the places that are left over."""
    rest = tl.arange(0, KP)
    tl.store(out + rest, tl.full((KP,), -1, tl.int32), mask=(rest >= taken) & (rest < K))


@triton.jit
def _best(score, seen, out, BLOCK: tl.constexpr, K: tl.constexpr, KP: tl.constexpr):
    """The K best of the first `seen` scores, at most BLOCK."""
    i = tl.arange(0, BLOCK)
    real = i < seen
    order = _ordered(tl.load(score + i, mask=real, other=0.0), real)
    # The largest threshold that at least K scores reach, bit by bit.
    threshold = tl.full((), 0, tl.uint32)
    for step in range(32):
        trial = threshold | (tl.full((), 1, tl.uint32) << (31 - step))
        reach = tl.sum((order >= trial).to(tl.int32), 0)
        threshold = tl.where(reach >= K, trial, threshold)
    above = order > threshold
    tied = (order == threshold) & real
    room = K - tl.sum(above.to(tl.int32), 0)
    take = above | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= room))
    place = tl.cumsum(take.to(tl.int32), 0) - 1
    tl.store(out + place, i, mask=take)
    _store_rest(out, tl.sum(take.to(tl.int32), 0), K, KP)


@kernel(do_not_specialize=["stride", "n"])
def choose_best(
    score, position, out, stride, n, K: tl.constexpr, KP: tl.constexpr, RATIO: tl.constexpr,
    BLOCK: tl.constexpr, SMALL: tl.constexpr,
):  # fmt: skip
    """Program (row). One of at most SMALL scores takes a shorter way."""
    follow()
    t = tl.program_id(0).to(tl.int64)
    seen = tl.minimum((tl.load(position + t) + 1) // RATIO, n)
    if seen <= SMALL:
        _best(score + t * stride, seen, out + t * K, SMALL, K, KP)
    elif BLOCK > SMALL:
        _best(score + t * stride, seen, out + t * K, BLOCK, K, KP)


@triton.jit
def _counts(counts, chunks, GROUP: tl.constexpr):
    """int32 [256]: those of the first `chunks` chunks together."""
    b = tl.arange(0, 256)
    total = tl.zeros((256,), tl.int32)
    for first in range(0, chunks, GROUP):
        c = first + tl.arange(0, GROUP)
        at = counts + c[:, None] * 256 + b[None, :]
        total += tl.sum(tl.load(at, mask=(c < chunks)[:, None], other=0), 0)
    return total


@triton.jit
def _threshold(counts, state, chunks, need, PASS: tl.constexpr, GROUP: tl.constexpr):
    """What PASS passes have found: the first digits of the least score to take, and how many to
    take of those that begin so. counts: of the pass before; state: what the one before that had."""
    prefix = tl.full((), 0, tl.uint32)
    if PASS > 0:
        if PASS > 1:
            prefix = tl.load(state + 2 * (PASS - 1)).to(tl.uint32, bitcast=True)
            need = tl.load(state + 2 * (PASS - 1) + 1)
        b = tl.arange(0, 256)
        h = _counts(counts, chunks, GROUP)
        reach = tl.sum(h, 0) - tl.cumsum(h, 0) + h
        digit = tl.sum((reach >= need).to(tl.int32), 0) - 1
        need -= tl.sum(tl.where(b > digit, h, 0), 0)
        prefix = (prefix << 8) | digit.to(tl.uint32)
    return prefix, need


@kernel(do_not_specialize=["stride", "n"])
def count_digits(
    score, position, counts, above, state, stride, n, K: tl.constexpr, RATIO: tl.constexpr,
    CHUNK: tl.constexpr, SMALL: tl.constexpr, GROUP: tl.constexpr, PASS: tl.constexpr,
):  # fmt: skip
    """Program (row, chunk): how often each value of digit PASS is there among the scores that begin
    as the threshold does; in the last pass, also how many begin above it."""
    follow()
    t = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1)
    places = tl.num_programs(1)
    seen = tl.minimum((tl.load(position + t) + 1) // RATIO, n)
    if (seen <= SMALL) | (p * CHUNK >= seen):
        return
    before = counts + (2 * t + (PASS + 1) % 2) * places * 256
    chunks = tl.cdiv(seen, CHUNK)
    prefix, need = _threshold(before, state + 8 * t, chunks, tl.minimum(seen, K), PASS, GROUP)
    if p == 0:
        tl.store(state + 8 * t + 2 * PASS, prefix.to(tl.int32, bitcast=True))
        tl.store(state + 8 * t + 2 * PASS + 1, need)
    i = p * CHUNK + tl.arange(0, CHUNK)
    real = i < seen
    order = _ordered(tl.load(score + t * stride + i, mask=real, other=0.0), real)
    equal = real
    if PASS > 0:
        equal = real & ((order >> (32 - 8 * PASS)) == prefix)
    digit = ((order >> (24 - 8 * PASS)) & 255).to(tl.int32)
    mine = (2 * t + PASS % 2) * places + p
    tl.store(counts + mine * 256 + tl.arange(0, 256), tl.histogram(digit, 256, mask=equal))
    if PASS == 3:
        larger = real & ((order >> 8) > prefix)
        tl.store(above + t * places + p, tl.sum(larger.to(tl.int32), 0))


@kernel(do_not_specialize=["stride", "n"])
def write_chosen(
    score, position, counts, above, state, out, stride, n, K: tl.constexpr, KP: tl.constexpr,
    RATIO: tl.constexpr, CHUNK: tl.constexpr, SMALL: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Program (row, chunk): its entries among the K best, behind those of the chunks before. A row
    of at most SMALL scores was not counted, and is chosen here."""
    follow()
    t = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1)
    places = tl.num_programs(1)
    seen = tl.minimum((tl.load(position + t) + 1) // RATIO, n)
    row = score + t * stride
    if seen <= SMALL:
        if p == 0:
            _best(row, seen, out + t * K, SMALL, K, KP)
        return
    if p * CHUNK >= seen:
        return
    if p == 0:
        _store_rest(out + t * K, seen, K, KP)
    last = counts + (2 * t + 1) * places * 256
    chunks = tl.cdiv(seen, CHUNK)
    least, room = _threshold(last, state + 8 * t, chunks, tl.minimum(seen, K), 4, GROUP)
    b = tl.arange(0, 256)
    digit = (least & 255).to(tl.int32)
    h = _counts(last, p, GROUP)
    tied_before = tl.sum(tl.where(b == digit, h, 0), 0)
    above_before = tl.sum(tl.where(b > digit, h, 0), 0)
    for first in range(0, p, GROUP):
        c = first + tl.arange(0, GROUP)
        above_before += tl.sum(tl.load(above + t * places + c, mask=c < p, other=0), 0)
    i = p * CHUNK + tl.arange(0, CHUNK)
    real = i < seen
    order = _ordered(tl.load(row + i, mask=real, other=0.0), real)
    tied = real & (order == least)
    left = room - tied_before
    take = (real & (order > least)) | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= left))
    start = above_before + tl.minimum(tied_before, room)
    tl.store(out + t * K + start + tl.cumsum(take.to(tl.int32), 0) - 1, i, mask=take)


def topk(score: Tensor, position: Tensor, ratio: int, k: int) -> Tensor:
    """As in `reference`."""
    t, n = score.shape
    require(position)
    assert score.stride(1) == 1
    out = torch.empty((t, k), dtype=torch.int32, device=score.device)
    if t == 0:
        return out
    launch = pick(LAUNCHES)
    shape = {"K": k, "RATIO": ratio, "SMALL": BLOCKS[0]}
    wide = {"KP": triton.next_power_of_2(k)}
    if n <= BLOCKS[-1] and (n <= launch.least or t > launch.rows):
        block = next(b for b in BLOCKS if b >= n)
        choose_best[(t,)](
            score, position, out, score.stride(0), n, BLOCK=block, **shape, **wide,
            num_warps=16 if block > 4096 else 4,
        )  # fmt: skip
        return out
    chunk = launch.chunk_of(n)
    chunks = triton.cdiv(n, chunk)
    counts = torch.empty((t, 2, chunks, 256), dtype=torch.int32, device=score.device)
    above = torch.empty((t, chunks), dtype=torch.int32, device=score.device)
    state = torch.empty((t, 4, 2), dtype=torch.int32, device=score.device)
    shape |= {"CHUNK": chunk, "GROUP": 32, "num_warps": launch.warps}
    given = score, position, counts, above, state
    for digit in range(4):
        count_digits[(t, chunks)](*given, score.stride(0), n, PASS=digit, **shape)
    write_chosen[(t, chunks)](*given, out, score.stride(0), n, **shape, **wide)
    return out
