"""fp8 rows unpacked to bfloat16, for steps whose queries read the same rows many times.

e4m3 codes times powers of two are exact in bfloat16, so who reads unpacked rows reads the same
values. They lie side by side, request after request: first the window rows that the step's queries
see, then room for as many entries as the longest request may have. To attention this is a pool of
bfloat16 rows like a cache, whose tables have one block a request.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsv4_plugin.cache.paged import Paged
from dsv4_plugin.cache.rows import BFloat16Rows, RowPool
from dsv4_plugin.cache.step import Step
from dsv4_plugin.kernels.attention.keys import aligned, find_rows, load_quarter, part

UNPACKED_BYTES = 1 << 28
"""Most of the unpacked rows of a layer: where they would take more, rows are read as they are."""
ROWS, WARPS = 16, 4
"""Of a tile of `unpack`, and of its program."""
PROGRAMS = 2048
"""That share the tiles of a launch, about."""
ONE_BLOCK = 1 << 30
"""Rows of a block that has all of a request's."""
COUNTS = (
    "window_last", "window_tables", "entries_last", "entries_tables", "first_entry", "room",
    "before",
)  # fmt: skip
"""Arguments whose values are not compiled in."""


@triton.jit(do_not_specialize=COUNTS)
def unpack(
    query_start, seq_lens, window, window_last, window_tables, entries, entries_last,
    entries_tables, out, starts, first_entry, room, before,
    NOPE: tl.constexpr, ROPE: tl.constexpr, W: tl.constexpr, WORDS: tl.constexpr,
    ALIGN: tl.constexpr, SPAN: tl.constexpr, WINDOW_ROWS: tl.constexpr, ENTRY_ROWS: tl.constexpr,
    RATIO: tl.constexpr, ROWS: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Program (request, share of its tiles). out: bfloat16 rows. starts: int32 [B, 2], which of
    them are the request's position 0, plus `before`, and its entry 0."""
    D: tl.constexpr = NOPE + ROPE
    who = tl.program_id(0).to(tl.int64)
    begins = tl.load(query_start + who).to(tl.int32)
    count = tl.load(query_start + who + 1).to(tl.int32) - begins
    if count == 0:
        return
    length = tl.load(seq_lens + who).to(tl.int32)
    first = tl.maximum(length - count - (SPAN - 1), 0)
    seen = length // RATIO if RATIO > 0 else 0 * length
    to_window = begins + tl.program_id(0) * (SPAN - 1)
    to_entries = first_entry + tl.program_id(0) * room
    if tl.program_id(1) == 0:
        tl.store(starts + 2 * who, to_window - first + before)
        tl.store(starts + 2 * who + 1, to_entries)
    near_tiles = tl.cdiv(length - first, ROWS)
    tiles = near_tiles + tl.cdiv(seen, ROWS)
    for tile in tl.range(tl.program_id(1), tiles, tl.num_programs(1)):
        near = tile < near_tiles
        at = tl.where(near, tile, tile - near_tiles) * ROWS
        left = tl.where(near, length - first, seen) - at
        address = find_rows(
            near,
            window + (window_last, window_tables),  # noqa: RUF005  (Triton unpacks no tuples)
            entries + (entries_last, entries_tables),  # noqa: RUF005
            who, tl.where(near, first, 0) + at, left, starts, 0,
            WINDOW_ROWS, ENTRY_ROWS, WORDS, False, ROWS, THREADS,
        )  # fmt: skip
        i = tl.arange(0, ROWS)
        row = out + (tl.where(near, to_window, to_entries) + at + i).to(tl.int64) * D
        for quarter in tl.static_range(4):
            x = load_quarter(address, quarter, NOPE, ROPE, W, True, ALIGN)
            dim = quarter * W + tl.arange(0, W)
            real = (i < left)[:, None] & (dim < D)[None, :]
            tl.store(row[:, None] + dim[None, :], x, mask=real)


def reads(step: Step, span: int, ratio: int, most: int) -> float:
    """How often queries read a row, on average and at least. most: entries that a query reads."""
    near = min(span, step.longest)
    rows = _window_rows(step, span) + len(step.seq_lens) * (step.longest // ratio if ratio else 0)
    return len(step.position) * (near + most) / rows


def _window_rows(step: Step, span: int) -> int:
    """Room for them: a request's own, and those that the first of these sees."""
    return len(step.position) + len(step.seq_lens) * (span - 1)


def unpacked(
    step: Step, window: Paged, span: int, entries: Paged | None, ratio: int, rope: int
) -> tuple[Paged, Paged | None] | None:
    """The rows that the step's queries see, in bfloat16; None where they would take more than
    UNPACKED_BYTES."""
    d, requests = window.pool.codec.width, len(step.seq_lens)
    codec, near = BFloat16Rows(d), _window_rows(step, span)
    room = 0 if entries is None else step.longest // ratio
    rows = near + requests * room
    if rows * 4 * codec.words > UNPACKED_BYTES:
        return None
    device = window.table.device
    storage = torch.empty(rows * codec.words, dtype=torch.int32, device=device)
    starts = torch.empty((requests, 2), dtype=torch.int32, device=device)
    most = min(len(step.position), step.longest_query) + span - 1
    tiles = triton.cdiv(most, ROWS) + triton.cdiv(room, ROWS)
    shares = min(tiles, triton.cdiv(PROGRAMS, requests))
    either = window if entries is None else entries
    unpack[(requests, shares)](
        step.query_start, step.seq_lens, *part(window), *part(either),
        storage.view(torch.bfloat16), starts, near, room, step.longest,
        NOPE=d - rope, ROPE=rope, W=max(16, triton.next_power_of_2(d) // 4),
        WORDS=window.pool.codec.words, ALIGN=aligned(window, either),
        SPAN=span, WINDOW_ROWS=window.rows, ENTRY_ROWS=either.rows, RATIO=ratio, ROWS=ROWS,
        THREADS=32 * WARPS // ROWS, num_warps=WARPS,
    )  # fmt: skip
    pool = RowPool(storage, codec)
    # A block's number is not negative; position 0 may lie before the first row that is seen.
    plain = Paged(pool, starts[:, :1], codec.words, -step.longest * codec.words, ONE_BLOCK)
    if entries is None:
        return plain, None
    return plain, Paged(pool, starts[:, 1:], codec.words, 0, ONE_BLOCK)
