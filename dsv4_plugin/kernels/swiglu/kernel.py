"""One launch, elementwise."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_plugin.kernels.launch import require

BLOCK = 1024


@triton.jit(do_not_specialize=["count"])
def clamped_swiglu(gate, up, out, count, limit, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.minimum(tl.load(gate + at, mask=inside, other=0.0).to(tl.float32), limit)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.minimum(tl.maximum(u, -limit), limit)
    e = tl.exp(-tl.abs(g))  # 1 at most, whatever the sign
    y = g * tl.where(g < 0, e, 1.0) / (1.0 + e) * u
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


def swiglu(gate: Tensor, up: Tensor, limit: float, dtype: torch.dtype) -> Tensor:
    require(gate, up)
    assert gate.shape == up.shape
    out = torch.empty(gate.shape, dtype=dtype, device=gate.device)
    count = gate.numel()
    clamped_swiglu[(triton.cdiv(count, BLOCK),)](gate, up, out, count, limit, BLOCK=BLOCK)
    return out
