"""Where every row of a step is, from block tables and lengths."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_plugin.cache.paged import BlockTables
from dsv4_plugin.kernels.step import Rows


def place(
    tables: BlockTables,
    query_start: Tensor,
    seq_lens: Tensor,
    window_block: int,
    row_words: int,
    grains: Tensor,
    rows: Rows,
) -> None:
    """Fill `rows` from query_start [B + 1] and seq_lens [B]; see `Step`. grains: int32 [K]."""
    row = torch.arange(len(rows.position), device=query_start.device)
    ends = query_start[1:].long()
    request = torch.searchsorted(ends, row, right=True).clamp(max=len(ends) - 1)
    real = row < ends[-1]
    request = request.where(real, 0)
    position = seq_lens.long()[request] - ends[request] + row
    rows.position.copy_(position.where(real, -1))
    rows.request.copy_(request)
    position = position.where(real, 0)
    number = tables.window[request, position // window_block].long()
    address = number * tables.window_stride + position % window_block * row_words
    rows.window_write.copy_(address.where(real & (number >= 0), -1))
    rows.angles_at.copy_(position // grains[:, None] * grains[:, None])
