"""Inputs of kernel tests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dsv4_plugin.cache.layout import CacheLayout
from dsv4_plugin.cache.paged import BlockTables
from dsv4_plugin.cache.step import Step
from dsv4_plugin.kernels.step import Rows
from dsv4_plugin.kernels.step.reference import place
from lab.kit import mode


def angles(tokens: int, rope: int) -> Tensor:
    """(cos, sin) pairs of random angles: float32 [tokens, rope]."""
    angle = 7 * torch.rand(tokens, rope // 2)
    return torch.stack([angle.cos(), angle.sin()], -1).flatten(1)


def poisoned(words: int) -> Tensor:
    """A cache of NaN that nobody wrote."""
    return torch.full((words,), 0x7FC0BEEF, dtype=torch.int32)


def untouched(words: int) -> Tensor:
    """A cache of zeros that takes memory only where it is written."""
    if mode.DEVICE != "cpu":
        return torch.zeros(words, dtype=torch.int32, device=mode.DEVICE)
    return torch.from_numpy(np.zeros(words, np.int32))


def step_of(counts: list[int], before: list[int], caches: Caches, rows: int | None = None) -> Step:
    """A step of requests that bring `counts` tokens after `before` ones, blocks strewn about."""
    start = torch.nn.functional.pad(torch.tensor(counts).cumsum(0), (1, 0)).int()
    lengths = (torch.tensor(before) + torch.tensor(counts)).int()
    rows = rows or int(start[-1])
    tables = caches.tables
    found = Rows(
        torch.zeros(rows, dtype=torch.int32),
        torch.zeros(rows, dtype=torch.int32),
        torch.zeros(rows, dtype=torch.int64),
        torch.zeros(4, rows, dtype=torch.int32),
    )
    grains = torch.tensor((1, 1, 4, 128), dtype=torch.int32)
    place(tables, start, lengths, caches.layout.window_block, caches.window_words, grains, found)
    pairs = caches.rope // 2
    frequency = 10000.0 ** -(torch.arange(pairs) / pairs)
    angle = found.angles_at[..., None] * frequency
    cis = torch.stack([angle.cos(), angle.sin()], -1).flatten(2)
    return Step(
        layout=caches.layout,
        position=found.position,
        request=found.request,
        window_write=found.window_write,
        query_start=start,
        seq_lens=lengths,
        cis={0: cis[0], 4: cis[1], 128: cis[1]},
        entry_cis={4: cis[2], 128: cis[3]},
        tables=tables,
        longest_query=max(counts),
        longest=int(lengths.max()),
    )


@dataclass(frozen=True)
class Caches:
    """Poisoned storage of one layer of each kind, and block tables with holes beyond `pages`."""

    layout: CacheLayout
    rope: int
    tables: BlockTables
    window: Tensor
    page: Tensor
    ring: Tensor

    @property
    def window_words(self) -> int:
        return self.layout.window.parts["kv"].codec.words

    @classmethod
    def of(cls, layout: CacheLayout, ratio: int, rope: int, requests: int, pages: int) -> Caches:
        """Room for `pages` pages of each request; layers of another kind lie between blocks."""
        gap = 6
        blocks = pages * layout.page_size // layout.window_block
        page_words = layout.page[ratio].words + gap
        ring_words = layout.ring[ratio].words + gap
        window_words = layout.window.words + gap
        shuffled = torch.randperm(requests * pages).view(requests, pages).int()
        table = torch.cat([shuffled, torch.full((requests, 2), -1, dtype=torch.int32)], 1)
        tables = BlockTables(
            window=torch.randperm(requests * blocks).view(requests, blocks).int(),
            page=table,
            ring=torch.randperm(requests).int(),
            window_stride=window_words,
            page_stride=page_words,
            ring_stride=ring_words,
        )
        return cls(
            layout,
            rope,
            tables,
            poisoned(requests * blocks * window_words),
            poisoned(requests * pages * page_words),
            poisoned(requests * ring_words),
        )
