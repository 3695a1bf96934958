"""Compile every kernel that serving will need, before it serves.

Kernels differ by what their launches are made for: few or many rows, decoding or prompts, and how
long requests may be. A warm-up runs one step of padding for each: all launches, no row's work.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dsv4_plugin.cache.device_step import DeviceStepBuilder
from dsv4_plugin.cache.layer import LayerCache
from dsv4_plugin.cache.layout import CacheLayout
from dsv4_plugin.cache.step import BlockTables
from dsv4_plugin.engine import allocate
from dsv4_plugin.kernels.dispatch import use_triton
from dsv4_plugin.model.block import Block
from dsv4_plugin.model.transformer import Transformer

log = logging.getLogger("dsv4")


def shapes(rows: int, requests: int, longest: int) -> list[tuple[int, int, int]]:
    """(rows, most rows of a request, most tokens of a request) of the steps to run: decoding alone
    and in company, prompts, at every length that changes a launch."""
    from dsv4_plugin.kernels.paged_index.kernel import BLOCKS

    few = (1, 256)  # no compressed rows; some, but not more than are chosen
    lengths = sorted({min(n, longest) for n in (*few, *(4 * b for b in BLOCKS))} | {longest})
    batches = sorted({(1, 1), (requests, 1), (rows, rows)})
    return [(n, query, length) for length in lengths for n, query in batches]


def warm_up(
    model: Transformer,
    steps: DeviceStepBuilder,
    caches: Sequence[LayerCache],
    tables: BlockTables,
    rows: int,
    requests: int,
    longest: int,
) -> Counter[str]:
    """Compile for at most `rows` rows, `requests` requests and `longest` tokens of a request.

    caches, tables: those of serving, because strides and alignments are compiled in; nothing in
    them is read or written. Returns how many variants of each kernel were compiled, and logs it;
    does nothing where kernels are torch's.
    """
    if not use_triton(tables.window.device):
        return Counter()
    start = time.perf_counter()
    with compiled() as found, torch.inference_mode():
        for shape in shapes(rows, requests, longest):
            _padding(model, steps, caches, tables, *shape)
    took = time.perf_counter() - start
    names = ", ".join(f"{name} {n}" for name, n in sorted(found.items()))
    log.info("Warm-up: %d kernels in %.1f s (%s).", found.total(), took, names or "all known")
    return found


def _padding(
    model: Transformer,
    steps: DeviceStepBuilder,
    caches: Sequence[LayerCache],
    tables: BlockTables,
    rows: int,
    query: int,
    longest: int,
) -> None:
    device = tables.window.device
    ends = torch.zeros(2, dtype=torch.int32, device=device)
    step = steps.build(tables, ends, ends[:1], rows, query, longest)
    ids = torch.zeros(rows, dtype=torch.int32, device=device)
    if model.first and model.last:
        model(ids, step, caches)
        return
    block = next(iter(model.layers.values()))
    assert isinstance(block, Block)
    shape = (rows, model.config.hc_mult, model.config.hidden_size)
    h = torch.zeros(shape, dtype=block.attn.dtype, device=device)
    model.run(h, ids, step, caches)


def nothing(
    model: Transformer, layout: CacheLayout, device: torch.device
) -> tuple[list[LayerCache], BlockTables, Tensor]:
    """Caches of one block of each kind, their tables, and query_start int32 [2] of a request
    without rows: a step built of these is all padding."""
    caches, strides = allocate(model.ratios, layout, 1, 1, 1, False, device)
    one = torch.zeros(1, 1, dtype=torch.int32, device=device)
    ends = torch.zeros(2, dtype=torch.int32, device=device)
    return caches, BlockTables(one, one, one[0], *strides), ends


@contextmanager
def compiled() -> Iterator[Counter[str]]:
    """What Triton compiles inside: variants by kernel."""
    import triton

    found: Counter[str] = Counter()
    before = triton.knobs.runtime.jit_post_compile_hook

    def note(*, fn: Any, **_: Any) -> None:
        found[fn.name.rsplit(".", 1)[-1]] += 1

    triton.knobs.runtime.jit_post_compile_hook = note
    try:
        yield found
    finally:
        triton.knobs.runtime.jit_post_compile_hook = before
