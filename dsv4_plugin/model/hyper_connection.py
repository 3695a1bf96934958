"""mHC, manifold-constrained hyper-connections: R residual streams instead of one.

From all streams of a token, normed, one product makes three things: how much of each stream goes
into the sublayer (pre), how much of its output into each stream (post), and how the streams mix, an
R x R matrix that Sinkhorn's iterations make doubly stochastic. Source: `hc_pre`, `hc_post` and
`hc_head` of the authors' inference/model.py.

Shapes: R streams (hc_mult), D hidden size.
"""

from __future__ import annotations

import torch
from torch import nn

from dsv4_plugin.config import ModelConfig
from dsv4_plugin.kernels.streams import Mixer
from dsv4_plugin.model.norm import RMSNorm


class HyperConnection(nn.Module):
    """The weights around one sublayer: what collapses the streams to its input, and spreads its
    output over them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        r = config.hc_mult
        self.iters = config.hc_sinkhorn_iters
        self.eps = config.hc_eps
        self.fn = _parameter((2 + r) * r, r * config.hidden_size)
        self.base = _parameter((2 + r) * r)
        self.scale = _parameter(3)
        self.counts = torch.tensor([r, r, r * r])

    def finalize_weights(self) -> None:
        """After loading: one scale per output, so that a single fused step applies them."""
        if len(self.scale) == len(self.counts):
            scale = self.scale.repeat_interleave(self.counts.to(self.scale.device))
            self.scale = nn.Parameter(scale, requires_grad=False)

    def mixer(self, norm: RMSNorm) -> Mixer:
        """norm: of the sublayer."""
        weights = self.fn, self.base, self.scale, norm.weight
        return Mixer(*weights, self.iters, self.eps, norm.eps, norm.rounds)


class HyperHead(nn.Module):
    """The final collapse of the streams, without Sinkhorn."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        r = config.hc_mult
        self.eps = config.hc_eps
        self.fn = _parameter(r, r * config.hidden_size)
        self.base = _parameter(r)
        self.scale = _parameter(1)

    def finalize_weights(self) -> None:
        """After loading: one scale per output."""
        scale = self.scale.expand(len(self.base)).contiguous()
        self.scale = nn.Parameter(scale, requires_grad=False)

    def mixer(self, norm: RMSNorm, normed: bool = True) -> Mixer:
        """norm: what comes behind it; unless `normed`, is left to the caller."""
        weight = norm.weight if normed else None
        return Mixer(self.fn, self.base, self.scale, weight, 0, self.eps, norm.eps)


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=torch.float32), requires_grad=False)
