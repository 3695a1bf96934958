"""Builds a step's metadata: a launch and a few torch operations, without a host sync.

All results live in buffers made once, so that a captured graph finds them where they were.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_plugin.cache.layout import CacheLayout
from dsv4_plugin.cache.paged import BlockTables
from dsv4_plugin.cache.step import Step
from dsv4_plugin.config import CSA, SWA, ModelConfig
from dsv4_plugin.kernels.dispatch import implementation, use_triton
from dsv4_plugin.kernels.rope import frequencies


@dataclass(frozen=True)
class Rows:
    """Buffers `place` fills: int32 [T], int32 [T], int64 [T], and int32 [K, T]: positions whose
    rotary factors are wanted, row k rounded down to a multiple of grains[k]."""

    position: Tensor
    request: Tensor
    window_write: Tensor
    angles_at: Tensor


class StepBuilder:
    """Computes steps of at most `rows` rows for one model and cache layout.

    Raises ValueError where kernels are Triton's and the layout's rows are not theirs.
    """

    def __init__(
        self, config: ModelConfig, layout: CacheLayout, rows: int, device: torch.device | str
    ) -> None:
        self.layout, self.rows = layout, rows
        self.ratios = sorted(layout.page)
        grains = (1, *([1] if self.ratios else []), *self.ratios)
        kinds = [SWA] + [CSA] * (len(grains) - 1)
        frequency = torch.stack([frequencies(config, kind) for kind in kinds])
        self.frequency = frequency[:, None].to(device)
        self.grains = torch.tensor(grains, dtype=torch.int32, device=device)
        self.buffers = Rows(
            position=torch.zeros(rows, dtype=torch.int32, device=device),
            request=torch.zeros(rows, dtype=torch.int32, device=device),
            window_write=torch.zeros(rows, dtype=torch.int64, device=device),
            angles_at=torch.zeros(rows * len(grains), dtype=torch.int32, device=device),
        )
        size = len(grains) * rows * config.qk_rope_head_dim
        self.cis = torch.zeros(size, dtype=torch.float32, device=device)
        if use_triton(self.cis.device):
            layout.require_kernel_rows()
            from dsv4_plugin.kernels import arrival

            arrival.prepare(self.cis.device)

    def window_cis(self, position: Tensor) -> Tensor:
        """Of rows that no step places: int [T] -> float32 [T, rope_dim], as `Step.cis` of SWA."""
        angle = position.float()[:, None] * self.frequency[0]
        return torch.stack([angle.cos(), angle.sin()], -1).flatten(1)

    def build(
        self,
        tables: BlockTables,
        query_start: Tensor,
        seq_lens: Tensor,
        rows: int,
        longest_query: int,
        longest: int,
        together: bool = False,
    ) -> Step:
        """
        Args:
            tables: block numbers of every request, int32 or int64.
            query_start: int [B + 1], first row of each request in the flat batch.
            seq_lens: int [B], length of each request after this step; padding requests bring no
                rows.
            rows: rows of the batch, padding included.
            longest_query, longest: most rows and most tokens that a request may have.
            together: requests bring blocks of longest_query rows, which see one another.
        """
        if rows > self.rows:
            raise ValueError(f"a step has {rows} rows; room is for {self.rows}")
        kinds, pairs = len(self.grains), self.frequency.shape[-1]
        found = Rows(
            self.buffers.position[:rows],
            self.buffers.request[:rows],
            self.buffers.window_write[:rows],
            self.buffers.angles_at[: kinds * rows].view(kinds, rows),
        )
        words = self.layout.window.parts["kv"].codec.words
        implementation(__name__, query_start.device).place(
            tables, query_start, seq_lens, self.layout.window_block, words, self.grains, found
        )
        cis = self.cis[: kinds * rows * 2 * pairs].view(kinds, rows, pairs, 2)
        angle = found.angles_at.float()[..., None] * self.frequency
        torch.stack([angle.cos(), angle.sin()], -1, out=cis)
        cis = cis.flatten(2)
        return Step(
            layout=self.layout,
            tables=tables,
            query_start=query_start,
            seq_lens=seq_lens,
            position=found.position,
            request=found.request,
            window_write=found.window_write,
            cis={SWA: cis[0]} | dict.fromkeys(self.ratios, cis[1] if self.ratios else cis[0]),
            entry_cis=dict(zip(self.ratios, cis[2:], strict=True)),
            longest_query=longest_query,
            longest=longest,
            together=longest_query if together else 0,
        )
