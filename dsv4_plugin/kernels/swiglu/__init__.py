"""The clamped SwiGLU of an expert: silu(min(gate, limit)) * clamp(up, -limit, limit).

Source: `Expert` of the authors' inference/model.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_plugin.kernels.dispatch import implementation


def swiglu(gate: Tensor, up: Tensor, limit: float, dtype: torch.dtype) -> Tensor:
    """gate, up [T, F] in any float dtype, contiguous on GPUs -> [T, F] in dtype; float32 inside."""
    out: Tensor = implementation(__name__, gate.device).swiglu(gate, up, limit, dtype)
    return out
