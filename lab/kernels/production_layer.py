"""Launches of the kernels around attention as they are in production, with meta tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dsv4_plugin.cache.layout import CacheLayout
from dsv4_plugin.cache.paged import BlockTables
from dsv4_plugin.cache.rows import BFloat16Rows, Float32Rows, FP4IndexRows, FP8IndexRows, FP8KVRows
from dsv4_plugin.cache.step import Step
from dsv4_plugin.config import CSA, HCA
from dsv4_plugin.kernels.compress import State, Target
from dsv4_plugin.kernels.compress.kernel import compress
from dsv4_plugin.kernels.gate.kernel import gate
from dsv4_plugin.kernels.norm.kernel import rms_norm
from dsv4_plugin.kernels.qkv.kernel import qkv
from dsv4_plugin.kernels.step import Rows
from dsv4_plugin.kernels.step.kernel import place
from dsv4_plugin.kernels.streams import Mixer, Spread
from dsv4_plugin.kernels.streams.kernel import spread, streams
from dsv4_plugin.kernels.swiglu.kernel import swiglu
from lab.kernels.sizes import flash

INT, LONG, BF16 = torch.int32, torch.int64, torch.bfloat16
REQUESTS, PAGES, LAYERS = 1024, 4096, 43


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def pool(codec: Any) -> Any:
    return SimpleNamespace(codec=codec, storage=meta(1 << 34, dtype=INT))


def tables() -> BlockTables:
    page = meta(REQUESTS, PAGES, dtype=INT)
    window = meta(REQUESTS, 8 * PAGES, dtype=INT)
    return BlockTables(window, page, meta(REQUESTS, dtype=INT), 4672 * LAYERS, 11_840 * 30, 90_000)


def step(rows: int) -> Step:
    cis = meta(rows, 64)
    return Step(
        layout=CacheLayout.of(flash([CSA, HCA]), "fp8"),
        position=meta(rows, dtype=INT), request=meta(rows, dtype=INT),
        window_write=meta(rows, dtype=LONG), query_start=meta(REQUESTS + 1, dtype=INT),
        seq_lens=meta(REQUESTS, dtype=INT), cis={0: cis, 4: cis, 128: cis},
        entry_cis={4: cis, 128: cis}, tables=tables(), longest_query=rows, longest=1 << 20,
    )  # fmt: skip


def _qkv(rows: int, heads: int, codec: Any) -> None:
    q = meta(rows, heads, 512, dtype=BF16)
    kv = meta(rows, 512, dtype=BF16)
    qkv(q, kv, meta(512), 1e-6, meta(rows, 64), meta(rows, dtype=LONG), pool(codec))


def _compress(rows: int, ratio: int, key: Any) -> None:
    halves, channels = (2, 640) if ratio == 4 else (1, 512)
    kv = pool(FP8KVRows(512, 64))
    targets = [Target(kv, 0, meta(512))]
    if ratio == 4:
        targets.append(Target(pool(key), 9344, meta(128), rotate=True))
    state = State(pool(Float32Rows(halves * 3 * channels)), 1, kv, 11_520)
    y = meta(rows, 2, halves, channels)
    compress(y, meta(ratio, halves, channels), 1e-6, step(rows), ratio, targets, state, BF16)


def _streams(rows: int, d: int, n: int) -> None:
    mixer = Mixer(meta(n, 4 * d), meta(n), meta(n), meta(d), 20, 1e-6, 1e-6)
    by = Spread(meta(rows, 4), meta(rows, 4, 4))
    streams(meta(rows, d, dtype=BF16), meta(rows, 4, d, dtype=BF16), by, mixer)


def _spread(rows: int, d: int) -> None:
    h, by = meta(rows, 4, d, dtype=BF16), Spread(meta(rows, 4), meta(rows, 4, 4))
    spread(meta(rows, d, dtype=BF16), h, by)


def _gate(rows: int, experts: int, hashed: bool) -> None:
    table = meta(129_280, 6, dtype=LONG) if hashed else None
    bias = None if hashed else meta(experts)
    gate(meta(rows, experts), 6, 1.5, bias, table, meta(rows, dtype=LONG), meta(rows, dtype=INT))


def _step(rows: int) -> None:
    buffers = Rows(
        meta(rows, dtype=INT), meta(rows, dtype=INT), meta(rows, dtype=LONG),
        meta(4, rows, dtype=INT),
    )  # fmt: skip
    start, lengths = meta(REQUESTS + 1, dtype=INT), meta(REQUESTS, dtype=INT)
    place(tables(), start, lengths, 32, 146, meta(4, dtype=INT), buffers)


def _swiglu(rows: int, width: int) -> None:
    halves = (meta(rows, width, dtype=BF16) for _ in range(2))
    swiglu(*halves, 10.0, BF16)


CASES: dict[str, Callable[[], None]] = {
    "step metadata": partial(_step, 8192),
    "latent norm, Pro": lambda: rms_norm(meta(8192, 1536, dtype=BF16), meta(1536), 1e-6),
    "queries and window rows, 64 heads": partial(_qkv, 1, 64, FP8KVRows(512, 64)),
    "queries and window rows, 128 heads, bfloat16": partial(_qkv, 8192, 128, BFloat16Rows(512)),
    "compressor, CSA": partial(_compress, 1024, 4, FP8IndexRows(128)),
    "compressor, CSA, fp4 keys": partial(_compress, 1024, 4, FP4IndexRows(128)),
    "compressor, HCA": partial(_compress, 8192, 128, None),
    "streams, Flash, decode": partial(_streams, 1, 4096, 24),
    "streams, Pro, prefill": partial(_streams, 8192, 7168, 24),
    "streams, Pro, head": partial(_streams, 64, 7168, 4),
    "streams between stages": partial(_spread, 64, 4096),
    "router, Flash": partial(_gate, 1024, 256, False),
    "router, Pro": partial(_gate, 8192, 384, False),
    "router by hash": partial(_gate, 1, 256, True),
    "SwiGLU of the shared expert": partial(_swiglu, 8192, 2048),
}
