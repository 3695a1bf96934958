"""One launch, elementwise."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_plugin.kernels.launch import require
from dsv4_plugin.kernels.programmatic import follow, kernel

BLOCK = 1024


@triton.jit
def clamped(gate, up, limit):
    """float32 -> silu(min(gate, limit)) * clamp(up, -limit, limit)."""
    gate = tl.minimum(gate, limit)
    e = tl.exp(-tl.abs(gate))  # 1 at most, whatever the sign
    return gate * tl.where(gate < 0, e, 1.0) / (1.0 + e) * tl.minimum(tl.maximum(up, -limit), limit)


@kernel(do_not_specialize=["count"])
def clamped_swiglu(gate, up, out, count, limit, BLOCK: tl.constexpr):
    follow()
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, clamped(g, u, limit).to(out.dtype.element_ty), mask=inside)


def swiglu(gate: Tensor, up: Tensor, limit: float, dtype: torch.dtype) -> Tensor:
    require(gate, up)
    assert gate.shape == up.shape
    out = torch.empty(gate.shape, dtype=dtype, device=gate.device)
    count = gate.numel()
    clamped_swiglu[(triton.cdiv(count, BLOCK),)](gate, up, out, count, limit, BLOCK=BLOCK)
    return out
