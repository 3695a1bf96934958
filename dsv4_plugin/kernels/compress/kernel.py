"""One launch: program (t, k) takes the segment that ends at row t through compressor k.

Only a request's first segments start from its ring, and only its last row may overwrite what they
read. So the program of the last row takes them too; all others find what they need in y.
A segment that reads a carry written in this launch is taken by the program that writes the carry.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_plugin.cache.step import Step
from dsv4_plugin.kernels.compress import State, Target
from dsv4_plugin.kernels.device import (
    exp,
    hadamard,
    inverse_rms,
    log,
    store_key_row,
    store_kv_row,
    sum_of_squares,
    tail_angles,
    turn,
)
from dsv4_plugin.kernels.launch import require
from dsv4_plugin.kernels.programmatic import follow, kernel
from dsv4_plugin.kernels.qkv.kernel import blocks_of

AHEAD = tl.constexpr(4)
"""Tokens of a window whose values are asked for before the first is used; half of them for CSA,
which has twice the values and would take the shared memory of other programs. (18 and 12 KiB)"""
SCAN = 256
"""Requests looked at once, for one that fills a page or starts behind it."""


@triton.jit
def _join(top, total, value, score, kv):
    """A state and one more token."""
    new_top = tl.maximum(top, score)
    old = exp(top - new_top)
    new = exp(score - new_top)
    return new_top, total * old + new, value * old + kv * new


@triton.jit
def _segment(
    window,
    first,
    row_of_first,
    end,
    cis,
    y,
    ape,
    weight,
    ring,
    page,
    page_table,
    page_stride,
    eps,
    BASE: tl.constexpr,
    D: tl.constexpr,
    ROPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEY: tl.constexpr,
    STAGES: tl.constexpr,
    OFFSET: tl.constexpr,
    WORDS: tl.constexpr,
    FORMAT: tl.constexpr,
    R: tl.constexpr,
    HALVES: tl.constexpr,
    C: tl.constexpr,
    PAGE: tl.constexpr,
    CARRY: tl.constexpr,
    RING_ROWS: tl.constexpr,
    RING_WORDS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """One window's tokens of this step, channels BASE .. BASE + D - 1 of each half."""
    at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    used = at < D
    channel = BASE + at
    begin = window * R
    start = tl.maximum(begin, first)
    middle = begin < first
    nothing = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    zero = tl.zeros((ROWS, COLUMNS), tl.float32)
    half = ring + (first + RING_ROWS - 1) % RING_ROWS * RING_WORDS + channel
    stored = (HALVES == 2) & (begin > 0) & (begin % PAGE == 0) & (begin == first)
    opened = tl.load(page_table + (begin - 1) // PAGE, mask=stored, other=0)
    shared_top = nothing
    shared_total = zero
    shared_value = zero
    if HALVES == 1:
        kept = used & middle
        top = tl.load(half, mask=kept, other=float("-inf"))
        total = tl.load(half + C, mask=kept, other=0.0)
        value = tl.load(half + 2 * C, mask=kept, other=0.0)
    else:
        paging = (begin >= first) & (begin > 0) & (begin % PAGE == 0)
        before = begin - R
        # In the middle of a window, or right after one that has no carry.
        began = (begin > 0) & (before < first)
        kept = used & ((middle | began) & ~stored)
        which = half + tl.where(middle, 3 * C, 0)
        top = tl.load(which, mask=kept, other=float("-inf"))
        total = tl.load(which + C, mask=kept, other=0.0)
        value = tl.load(which + 2 * C, mask=kept, other=0.0)
        kept = used & middle
        shared_top = tl.load(half, mask=kept, other=float("-inf"))
        shared_total = tl.load(half + C, mask=kept, other=0.0)
        shared_value = tl.load(half + 2 * C, mask=kept, other=0.0)
        for position in tl.range(tl.maximum(before, first), begin, disable_licm=True):
            row = (row_of_first + position - first).to(tl.int64)
            token = y + row * (2 * HALVES * C) + channel
            bias = ape + position % R * (HALVES * C) + channel
            score = tl.load(token + HALVES * C, mask=used, other=0.0).to(tl.float32)
            score += tl.load(bias, mask=used, other=0.0)
            kv = tl.load(token, mask=used, other=0.0).to(tl.float32)
            top, total, value = _join(top, total, value, score, kv)
        if paging:
            carry = page + opened.to(tl.int64) * page_stride + CARRY + channel
            lse = tl.load(carry.to(tl.pointer_type(tl.float32)), mask=used & stored, other=0.0)
            mean = tl.load(carry.to(tl.pointer_type(tl.float32)) + C, mask=used & stored, other=0.0)
            safe = tl.where(stored, 1.0, total)
            top = tl.where(stored, lse, top + log(safe))
            value = tl.where(stored, mean, tl.div_rn(value, safe))
            total = tl.full((ROWS, COLUMNS), 1.0, tl.float32)
    # What does not depend on the tokens is asked for before the window's, and before any barrier.
    w = tl.load(weight + at, mask=used, other=0.0)
    angles = tail_angles(cis, at, D - ROPE, D)
    number = tl.load(page_table + begin // PAGE, mask=begin + R <= end, other=-1).to(tl.int64)
    keep_all = end - first <= RING_ROWS
    tl.debug_barrier()  # every thread has read the ring
    for position in tl.range(
        start, tl.minimum(begin + R, end), disable_licm=True, num_stages=AHEAD // HALVES
    ):
        row = (row_of_first + position - first).to(tl.int64)
        token = y + row * (2 * HALVES * C) + channel
        bias = ape + position % R * (HALVES * C) + channel
        if HALVES == 2:
            score = tl.load(token + HALVES * C, mask=used, other=0.0).to(tl.float32)
            score += tl.load(bias, mask=used, other=0.0)
            kv = tl.load(token, mask=used, other=0.0).to(tl.float32)
            shared_top, shared_total, shared_value = _join(
                shared_top, shared_total, shared_value, score, kv
            )
        token += (HALVES - 1) * C
        bias += (HALVES - 1) * C
        score = tl.load(token + HALVES * C, mask=used, other=0.0).to(tl.float32)
        score += tl.load(bias, mask=used, other=0.0)
        kv = tl.load(token, mask=used, other=0.0).to(tl.float32)
        top, total, value = _join(top, total, value, score, kv)
        if keep_all | (position == end - 1):
            half = ring + position % RING_ROWS * RING_WORDS + channel
            if HALVES == 2:
                tl.store(half, shared_top, mask=used)
                tl.store(half + C, shared_total, mask=used)
                tl.store(half + 2 * C, shared_value, mask=used)
            half += (HALVES - 1) * 3 * C
            tl.store(half, top, mask=used)
            tl.store(half + C, total, mask=used)
            tl.store(half + 2 * C, value, mask=used)
    if number >= 0:
        x = tl.where(used, tl.div_rn(value, tl.where(used, total, 1.0)), 0.0)
        x = x.to(DTYPE).to(tl.float32)
        rms = inverse_rms(tl.sum(sum_of_squares(x, 1), 0), D, eps)
        x = (x * rms * w).to(DTYPE).to(tl.float32)
        x = turn(x, angles, at, D - ROPE, D).to(DTYPE).to(tl.float32)
        block = page + number * page_stride
        target = block + OFFSET + begin % PAGE // R * WORDS
        if KEY:
            if STAGES > 0:
                flat = hadamard(tl.reshape(x, (D,)), D, STAGES)
                x = tl.reshape(flat, (ROWS, COLUMNS))
            store_key_row(target, x, D, FORMAT)
        else:
            store_kv_row(target, x, D - ROPE, D, WORDS, FORMAT)
        if (HALVES == 2) & ((begin + R) % PAGE == 0):
            carry = (block + CARRY + channel).to(tl.pointer_type(tl.float32))
            safe = tl.where(used, shared_total, 1.0)
            tl.store(carry, shared_top + log(safe), mask=used)
            tl.store(carry + C, tl.div_rn(shared_value, safe), mask=used)


@triton.jit
def _rows_of(who, query_start, seq_lens, some):
    """The first position, the end and the row of the first of requests `who`; nothing elsewhere."""
    row = tl.load(query_start + who, mask=some, other=0).to(tl.int32)
    after = tl.load(query_start + who + 1, mask=some, other=0).to(tl.int32)
    end = tl.load(seq_lens + who, mask=some, other=0).to(tl.int32)
    return end - (after - row), end, row


@triton.jit
def _page_of(who, position, page_table, table_stride, some, PAGE: tl.constexpr):
    """The page of requests `who` at a position."""
    at = page_table + who.to(tl.int64) * table_stride + position // PAGE
    return tl.load(at, mask=some, other=-1)


@triton.jit
def _next_request(
    after,
    page,
    opens,
    query_start,
    seq_lens,
    page_table,
    table_stride,
    requests,
    FILLS: tl.constexpr,
    PAGE: tl.constexpr,
    SCAN: tl.constexpr,
):
    """The first request above `after` that in this step fills `page`, the one before position
    `opens` (FILLS), or whose rows begin right behind it; `requests` where there is none or page
    is -1."""
    found = requests
    for some in range(0, tl.where(page >= 0, requests, 0), SCAN):
        who = some + tl.arange(0, SCAN)
        real = who < requests
        first, end, _ = _rows_of(who, query_start, seq_lens, real)
        number = _page_of(who, opens - 1, page_table, table_stride, real, PAGE)
        fits = (first < opens) & (opens <= end) if FILLS else (first == opens) & (first < end)
        fits = fits & (number == page) & (who > after) & real
        found = tl.minimum(found, tl.min(tl.where(fits, who, requests), 0))
    return found


@triton.jit
def _take(
    window,
    who,
    first,
    end,
    row_of_first,
    ring_number,
    y,
    ape,
    kv_weight,
    key_weight,
    cis,
    page_table,
    ring,
    page,
    table_stride,
    ring_stride,
    page_stride,
    eps,
    D: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCKS: tl.constexpr,
    KEY_D: tl.constexpr,
    KEY_STAGES: tl.constexpr,
    KV_OFFSET: tl.constexpr,
    KV_WORDS: tl.constexpr,
    KV_FORMAT: tl.constexpr,
    KEY_OFFSET: tl.constexpr,
    KEY_WORDS: tl.constexpr,
    KEY_FORMAT: tl.constexpr,
    R: tl.constexpr,
    HALVES: tl.constexpr,
    C: tl.constexpr,
    PAGE: tl.constexpr,
    CARRY: tl.constexpr,
    RING_ROWS: tl.constexpr,
    RING_WORDS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """A window of request `who` through this program's compressor."""
    own_ring = ring + ring_number.to(tl.int64) * ring_stride
    own_table = page_table + who.to(tl.int64) * table_stride
    row = row_of_first + tl.minimum(window * R + R, end) - 1 - first
    angles = cis + row.to(tl.int64) * ROPE
    if tl.program_id(1) == 0:
        _segment(
            window, first, row_of_first, end, angles, y, ape, kv_weight,
            own_ring, page, own_table, page_stride, eps,
            0, D, ROPE, BLOCKS, 64, False, 0, KV_OFFSET, KV_WORDS, KV_FORMAT,
            R, HALVES, C, PAGE, CARRY, RING_ROWS, RING_WORDS, DTYPE,
        )  # fmt: skip
    elif HALVES == 2:
        _segment(
            window, first, row_of_first, end, angles, y, ape, key_weight,
            own_ring, page, own_table, page_stride, eps,
            D, KEY_D, ROPE, 1, KEY_D, True, KEY_STAGES, KEY_OFFSET, KEY_WORDS,
            KEY_FORMAT, R, HALVES, C, PAGE, CARRY, RING_ROWS, RING_WORDS, DTYPE,
        )  # fmt: skip


@kernel(do_not_specialize=["table_stride", "requests"])
def pool_and_write(
    y,
    ape,
    kv_weight,
    key_weight,
    cis,
    position,
    request,
    query_start,
    seq_lens,
    ring_table,
    page_table,
    ring,
    page,
    table_stride,
    ring_stride,
    page_stride,
    requests,
    eps,
    D: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCKS: tl.constexpr,
    KEY_D: tl.constexpr,
    KEY_STAGES: tl.constexpr,
    KV_OFFSET: tl.constexpr,
    KV_WORDS: tl.constexpr,
    KV_FORMAT: tl.constexpr,
    KEY_OFFSET: tl.constexpr,
    KEY_WORDS: tl.constexpr,
    KEY_FORMAT: tl.constexpr,
    R: tl.constexpr,
    HALVES: tl.constexpr,
    C: tl.constexpr,
    PAGE: tl.constexpr,
    CARRY: tl.constexpr,
    RING_ROWS: tl.constexpr,
    RING_WORDS: tl.constexpr,
    DTYPE: tl.constexpr,
    SCAN: tl.constexpr,
):
    follow()
    here = tl.load(position + tl.program_id(0))
    who = tl.load(request + tl.program_id(0))
    # What later steps need is loaded here, all at once; in the loops it would be waited for.
    first, end, row = _rows_of(who, query_start, seq_lens, here >= 0)
    own_ring = tl.load(ring_table + who)
    # A request's first HALVES windows may start from its ring: its last row takes them too.
    window = here // R
    begin = first // R
    early = begin + HALVES
    is_last = here == end - 1
    closes = ((here + 1) % R == 0) & (window >= early)
    stop = tl.where(is_last, tl.minimum(early, window), tl.where(closes, window, -1))
    stop = tl.where(here < 0, -1, stop)
    begin = tl.where(is_last, begin, window)
    if (HALVES == 2) & is_last & (stop >= 0) & (first > 0) & (first % PAGE == 0):
        before = _page_of(who, first - 1, page_table, table_stride, True, PAGE)
        filler = _next_request(
            -1, before, first, query_start, seq_lens, page_table, table_stride, requests,
            True, PAGE, SCAN,
        )  # fmt: skip
        begin += (filler < requests).to(tl.int32)
    for i in tl.range(begin, stop + 1, disable_licm=True):
        own = tl.where(i == stop, window, i)
        opens = own * R + R
        fills = (HALVES == 2) & (opens % PAGE == 0) & (opens <= end)
        full = _page_of(who, opens - 1, page_table, table_stride, fills, PAGE)
        # This segment and, where it fills a page, the first ones of requests that start behind it.
        taker, after = who, -1
        part, its_first, its_end, its_row, its_ring = own, first, end, row, own_ring
        while after < requests:
            _take(
                part, taker, its_first, its_end, its_row, its_ring, y, ape, kv_weight, key_weight,
                cis, page_table, ring, page, table_stride, ring_stride, page_stride, eps,
                D, ROPE, BLOCKS, KEY_D, KEY_STAGES, KV_OFFSET, KV_WORDS, KV_FORMAT, KEY_OFFSET,
                KEY_WORDS, KEY_FORMAT, R, HALVES, C, PAGE, CARRY, RING_ROWS, RING_WORDS, DTYPE,
            )  # fmt: skip
            tl.debug_barrier()  # every thread has written its part of the carry
            if HALVES == 1:  # There are no carries.
                after = requests
            else:
                after = _next_request(
                    after, full, opens, query_start, seq_lens, page_table, table_stride, requests,
                    False, PAGE, SCAN,
                )  # fmt: skip
                taker, part, some = after, own + 1, after < requests
                its_first, its_end, its_row = _rows_of(taker, query_start, seq_lens, some)
                its_ring = tl.load(ring_table + taker, mask=some, other=0)


def compress(
    y: Tensor,
    ape: Tensor,
    eps: float,
    step: Step,
    ratio: int,
    targets: list[Target],
    state: State,
    dtype: torch.dtype,
) -> None:
    kv, key = targets[0], targets[-1]
    d, key_d = kv.weight.numel(), key.weight.numel()
    halves, channels = y.shape[2:]
    require(y, ape, step.position, step.request, step.query_start, step.seq_lens)
    require(step.entry_cis[ratio], step.tables.ring)
    assert step.tables.page.stride(1) == 1
    cis = step.entry_cis[ratio]
    sizes = {
        "D": d, "ROPE": cis.shape[1], "BLOCKS": blocks_of(d), "KEY_D": key_d,
        "KEY_STAGES": key_d.bit_length() - 1 if key.rotate else 0,
        "KV_OFFSET": kv.offset, "KV_WORDS": kv.pool.codec.words,
        "KV_FORMAT": int(kv.pool.codec.format),
        "KEY_OFFSET": key.offset, "KEY_WORDS": key.pool.codec.words,
        "KEY_FORMAT": int(key.pool.codec.format),
        "R": ratio, "HALVES": halves, "C": channels, "PAGE": step.layout.page_size,
        "CARRY": state.carry_offset,
        "RING_ROWS": state.rows, "RING_WORDS": state.ring.codec.words,
        "DTYPE": tl.bfloat16 if dtype == torch.bfloat16 else tl.float32,
    }  # fmt: skip
    pool_and_write[(len(step.position), len(targets))](
        y, ape, kv.weight, key.weight, cis, step.position, step.request, step.query_start,
        step.seq_lens, step.tables.ring, step.tables.page,
        state.ring.storage.view(torch.float32), kv.pool.storage,
        step.tables.page.stride(0), step.tables.ring_stride, step.tables.page_stride,
        len(step.seq_lens), eps, **sizes, SCAN=SCAN, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
