"""Launches as they are in production: shapes of Flash and Pro on 1 to 8 ranks, without memory.

A case calls an operation's Triton wrapper with meta tensors; a fake GPU records what it launches.
Ranks change only the number of heads, and that the compiled code of 16 heads and more does not
see: so few cases cover all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dsv4_plugin.cache.paged import Paged
from dsv4_plugin.cache.rows import RowFormat
from dsv4_plugin.kernels.attention import kernel as attention_kernel
from dsv4_plugin.kernels.index import kernel as index
from dsv4_plugin.kernels.index.topk import topk
from lab.kernels.cases import key_codec, kv_codec, step_of_rows

MODULES = (__name__, "lab.kernels.production_layer", "lab.kernels.production_experts")
"""Those of all kernels' CASES."""
MILLION = 1 << 20
PAGE = 256
LAYERS = 43
INT, BF16 = torch.int32, torch.bfloat16


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def pages(codec: Any, rows: int, blocks: int, offset: int = 0) -> Paged:
    """Rows among the parts of all layers in blocks of an engine."""
    pool: Any = SimpleNamespace(codec=codec, storage=meta(1 << 34, dtype=INT))
    table = meta(1024, blocks, dtype=INT)
    return Paged(pool, table, LAYERS * codec.words * rows * 2, offset, rows)


def attention(rows: int, heads: int, ratio: int, k: int = 0, kind: str = "fp8") -> None:
    """8,192 rows are a chunk of a prompt, fewer are decoded; k entries are chosen of ratio 4."""
    codec = kv_codec(kind)
    entries = pages(codec, PAGE // ratio, MILLION // PAGE) if ratio else None
    at = meta(rows, dtype=INT), meta(rows, dtype=INT)
    attention_kernel.attention(
        meta(rows, heads, 512, dtype=BF16),
        meta(heads),
        meta(rows, 64),
        step_of_rows(*at, MILLION, tiles=rows == 8192),
        pages(codec, 32, MILLION // 32),
        128,
        entries,
        ratio,
        meta(rows, k, dtype=INT) if k else None,
    )


def index_queries(rows: int, heads: int, kind: str) -> None:
    cis, weight = meta(rows, 64), meta(rows, heads, dtype=BF16)
    index.queries(meta(rows, heads, 128, dtype=BF16), weight, cis, RowFormat[kind.upper()])


def index_scores(rows: int, heads: int, longest: int, kind: str = "fp8") -> None:
    q, weight = meta(rows, heads, 128, dtype=torch.float16), meta(rows, heads)
    keys = pages(key_codec(kind), PAGE // 4, MILLION // PAGE, offset=9344)
    at = meta(rows, dtype=INT), meta(rows, dtype=INT)
    n = longest // 4
    flat = index.gathered(keys, meta(1, dtype=INT), 4, n) if rows == 8192 else None
    index.scores(q, weight, keys, *at, 4, n, flat)


def index_topk(rows: int, longest: int, k: int) -> None:
    topk(meta(rows, longest // 4), meta(rows, dtype=INT), 4, k)


CASES: dict[str, Callable[[], None]] = {
    "SWA decode, 64 heads": partial(attention, 64, 64, 0),
    "SWA prefill, 64 heads": partial(attention, 8192, 64, 0),
    "CSA decode of 1, 64 heads": partial(attention, 1, 64, 4, 512),
    "CSA decode of 1,024, 64 heads": partial(attention, 1024, 64, 4, 512),
    "CSA decode of 1, 128 heads": partial(attention, 1, 128, 4, 1024),
    "CSA decode of 1, bfloat16 rows": partial(attention, 1, 64, 4, 512, "bfloat16"),
    "HCA decode of 1, 64 heads": partial(attention, 1, 64, 128),
    "HCA decode of 1,024, 64 heads": partial(attention, 1024, 64, 128),
    "HCA prefill, 64 heads": partial(attention, 8192, 64, 128),
    "HCA prefill, 8 heads": partial(attention, 8192, 8, 128),
    "HCA prefill, bfloat16 rows": partial(attention, 8192, 64, 128, 0, "bfloat16"),
    "indexer queries": partial(index_queries, 8192, 64, "fp8"),
    "indexer queries, fp4 keys": partial(index_queries, 8192, 64, "fp4"),
    "indexer scores, decode of 1": partial(index_scores, 1, 64, 1 << 16),
    "indexer scores, decode of 64": partial(index_scores, 64, 64, MILLION),
    "indexer scores, decode of 64, 8 heads": partial(index_scores, 64, 8, MILLION),
    "indexer scores, decode of 64, fp4 keys": partial(index_scores, 64, 64, MILLION, "fp4"),
    "indexer scores, prefill": partial(index_scores, 8192, 64, MILLION),
    "indexer scores, prefill, fp4 keys": partial(index_scores, 8192, 64, MILLION, "fp4"),
    "indexer top-512 of 16,384": partial(index_topk, 1, 1 << 16, 512),
    "indexer top-512 of 16,384, 64 rows": partial(index_topk, 64, 1 << 16, 512),
    "indexer top-512 of 4,096, 64 rows": partial(index_topk, 64, 1 << 14, 512),
    "indexer top-1024 of 262,144": partial(index_topk, 64, MILLION, 1024),
}
