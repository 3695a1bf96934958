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


@kernel()
def clamped_swiglu(gate, up, out, limit, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Program (row, columns). (A width known to the compiler lets it load 16 bytes at once.)"""
    follow()
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * WIDTH + column
    inside = column < WIDTH
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, clamped(g, u, limit).to(out.dtype.element_ty), mask=inside)


def swiglu(gate: Tensor, up: Tensor, limit: float, dtype: torch.dtype) -> Tensor:
    require(gate, up)
    assert gate.shape == up.shape
    out = torch.empty(gate.shape, dtype=dtype, device=gate.device)
    width = gate.shape[-1]
    clamped_swiglu[(gate.numel() // width, triton.cdiv(width, BLOCK))](
        gate, up, out, limit, WIDTH=width, BLOCK=BLOCK
    )
    return out
