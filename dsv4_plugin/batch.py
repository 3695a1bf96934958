"""What an engine owes the network, in the least code: block tables and lengths per step.

Requests in flight, sampling, and memory for their caches; `engine` and `speculate` run on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from dsv4_plugin.cache.layer import LayerCache, bind_layers, block_words
from dsv4_plugin.cache.layout import CacheLayout
from dsv4_plugin.cache.paged import BlockTables
from dsv4_plugin.cache.step import Step
from dsv4_plugin.config import SWA
from dsv4_plugin.kernels.step import StepBuilder
from dsv4_plugin.model.transformer import Transformer

Draft = Literal["one", "block"]


class Sampler:
    def __init__(self, temperature: float, seed: int | None) -> None:
        if not temperature >= 0:
            raise ValueError(f"temperature is {temperature}; it must be 0 or more")
        self.temperature = temperature
        self.generator = torch.Generator()
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    def __call__(self, logits: Tensor) -> Tensor:
        if self.temperature == 0:
            return logits.argmax(-1)
        p = (logits.float().cpu() / self.temperature).softmax(-1)
        return p.multinomial(1, generator=self.generator)[:, 0]


class Batch:
    """Requests in flight, with block tables fixed from the start, where the model's weights are.

    Every request owns the pages of its final length, a ring, and as many window blocks as a step
    can touch, used in turn; draft layers have window rows of their own, and take at most
    `draft_rows` rows of a request at once. `poison` fills fresh caches with NaN, so that a stray
    read shows.
    """

    def __init__(
        self,
        model: Transformer,
        layout: CacheLayout,
        max_lengths: Sequence[int],
        chunk: int,
        poison: bool = False,
        draft_layers: int = 0,
        draft_rows: int = 1,
    ) -> None:
        self.model, self.chunk = model, chunk
        self.device = next(model.parameters()).device
        config, page_size = model.config, layout.page_size
        rows = max(chunk, len(max_lengths) * layout.ring_rows)
        self.builder = StepBuilder(config, layout, rows, self.device)
        self.draft_rows = max(rows, len(max_lengths) * draft_rows)
        n, longest = len(max_lengths), max(max_lengths)
        pages = -(-longest // page_size)
        turns = -(-(config.sliding_window - 1 + min(chunk, longest)) // layout.window_block) + 1
        ratios = [*model.ratios, *[SWA] * draft_layers]
        device = self.device
        buffers, strides = allocate(ratios, layout, n * turns, n * pages, n, poison, device)
        self.caches = buffers
        request = torch.arange(n, device=device)[:, None]
        blocks = torch.arange(-(-longest // layout.window_block), device=device)
        self.tables = BlockTables(
            window=request * turns + blocks % turns,
            page=request * pages + torch.arange(pages, device=device),
            ring=request[:, 0],
            window_stride=strides[0],
            page_stride=strides[1],
            ring_stride=strides[2],
        )
        self.lengths = torch.zeros(n, dtype=torch.int64)

    @cached_property
    def draft_builder(self) -> StepBuilder:
        """Of steps of draft layers; made when the first one drafts."""
        layout = self.builder.layout.windows_only()
        return StepBuilder(self.model.config, layout, self.draft_rows, self.device)

    def step(self, requests: Tensor, counts: Tensor, draft: Draft | None = None) -> Step:
        """The next `counts` tokens of some requests, int64 [G] each on the CPU; draft: of layers
        that draft, one after the other or in blocks."""
        self.lengths[requests] += counts
        t, chosen = self.tables, requests.to(self.device)
        tables = BlockTables(
            t.window[chosen], t.page[chosen], t.ring[chosen],
            t.window_stride, t.page_stride, t.ring_stride,
        )  # fmt: skip
        start, lengths = torch.nn.functional.pad(counts.cumsum(0), (1, 0)), self.lengths[requests]
        most = int(start[-1]), int(counts.max()), int(lengths.max())
        on_device = start.int().to(self.device), lengths.int().to(self.device)
        if draft is None:
            return self.builder.build(tables, *on_device, *most)
        return self.draft_builder.build(tables, *on_device, *most, together=draft == "block")

    def run(self, work: Sequence[tuple[int, Tensor]]) -> Tensor:
        """One step: the next ids of some requests -> hidden states of all of them, flat."""
        requests = torch.tensor([b for b, _ in work])
        counts = torch.tensor([len(ids) for _, ids in work])
        step = self.step(requests, counts)
        ids = torch.cat([ids for _, ids in work]).to(self.device)
        hidden: Tensor = self.model(ids, step, self.caches)
        return hidden

    def decode(self, requests: Sequence[int], token: Tensor) -> Tensor:
        """One token each -> hidden states [G, D]."""
        step = self.step(torch.tensor(requests), torch.ones(len(requests), dtype=torch.int64))
        hidden: Tensor = self.model(token.to(self.device), step, self.caches)
        return hidden

    def prefill(self, prompts: Sequence[Tensor]) -> Tensor:
        """Whole prompts, `chunk` tokens a step -> hidden state after each prompt [B, D]."""
        last: list[Tensor] = []
        queue = list(enumerate(prompts))
        while queue:
            work, room = [], self.chunk
            while queue and room:
                b, ids = queue.pop(0)
                work.append((b, ids[:room]))
                if len(ids) > room:
                    queue.insert(0, (b, ids[room:]))
                room -= len(work[-1][1])
            hidden = self.run(work)
            ends = torch.tensor([len(ids) for _, ids in work]).cumsum(0) - 1
            finished = ends[:-1] if queue and queue[0][0] == work[-1][0] else ends
            last.append(hidden[finished])
        return torch.cat(last)


def allocate(
    ratios: Sequence[int],
    layout: CacheLayout,
    windows: int,
    pages: int,
    rings: int,
    poison: bool,
    device: torch.device | str = "cpu",
) -> tuple[list[LayerCache], tuple[int, int, int]]:
    """Storage for all layers, one buffer per kind of block, layers side by side in a block."""

    def buffer(blocks: int, words: int) -> Tensor:
        nan = torch.tensor(float("nan")).view(torch.int32).item() if poison else 0
        return torch.full((blocks * words,), int(nan), dtype=torch.int32, device=device)

    strides = block_words(layout, ratios)
    counts = (windows, pages, rings)
    buffers = [buffer(n, w) for n, w in zip(counts, strides, strict=True)]
    return bind_layers(layout, ratios, *buffers), strides
