"""Batches of the local engine whose steps are the device's."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from dsv4_plugin.cache.device_step import DeviceStepBuilder
from dsv4_plugin.cache.step import BlockTables
from dsv4_plugin.engine import Batch

PADDING = 3


class DeviceBatch(Batch):
    """A batch whose steps are the device's, with rows of padding."""

    def _step(self, requests, counts):
        self.lengths[requests] += counts
        t, chosen = self.tables, requests.to(self.device)
        tables = BlockTables(
            t.window[chosen].int(), t.page[chosen].int(), t.ring[chosen].int(),
            t.window_stride, t.page_stride, t.ring_stride,
        )  # fmt: skip
        start = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
        rows = int(start[-1]) + PADDING
        builder = DeviceStepBuilder(self.model.config, self.builder.layout, rows, self.device)
        lengths = self.lengths[requests]
        longest = int(lengths.max()), int(counts.max())
        on_device = start.to(self.device), lengths.int().to(self.device)
        return builder.build(tables, *on_device, rows, longest[1], longest[0])

    def run(self, work, within=nullcontext):
        requests = torch.tensor([b for b, _ in work])
        counts = torch.tensor([len(ids) for _, ids in work])
        step = self._step(requests, counts)
        ids = torch.cat([*(ids for _, ids in work), torch.zeros(PADDING, dtype=torch.int64)])
        with within():
            return self.model(ids.to(self.device), step, self.caches)[:-PADDING]
