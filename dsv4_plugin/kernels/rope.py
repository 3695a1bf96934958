"""Rotary position embedding (RoFormer), and YaRN: interleaved pairs, on the LAST dims of a head.

Factors are float32 [T, rope_dim], (cos, sin) pairs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsv4_plugin.config import SWA, ModelConfig, Yarn


def frequencies(config: ModelConfig, ratio: int) -> Tensor:
    """Radians per position of a layer kind's pairs, float32 [rope_dim / 2]: plain theta for
    sliding-window layers, YaRN for compressed ones."""
    dim = config.qk_rope_head_dim
    theta = config.rope_theta if ratio == SWA else config.compress_rope_theta
    frequency = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if ratio != SWA and config.yarn is not None:
        frequency *= _yarn_scale(config.yarn, theta, dim)
    return frequency


def _yarn_scale(yarn: Yarn, theta: float, dim: int) -> Tensor:
    """Factor on each frequency: 1 for fast dims, 1 / factor for slow ones, a ramp between."""

    def dim_of(rotations: float) -> float:
        turns = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(theta))

    low = max(math.floor(dim_of(yarn.beta_fast)), 0)
    high = min(math.ceil(dim_of(yarn.beta_slow)), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    smooth = 1 - ramp.clamp(0, 1)
    return (1 - smooth) / yarn.factor + smooth


def rotate_(x: Tensor, cis: Tensor, back: bool = False) -> Tensor:
    """Rotate the last dims of x [T, ..., d] in place, or undo it."""
    width = cis.shape[-1]
    tail = x[..., -width:]
    factors = torch.view_as_complex(cis.view(len(cis), *[1] * (x.dim() - 2), width // 2, 2))
    factors = factors.conj() if back else factors
    if x.dtype == torch.float32:
        torch.view_as_complex(tail.unflatten(-1, (-1, 2))).mul_(factors)
    else:
        pairs = torch.view_as_complex(tail.float().unflatten(-1, (-1, 2)))
        tail.copy_(torch.view_as_real(pairs * factors).flatten(-2))
    return x
