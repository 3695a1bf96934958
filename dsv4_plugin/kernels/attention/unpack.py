"""fp8 rows unpacked to bfloat16, for steps whose queries read the same rows many times.

e4m3 codes times powers of two are exact in bfloat16, so who reads unpacked rows reads the same
values. They lie side by side, request after request: the window rows that the step's queries see,
then all entries. To attention this is a pool of bfloat16 rows like a cache, whose tables have one
block a request.

The host knows bounds of lengths. Where all requests' rows have room by these, and pay, all are
unpacked. Else each request says so on the device: in a step of prompts among decoded rows it is the
prompts' that are unpacked, and attention takes a launch for these and one for the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_plugin.cache.paged import Paged
from dsv4_plugin.cache.rows import BFloat16Rows, RowPool
from dsv4_plugin.cache.step import Step
from dsv4_plugin.kernels.attention.keys import (
    aligned,
    decode_quarter,
    find_blocks,
    find_places,
    find_rows,
    load_quarter,
    part,
)
from dsv4_plugin.kernels.programmatic import follow, kernel

UNPACKED_BYTES = 1 << 28
"""Most of the unpacked rows of a layer: where they would take more, rows are read as they are."""
ROWS, WARPS = 16, 4
"""Of a tile of `unpack`, and of its program."""
PROGRAMS = 2048
"""That share the tiles of a launch, about."""
ONE_BLOCK = 1 << 30
"""Rows of a block that has all of a request's."""
ALL = 1 << 30
"""Choices where every entry is chosen."""
COUNTS = (
    "window_last", "window_tables", "entries_last", "entries_tables", "room", "before", "choices",
)  # fmt: skip
"""Arguments whose values are not compiled in."""


@triton.jit
def _needs(
    query_start, seq_lens, who, real, choices, least, SPAN: tl.constexpr, RATIO: tl.constexpr
):
    """Of requests `who`: the first position that their rows see, how many of the window, how many
    entries; the latter two are 0 where unpacking does not pay."""
    begins = tl.load(query_start + who, mask=real, other=0).to(tl.int32)
    ends = tl.load(query_start + who + 1, mask=real, other=0).to(tl.int32)
    length = tl.load(seq_lens + who, mask=real, other=0).to(tl.int32)
    count = ends - begins
    first = tl.maximum(length - count - (SPAN - 1), 0)
    near = length - first
    seen = length // RATIO
    read = tl.minimum(length, SPAN) + tl.minimum(seen, choices)
    pays = count.to(tl.float32) * read.to(tl.float32) >= least * (near + seen).to(tl.float32)
    pays = pays & (count > 0)
    return first, tl.where(pays, near, 0), tl.where(pays, seen, 0)


