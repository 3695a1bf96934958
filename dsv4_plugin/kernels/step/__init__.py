"""The metadata of a step as flat tensors on the device, of fixed shapes and without a host sync.

Kernels follow block tables themselves; what is computed here is what every layer needs alike.

Shapes: T rows of the batch, padding included; B requests; n blocks of a table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockTables:
    """What the engine knows: block numbers per request, and the words from one block to the next.

    window, page: int [B, n]; ring: int [B]. On a GPU they may be int32; -1 marks no block.
    """

    window: Tensor
    page: Tensor
    ring: Tensor
    window_stride: int
    page_stride: int
    ring_stride: int


@dataclass(frozen=True)
class DeviceStep:
    """Rows that are padding have position -1 and request 0; nothing is written for them.

    position, request: int32 [T]. window_write: int64 [T], the word address of each row's window
    entry, -1 for none. query_start: int [B + 1], first row of each request; seq_lens: int [B],
    lengths after this step. cis: by ratio, float32 [T, rope_dim], (cos, sin) pairs at the row's
    position; entry_cis: the same at the first position of the window of `ratio` tokens it is in.
    longest_query, longest: most rows, and most tokens, that a request may have (bounds; host).
    """

    position: Tensor
    request: Tensor
    window_write: Tensor
    query_start: Tensor
    seq_lens: Tensor
    cis: dict[int, Tensor]
    entry_cis: dict[int, Tensor]
    tables: BlockTables
    longest_query: int
    longest: int


@dataclass(frozen=True)
class Rows:
    """Buffers `place` fills: int32 [T], int32 [T], int64 [T], and int32 [K, T]: positions whose
    rotary factors are wanted, row k rounded down to a multiple of grains[k]."""

    position: Tensor
    request: Tensor
    window_write: Tensor
    angles_at: Tensor


def reference(
    tables: BlockTables,
    query_start: Tensor,
    seq_lens: Tensor,
    window_block: int,
    row_words: int,
    grains: tuple[int, ...],
    rows: Rows,
) -> None:
    """Fill `rows` from query_start [B + 1] and seq_lens [B]; see `DeviceStep`."""
    row = torch.arange(len(rows.position), device=query_start.device)
    ends = query_start[1:].long()
    request = torch.searchsorted(ends, row, right=True).clamp(max=len(ends) - 1)
    real = row < ends[-1]
    request = request.where(real, 0)
    position = seq_lens.long()[request] - ends[request] + row
    rows.position.copy_(position.where(real, -1))
    rows.request.copy_(request)
    position = position.where(real, 0)
    number = tables.window.long()[request, position // window_block]
    address = number * tables.window_stride + position % window_block * row_words
    rows.window_write.copy_(address.where(real & (number >= 0), -1))
    for k, grain in enumerate(grains):
        rows.angles_at[k].copy_(position // grain * grain)
