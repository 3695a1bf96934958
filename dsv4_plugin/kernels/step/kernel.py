"""One launch that finds every row's request, position and window slot."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dsv4_plugin.cache.paged import BlockTables
from dsv4_plugin.kernels.launch import require
from dsv4_plugin.kernels.programmatic import follow, kernel
from dsv4_plugin.kernels.step import Rows

BLOCK = 128
ENDS = 32
"""Requests that a row is compared with at once. To count those that end before it takes one wait
for memory where there are few, and loads are ahead where there are more; a search would wait for
each of its loads."""


@kernel(do_not_specialize=["rows", "requests", "table_stride"])
def place_rows(
    query_start,
    seq_lens,
    window,
    position_out,
    request_out,
    write_out,
    angles_out,
    grains,
    rows,
    requests,
    table_stride,
    block_stride,
    WINDOW_BLOCK: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    KINDS: tl.constexpr,
    KINDS_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    ENDS: tl.constexpr,
):
    follow()
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    kind = tl.arange(0, KINDS_BLOCK)[:, None]
    grain = tl.load(grains + kind, mask=kind < KINDS, other=1)
    request = tl.zeros((BLOCK,), tl.int32)
    for first in tl.range(0, requests, ENDS, num_stages=4):  # as many as end at or before the row
        who = first + tl.arange(0, ENDS)
        ends = tl.load(query_start + who + 1, mask=who < requests, other=rows).to(tl.int32)
        request += tl.sum((ends[None, :] <= row[:, None]).to(tl.int32), 1)
    real = inside & (request < requests)
    request = tl.where(real, request, 0)
    end = tl.load(query_start + request + 1, mask=real, other=0).to(tl.int32)
    length = tl.load(seq_lens + request, mask=real, other=0).to(tl.int32)
    position = tl.where(real, length - end + row, 0)
    at = window + request.to(tl.int64) * table_stride + position // WINDOW_BLOCK
    number = tl.load(at, mask=real, other=-1).to(tl.int64)
    address = number * block_stride + position % WINDOW_BLOCK * ROW_WORDS
    tl.store(position_out + row, tl.where(real, position, -1), mask=inside)
    tl.store(request_out + row, request, mask=inside)
    tl.store(write_out + row, tl.where(number >= 0, address, -1), mask=inside)
    angles = position[None, :] // grain * grain
    at = kind * rows + row[None, :]
    tl.store(angles_out + at, angles, mask=inside[None, :] & (kind < KINDS))


def place(
    tables: BlockTables,
    query_start: Tensor,
    seq_lens: Tensor,
    window_block: int,
    row_words: int,
    grains: Tensor,
    rows: Rows,
) -> None:
    """As in `reference`."""
    n, requests = len(rows.position), len(seq_lens)
    require(query_start, seq_lens, rows.position, rows.request, rows.window_write, rows.angles_at)
    assert tables.window.stride(1) == 1
    place_rows[(triton.cdiv(n, BLOCK),)](
        query_start, seq_lens, tables.window,
        rows.position, rows.request, rows.window_write, rows.angles_at, grains,
        n, requests, tables.window.stride(0), tables.window_stride,
        WINDOW_BLOCK=window_block, ROW_WORDS=row_words, KINDS=len(grains),
        KINDS_BLOCK=triton.next_power_of_2(len(grains)), BLOCK=BLOCK, ENDS=ENDS, num_warps=4,
    )  # fmt: skip
