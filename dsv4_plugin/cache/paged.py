"""Cache rows as a kernel finds them: through an engine's block table."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_plugin.cache.rows import RowPool


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

    @classmethod
    def of_nothing(cls, strides: tuple[int, int, int], device: torch.device) -> BlockTables:
        """Of a request without rows, with the strides of all others."""
        one = torch.zeros(1, 1, dtype=torch.int32, device=device)
        return cls(one, one, one[0], *strides)


@dataclass(frozen=True)
class Paged:
    """Row i of request b starts at word table[b, i // rows] * stride + offset + i % rows * words
    of the pool's storage; -1 in the table marks a block the engine has taken back.

    table: int [B, n]; stride, offset in words; rows per block.
    """

    pool: RowPool
    table: Tensor
    stride: int
    offset: int
    rows: int

    def read(self, request: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Rows float32 [..., width] of requests [...] at indices int64 [...], and which exist;
        a row of index -1 or in no block is zero."""
        last = self.table.shape[1] - 1
        block = self.table.long()[request.long(), (index // self.rows).clamp(0, last)]
        found = (index >= 0) & (block >= 0)
        address = block * self.stride + self.offset + index % self.rows * self.pool.codec.words
        rows = self.pool.read(address.where(found, self.offset), torch.float32)
        return rows.where(found[..., None], 0.0), found