@kernel(do_not_specialize=COUNTS)
def unpack(
    query_start, seq_lens, window, window_last, window_tables, entries, entries_last,
    entries_tables, out, starts, room, before, choices, least,
    NOPE: tl.constexpr, ROPE: tl.constexpr, W: tl.constexpr, WORDS: tl.constexpr,
    ALIGN: tl.constexpr, SPAN: tl.constexpr, WINDOW_ROWS: tl.constexpr, ENTRY_ROWS: tl.constexpr,
    RATIO: tl.constexpr, ROWS: tl.constexpr, THREADS: tl.constexpr, REQUESTS: tl.constexpr,
):  # fmt: skip
    """Program (request, share of its tiles). out: bfloat16 rows, `room` of them. starts: int32
    [B, 2], which of them are the request's position 0, plus `before`, and its entry 0; -1 where
    they are not unpacked, since they are read less than `least` times, or have no room."""
    follow()
    D: tl.constexpr = NOPE + ROPE
    who = tl.program_id(0).to(tl.int64)
    to_window = 0
    for begin in range(0, tl.program_id(0), REQUESTS):
        other = begin + tl.arange(0, REQUESTS)
        earlier = other < tl.program_id(0)
        _, near, seen = _needs(query_start, seq_lens, other, earlier, choices, least, SPAN, RATIO)
        to_window += tl.sum(near + seen)
    first, front, seen = _needs(query_start, seq_lens, who, True, choices, least, SPAN, RATIO)
    to_entries = to_window + front
    some = (front > 0) & (to_entries + seen <= room)
    if tl.program_id(1) == 0:
        tl.store(starts + 2 * who, tl.where(some, to_window - first + before, -1))
        tl.store(starts + 2 * who + 1, tl.where(some, to_entries, -1))
    # (Triton unpacks no tuples.)
    window += (window_last, window_tables)
    entries += (entries_last, entries_tables)
    near_tiles = tl.cdiv(front, ROWS)
    tiles = tl.where(some, near_tiles + tl.cdiv(seen, ROWS), 0)
    for tile in tl.range(tl.program_id(1), tiles, tl.num_programs(1)):
        near = tile < near_tiles
        at = tl.where(near, tile, tile - near_tiles) * ROWS
        left = tl.where(near, front, seen) - at
        first_row = tl.where(near, first, 0) + at
        index = find_places(near, first_row, left, 0, 0, False, ROWS, THREADS)
        block = find_blocks(near, index, window, entries, who, WINDOW_ROWS, ENTRY_ROWS)
        address = find_rows(
            near, index, block, window, entries, WINDOW_ROWS, ENTRY_ROWS, WORDS, ROWS, THREADS
        )
        stored = ()  # type: tuple[object, ...]
        for quarter in tl.static_range(4):
            stored += (load_quarter(address, quarter, NOPE, ROPE, W, True, ALIGN),)
        i = tl.arange(0, ROWS)
        row = out + (tl.where(near, to_window, to_entries) + at + i).to(tl.int64) * D
        for quarter in tl.static_range(4):
            x = decode_quarter(stored[quarter], quarter, NOPE, W, True)
            dim = quarter * W + tl.arange(0, W)
            real = (i < left)[:, None] & (dim < D)[None, :]
            tl.store(row[:, None] + dim[None, :], x, mask=real)


@dataclass(frozen=True)
class Unpacked:
    """Rows as attention reads them. starts: of requests that are not unpacked, [:, 0] is -1; every
    request that brings rows is where `all` says so."""

    window: Paged
    entries: Paged
    starts: Tensor
    all: bool


def unpacked(
    step: Step, window: Paged, span: int, entries: Paged | None, ratio: int, rope: int,
    choices: int, least: float,
) -> Unpacked | None:  # fmt: skip
    """The rows that the step's queries see, in bfloat16; None where that cannot pay.

    choices: entries that a query reads of those it sees, at most. least: how often a row has to be
    read, on average.
    """
    n, requests = len(step.position), len(step.seq_lens)
    codec = BFloat16Rows(window.pool.codec.width)
    most = step.longest // ratio
    reads = n * (min(span, step.longest) + min(most, choices))
    bound = n + requests * (span - 1 + most)
    limit = UNPACKED_BYTES // (4 * codec.words)
    fits = bound <= limit and reads >= least * bound
    if not fits and reads < least * (n + span - 1 + most):
        return None
    room = bound if fits else min(bound, limit, int(reads / least))
    storage = torch.empty(room * codec.words, dtype=torch.int32, device=window.table.device)
    starts = torch.empty((requests, 2), dtype=torch.int32, device=window.table.device)
    either = window if entries is None else entries
    front = min(n, step.longest_query) + span - 1
    tiles = triton.cdiv(front, ROWS) + triton.cdiv(most, ROWS)
    unpack[(requests, min(tiles, triton.cdiv(PROGRAMS, requests)))](
        step.query_start, step.seq_lens, *part(window), *part(either),
        storage.view(torch.bfloat16), starts, room, step.longest, choices, 0.0 if fits else least,
        NOPE=codec.width - rope, ROPE=rope, W=max(16, triton.next_power_of_2(codec.width) // 4),
        WORDS=window.pool.codec.words, ALIGN=aligned(window, either), SPAN=span,
        WINDOW_ROWS=window.rows, ENTRY_ROWS=either.rows, RATIO=ratio, ROWS=ROWS,
        THREADS=32 * WARPS // ROWS, REQUESTS=32 * WARPS, num_warps=WARPS,
    )  # fmt: skip
    pool = RowPool(storage, codec)
    # A block's number is not negative; position 0 may lie before the first row that is seen.
    plain = Paged(pool, starts[:, :1], codec.words, -step.longest * codec.words, ONE_BLOCK)
    rows = plain if entries is None else Paged(pool, starts[:, 1:], codec.words, 0, ONE_BLOCK)
    return Unpacked(plain, rows, starts, fits)
