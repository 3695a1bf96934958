"""The definition."""

from __future__ import annotations

import torch
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor, limit: float, dtype: torch.dtype) -> Tensor:
    gate, up = gate.float().clamp(max=limit), up.float().clamp(-limit, limit)
    return (gate * gate.sigmoid() * up).to(dtype)
