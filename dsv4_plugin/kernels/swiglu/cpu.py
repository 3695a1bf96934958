"""In place where that is possible."""

from __future__ import annotations

import torch
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor, limit: float, dtype: torch.dtype) -> Tensor:
    gate = gate.float().clamp(max=limit)
    out = torch.nn.functional.silu(gate).mul_(up.float().clamp(-limit, limit))
    return out.to(dtype)
