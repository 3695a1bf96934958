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
SEARCH = 16
"""Halvings that find a row's request among 65,535."""


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
    SEARCH: tl.constexpr,
    WINDOW_BLOCK: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    KINDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    follow()
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    real = inside & (row < tl.load(query_start + requests).to(tl.int32))
    low = tl.zeros((BLOCK,), tl.int32)
    high = low + requests
    for _ in range(SEARCH):  # the last request that starts at or before the row and is not empty
        middle = (low + high) // 2
        start = tl.load(query_start + middle, mask=real, other=0).to(tl.int32)
        low = tl.where(start <= row, middle, low)
        high = tl.where(start > row, middle, high)
    request = tl.where(real, low, 0)
    end = tl.load(query_start + request + 1, mask=real, other=0).to(tl.int32)
    length = tl.load(seq_lens + request, mask=real, other=0).to(tl.int32)
    position = tl.where(real, length - end + row, 0)
    at = window + request.to(tl.int64) * table_stride + position // WINDOW_BLOCK
    number = tl.load(at, mask=real, other=-1).to(tl.int64)
    address = number * block_stride + position % WINDOW_BLOCK * ROW_WORDS
    tl.store(position_out + row, tl.where(real, position, -1), mask=inside)
    tl.store(request_out + row, request, mask=inside)
    tl.store(write_out + row, tl.where(number >= 0, address, -1), mask=inside)
    for k in tl.static_range(KINDS):
        grain = tl.load(grains + k)
        tl.store(angles_out + k * rows + row, position // grain * grain, mask=inside)


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
    assert requests < 1 << SEARCH
    place_rows[(triton.cdiv(n, BLOCK),)](
        query_start, seq_lens, tables.window,
        rows.position, rows.request, rows.window_write, rows.angles_at, grains,
        n, requests, tables.window.stride(0), tables.window_stride,
        SEARCH=SEARCH,
        WINDOW_BLOCK=window_block, ROW_WORDS=row_words, KINDS=len(grains), BLOCK=BLOCK,
        num_warps=4,
    )  # fmt: skip
