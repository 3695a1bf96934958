"""Small worlds for kernel tests: pools of poisoned pages with holes, requests, queries."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dsv4_plugin.cache.paged import Paged
from dsv4_plugin.cache.rows import (
    BFloat16Rows,
    FP4IndexRows,
    FP8IndexRows,
    FP8KVRows,
    RowCodec,
    RowPool,
)
from dsv4_plugin.cache.step import TILED, Step
from lab.kernels.inputs import untouched
from lab.kit import mode

NAN = 0x7FC07FC0
"""As an int32 word: two bfloat16 NaN; as bytes, e4m3 codes of 448 and 240."""


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def kv_codec(kind: str, d: int = 512, rope: int = 64) -> RowCodec:
    return FP8KVRows(d, rope) if kind == "fp8" else BFloat16Rows(d)


def key_codec(kind: str, d: int = 128) -> RowCodec:
    return {"fp4": FP4IndexRows, "fp8": FP8IndexRows, "bfloat16": BFloat16Rows}[kind](d)


def paged(
    codec: RowCodec, counts: list[int], rows: int, seed: int, gap: int = 6, first: int = 0
) -> Paged:
    """counts[b] random rows for request b in shuffled blocks of `rows`, `gap` words apart; rows
    that nobody wrote are NaN, blocks beyond a request's rows and before `first` are -1."""
    g = generator(seed)
    blocks = [-(-c // rows) for c in counts]
    order = torch.randperm(sum(blocks) + 2, generator=g)
    stride, offset = codec.words * rows + gap, 2
    storage = torch.full((len(order) * stride + offset,), NAN, dtype=torch.int32)
    table = torch.full((len(counts), max(1, *blocks)), -1, dtype=torch.int32)
    pool = RowPool(storage, codec)
    used = 0
    for b, count in enumerate(counts):
        mine = order[used : used + blocks[b]]
        used += blocks[b]
        table[b, : blocks[b]] = mine
        index = torch.arange(count)
        address = mine[index // rows] * stride + offset + index % rows * codec.words
        if count:
            pool.write(address, torch.randn(count, codec.width, generator=g) * 1.5)
    table[:, : first // rows] = -1
    pool = RowPool(storage.to(mode.DEVICE), codec)
    return Paged(pool, table.to(mode.DEVICE), stride, offset, rows)


def step_of_rows(position: Tensor, request: Tensor, longest: int, tiles: bool = False) -> Step:
    """A step of which only the rows are known; tiles: they are neighbouring tokens."""
    nothing: dict[str, Any] = dict.fromkeys(
        ("layout", "tables", "query_start", "seq_lens", "window_write", "cis", "entry_cis")
    )
    most = TILED if tiles else 1
    return Step(position=position, request=request, longest_query=most, longest=longest, **nothing)


def pairs(n: int, rope: int, seed: int) -> Tensor:
    """(cos, sin) pairs float32 [n, rope]."""
    angle = torch.randn(n, rope // 2, generator=generator(seed)) * 3
    return torch.stack([angle.cos(), angle.sin()], -1).flatten(1).to(mode.DEVICE)


def far(rows: Paged) -> Paged:
    """The same rows in blocks beyond 2^31 words."""
    words = rows.pool.codec.words * rows.rows
    stride, first = (1 << 27) + 2, 16
    used = rows.table[rows.table >= 0].unique().tolist()
    memory = untouched((first + len(used)) * stride)
    table = rows.table.clone()
    for number, b in enumerate(used, first):
        source = rows.pool.storage[rows.offset + b * rows.stride :][:words]
        memory[rows.offset + number * stride :][: len(source)] = source
        table[rows.table == b] = number
    pool = RowPool(memory.to(mode.DEVICE), rows.pool.codec)
    return replace(rows, pool=pool, table=table, stride=stride)
