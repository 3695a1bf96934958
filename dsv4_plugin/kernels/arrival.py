"""The last program that arrives goes on: what would be a second launch becomes its work.

Programs that share a counter store their parts and arrive. Whoever comes last reads all parts, in
an order that does not depend on who came when, and leaves the counter at 0 for the next launch.

Counters are made once per kernel and device, and outside of graphs, whose memory goes with them: a
captured graph finds them where they were. Launches of one kernel have to follow one another, as
those of one stream do.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import is_hip

COUNTERS = 1 << 16
"""Of a kernel. (256 KiB)"""
KERNELS = ("experts", "linear", "packed")
"""Those that have counters."""


def counters(kernel: str, device: torch.device, needed: int) -> Tensor:
    """int32 zeros, at least `needed`, for launches of one of KERNELS."""
    assert needed <= COUNTERS, f"{kernel} needs {needed} counters"
    return _made(kernel, device)


def prepare(device: torch.device) -> None:
    """Make what is missing, before anything is captured."""
    for kernel in KERNELS:
        _made(kernel, device)


@cache
def _made(kernel: str, device: torch.device) -> Tensor:
    assert kernel in KERNELS
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    assert not capturing, "a graph's memory goes with it"
    return torch.zeros(COUNTERS, dtype=torch.int32, device=device)


@triton.jit
def is_last(counter, programs):
    """Have all of `programs` programs arrived now? Then what they stored before can be loaded, with
    cache_modifier ".cg": L1 may hold what was there earlier."""
    if is_hip():  # where neither a barrier nor another wavefront's release waits for stores
        wait: tl.constexpr = "s_waitcnt vmcnt(0)\nv_mov_b32 $0, $1"
        tl.inline_asm_elementwise(wait, "=v,v,~{memory}", [programs], tl.int32, False, 1)
    tl.debug_barrier()  # one thread releases what all have stored
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def in_order(part, step, PIECES: tl.constexpr, mask=None):
    """The sum of what PIECES programs have stored, `step` values apart from the pointers `part` on,
    in their order; 0 where not `mask`. For the last to arrive."""
    other = None if mask is None else 0.0
    parts = ()  # type: tuple[Tensor, ...]
    for piece in tl.static_range(PIECES):
        parts += (tl.load(part + piece * step, mask=mask, other=other, cache_modifier=".cg"),)
    tl.debug_barrier()  # which no load passes: all are asked for before the first is waited for
    total = parts[0]
    for piece in tl.static_range(1, PIECES):
        total += parts[piece]
    return total
