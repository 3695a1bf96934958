"""Builds `DeviceStep`s: one launch and four torch operations, without a host sync.

All results live in buffers made once, so that a captured graph finds them where they were.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_plugin.cache.layout import CacheLayout
from dsv4_plugin.config import CSA, SWA, ModelConfig
from dsv4_plugin.kernels import dispatch, step
from dsv4_plugin.kernels.rope import Rope
from dsv4_plugin.kernels.step import BlockTables, DeviceStep, Rows


class DeviceStepBuilder:
    """Computes steps of at most `rows` rows for one model and cache layout.

    Args of `build`:
        tables: block numbers of every request, int32 or int64.
        query_start: int [B + 1], first row of each request in the flat batch.
        seq_lens: int [B], length of each request after this step; padding requests bring no rows.
        rows: rows of the batch, padding included.
        longest_query, longest: most rows and most tokens that a request may have.
    """

    def __init__(
        self, config: ModelConfig, layout: CacheLayout, rows: int, device: torch.device | str
    ) -> None:
        self.layout = layout
        self.ratios = sorted(layout.page)
        self.grains = (1, *([1] if self.ratios else []), *self.ratios)
        kinds = [SWA] + [CSA] * (len(self.grains) - 1)
        frequency = torch.stack([Rope(config, kind).frequency for kind in kinds])
        self.frequency = frequency[:, None].to(device)
        self.device_grains = torch.tensor(self.grains, dtype=torch.int32, device=device)
        self.buffers = Rows(
            position=torch.zeros(rows, dtype=torch.int32, device=device),
            request=torch.zeros(rows, dtype=torch.int32, device=device),
            window_write=torch.zeros(rows, dtype=torch.int64, device=device),
            angles_at=torch.zeros(rows * len(self.grains), dtype=torch.int32, device=device),
        )
        size = len(self.grains) * rows * config.qk_rope_head_dim
        self.cis = torch.zeros(size, dtype=torch.float32, device=device)
        if dispatch.use_triton(self.cis.device):
            from dsv4_plugin.kernels import arrival

            arrival.prepare(self.cis.device)

    def build(
        self,
        tables: BlockTables,
        query_start: Tensor,
        seq_lens: Tensor,
        rows: int,
        longest_query: int,
        longest: int,
    ) -> DeviceStep:
        if rows > len(self.buffers.position):
            raise ValueError(f"a step has {rows} rows; room is for {len(self.buffers.position)}")
        kinds, pairs = len(self.grains), self.frequency.shape[-1]
        buffers = Rows(
            self.buffers.position[:rows],
            self.buffers.request[:rows],
            self.buffers.window_write[:rows],
            self.buffers.angles_at[: kinds * rows].view(kinds, rows),
        )
        self._place(tables, query_start, seq_lens, buffers)
        cis = self.cis[: kinds * rows * 2 * pairs].view(kinds, rows, pairs, 2)
        angle = buffers.angles_at.float()[..., None] * self.frequency
        torch.stack([angle.cos(), angle.sin()], -1, out=cis)
        cis = cis.flatten(2)
        compressed = range(2, kinds)
        return DeviceStep(
            position=buffers.position,
            request=buffers.request,
            window_write=buffers.window_write,
            query_start=query_start,
            seq_lens=seq_lens,
            cis={SWA: cis[0]} | dict.fromkeys(self.ratios, cis[1] if self.ratios else cis[0]),
            entry_cis={self.grains[k]: cis[k] for k in compressed},
            tables=tables,
            longest_query=longest_query,
            longest=longest,
        )

    def _place(
        self, tables: BlockTables, query_start: Tensor, seq_lens: Tensor, rows: Rows
    ) -> None:
        part = self.layout.window.parts["kv"]
        block, words = self.layout.window_block, part.codec.words
        if dispatch.use_triton(query_start.device):
            from dsv4_plugin.kernels.step.kernel import place

            place(tables, query_start, seq_lens, block, words, self.device_grains, rows)
        else:
            step.reference(tables, query_start, seq_lens, block, words, self.grains, rows)
