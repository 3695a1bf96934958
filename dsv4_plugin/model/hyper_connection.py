"""mHC, manifold-constrained hyper-connections: R residual streams instead of one.

Shapes: T tokens, R streams (hc_mult), D hidden size. All arithmetic is float32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsv4_plugin.config import ModelConfig
from dsv4_plugin.kernels.sinkhorn import sinkhorn
from dsv4_plugin.kernels.streams import Mixer
from dsv4_plugin.model.norm import inverse_rms


def _mix(h: Tensor, fn: Tensor, eps: float) -> Tensor:
    """The streams, flattened and RMS-normalised, times fn^T: [T, len(fn)]."""
    x = h.flatten(1)
    return nn.functional.linear(x, fn).mul_(inverse_rms(x, eps))


def _collapse(weight: Tensor, h: Tensor) -> Tensor:
    """sum_i weight_i h_i: [T, R, 1], [T, R, D] -> [T, D]."""
    out = weight[:, 0] * h[:, 0]
    for i in range(1, h.shape[1]):
        out.addcmul_(weight[:, i], h[:, i])
    return out


class HyperConnection(nn.Module):
    """Around one sublayer: `pre` collapses the streams to its input, `post` spreads its output.

    mixer: its weights as GPU operations take them; made when first needed.
    """

    mixer: Mixer | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        r = config.hc_mult
        self.r, self.iters = r, config.hc_sinkhorn_iters
        self.hc_eps, self.norm_eps = config.hc_eps, config.rms_norm_eps
        n = (2 + r) * r
        self.fn = _parameter(n, r * config.hidden_size)
        self.base = _parameter(n)
        self.scale = _parameter(3)

    def finalize_weights(self) -> None:
        """After loading: one scale per output, so that a single fused step applies them."""
        counts = torch.tensor([self.r, self.r, self.r * self.r], device=self.scale.device)
        self.scale = nn.Parameter(self.scale.repeat_interleave(counts), requires_grad=False)

    def pre(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h float32 [T, R, D] -> sublayer input [T, D], post [T, R, 1], mixing [T, R, R].

        mixing is C transposed, [target, source], as `post` multiplies it.
        """
        r = self.r
        m = torch.addcmul(self.base, _mix(h, self.fn, self.norm_eps), self.scale)
        gates = m[:, : 2 * r].sigmoid()
        pre, post = gates[:, :r, None] + self.hc_eps, gates[:, r:, None] * 2
        mixing = sinkhorn(m[:, 2 * r :].unflatten(-1, (r, r)), self.iters, self.hc_eps)
        return _collapse(pre, h), post, mixing

    @staticmethod
    def post(out: Tensor, h: Tensor, post: Tensor, mixing: Tensor) -> Tensor:
        """h'[k] = post[k] * out + sum_j C[j, k] h[j]: [T, R, D]."""
        return torch.baddbmm(post * out[:, None], mixing, h)


class HyperHead(nn.Module):
    """The final collapse of the streams, without Sinkhorn."""

    mixer: Mixer | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        r = config.hc_mult
        self.hc_eps, self.norm_eps = config.hc_eps, config.rms_norm_eps
        self.fn = _parameter(r, r * config.hidden_size)
        self.base = _parameter(r)
        self.scale = _parameter(1)

    def forward(self, h: Tensor) -> Tensor:
        """h [T, R, D] -> [T, D]."""
        h32 = h.float()
        m = torch.addcmul(self.base, _mix(h32, self.fn, self.norm_eps), self.scale)
        return _collapse(m.sigmoid()[..., None] + self.hc_eps, h32).to(h.dtype)


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=torch.float32), requires_grad=False)
