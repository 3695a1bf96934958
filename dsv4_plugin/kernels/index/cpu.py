"""Group by group, with keys read once: shared by a prefill span's rows, each decode token's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from dsv4_plugin.cache.groups import Entries
from dsv4_plugin.cache.paged import Paged
from dsv4_plugin.cache.rows import RowFormat
from dsv4_plugin.cache.step import Step
from dsv4_plugin.kernels.rope import rotate_
from dsv4_plugin.kernels.topk import stable_topk
from dsv4_plugin.quant.e2m1 import round_mxfp4

BLOCK_VALUES = 1 << 24
"""Most float32 values of one block of scores or gathered rows (64 MiB)."""
CACHED_VALUES = 1 << 19
"""Of a block of scores by heads that stays in a core's cache (2 MiB)."""


def choose(
    q: Tensor,
    weight: Tensor,
    cis: Tensor,
    keys: Paged,
    step: Step,
    ratio: int,
    k: int,
    reduce: Callable[[Tensor], Tensor],
) -> Tensor:
    q, weight = rotate_(q, cis).float(), weight.float()
    if keys.pool.codec.format in (RowFormat.FP8, RowFormat.FP4):
        q = q @ hadamard(q.shape[-1], q.device)
    if keys.pool.codec.format == RowFormat.FP4:
        q = round_mxfp4(q)
    out = torch.full((len(q), k), -1, dtype=torch.int32, device=q.device)
    for group in step.groups.decode:
        rows, entries = group.rows, group.entries[ratio]
        mine = q.index_select(0, rows), weight.index_select(0, rows)
        if entries.count > k:
            out[rows] = _of_group(*mine, entries, keys, k, reduce)
        else:
            out[rows, : entries.count] = _all(entries)
    for span in step.groups.prefill:
        own, entries = slice(span.start, span.end), span.entries[ratio]
        if entries.count > k:
            out[own] = _of_span(q[own], weight[own], entries, keys, k, reduce)
        else:
            out[own, : entries.count] = _all(entries)
    return out


def _all(entries: Entries) -> Tensor:
    """What queries see where that is not more than k: int32 [n, N]."""
    each = torch.arange(entries.count, device=entries.hidden.device, dtype=torch.int32)
    return each.expand_as(entries.hidden).masked_fill(entries.hidden, -1)


def _of_group(
    q: Tensor,
    weight: Tensor,
    entries: Entries,
    keys: Paged,
    k: int,
    reduce: Callable[[Tensor], Tensor],
) -> Tensor:
    """Of decode tokens, whose keys are their own."""
    assert entries.key is not None
    found = [
        scores(q[part], weight[part], keys.pool.read(entries.key[part], torch.float32))
        for part in blocks(len(q), entries.count * max(q.shape[1:]))
    ]
    return select(reduce(torch.cat(found)), entries.visible, k)


def _of_span(
    q: Tensor,
    weight: Tensor,
    entries: Entries,
    keys: Paged,
    k: int,
    reduce: Callable[[Tensor], Tensor],
) -> Tensor:
    """Of a request's tokens, which share keys; a block of them has those that its last one sees."""
    assert entries.key is not None
    rows = keys.pool.read(entries.key, torch.float32)
    out = torch.full((len(q), k), -1, dtype=torch.int32, device=q.device)
    for part in blocks(len(q), entries.count * q.shape[1], values=CACHED_VALUES):
        visible = entries.visible[part]
        seen = int(visible[-1])
        if seen <= k:
            each = torch.arange(seen, dtype=torch.int32, device=q.device)
            out[part, :seen] = each.where(each < visible[:, None], -1)
        else:
            score = reduce(scores(q[part], weight[part], rows[:seen]))
            out[part] = select(score, visible, k)
    return out


def scores(q: Tensor, weight: Tensor, keys: Tensor) -> Tensor:
    """sum_h weight_h * relu(q_h . key): float32 [n, N]. keys [N, c] (shared) or [n, N, c]."""
    n, heads, c = q.shape
    if keys.dim() == 3:
        s = torch.bmm(q, keys.transpose(1, 2))
    else:
        s = (q.reshape(n * heads, c) @ keys.t()).view(n, heads, -1)
    return torch.bmm(weight[:, None], s.relu_())[:, 0]


def select(score: Tensor, visible: Tensor, k: int) -> Tensor:
    """The k best of each query's first `visible` entries, -1 where fewer are visible: int32 [n, k];
    needs k <= N."""
    entry = torch.arange(score.shape[1], device=score.device)
    index = stable_topk(score.masked_fill(entry >= visible[:, None], float("-inf")), k)
    return index.masked_fill(index >= visible[:, None], -1).int()


def blocks(n: int, width: int, most: int = 1 << 30, values: int = BLOCK_VALUES) -> list[slice]:
    """Cut n rows of `width` values into blocks of at most so many values and `most` rows."""
    size = max(1, min(most, values // max(width, 1)))
    return [slice(a, min(a + size, n)) for a in range(0, n, size)]


@lru_cache
def hadamard(dim: int, device: torch.device) -> Tensor:
    """The orthonormal Hadamard matrix [dim, dim], dim a power of two."""
    h = torch.ones(1, 1, device=device)
    while h.shape[0] < dim:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return h.mul_(dim**-0.5)
