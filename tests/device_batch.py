"""Batches of the local engine with rows of padding, as an engine's captured graphs have."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from dsv4_plugin.batch import Batch
from dsv4_plugin.kernels.step import StepBuilder

PADDING = 3


class DeviceBatch(Batch):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        build, layout = self.builder.build, self.builder.layout
        self.builder = StepBuilder(
            self.model.config, layout, self.builder.rows + PADDING, self.device
        )
        build = self.builder.build
        self.builder.build = lambda *given: build(*given[:3], given[3] + PADDING, *given[4:])

    def run(self, work, within=nullcontext):
        requests = torch.tensor([b for b, _ in work])
        counts = torch.tensor([len(ids) for _, ids in work])
        step = self.step(requests, counts)
        ids = torch.cat([*(ids for _, ids in work), torch.zeros(PADDING, dtype=torch.int64)])
        with within():
            return self.model(ids.to(self.device), step, self.caches)[:-PADDING]
