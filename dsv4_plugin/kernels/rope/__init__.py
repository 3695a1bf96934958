"""Rotary position embedding: interleaved pairs, on the LAST dims of a head."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsv4_plugin.config import SWA, ModelConfig, Yarn


class Rope:
    """Angles of one layer kind: plain theta for sliding-window layers, YaRN for compressed ones."""

    def __init__(self, config: ModelConfig, ratio: int) -> None:
        self.dim = config.qk_rope_head_dim
        theta = config.rope_theta if ratio == SWA else config.compress_rope_theta
        exponent = torch.arange(0, self.dim, 2, dtype=torch.float32) / self.dim
        self.frequency = 1.0 / theta**exponent
        if ratio != SWA and config.yarn is not None:
            self.frequency *= _yarn_scale(config.yarn, theta, self.dim)

    def __call__(self, position: Tensor) -> Tensor:
        """e^(i * angle) for int64 positions [T]: complex64 [T, rope_dim / 2]."""
        angle = position.float()[:, None] * self.frequency.to(position.device)
        return torch.complex(angle.cos(), angle.sin())


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


def rotate_(x: Tensor, cis: Tensor) -> Tensor:
    """Rotate the last 2 * cis.shape[-1] dims of x [T, ..., d] in place; conj(cis) rotates back."""
    tail = x[..., -2 * cis.shape[-1] :]
    cis = cis.view(cis.shape[0], *[1] * (x.dim() - 2), -1)
    if x.dtype == torch.float32:
        torch.view_as_complex(tail.unflatten(-1, (-1, 2))).mul_(cis)
    else:
        pairs = torch.view_as_complex(tail.float().unflatten(-1, (-1, 2)))
        tail.copy_(torch.view_as_real(pairs * cis).flatten(-2))
    return x
