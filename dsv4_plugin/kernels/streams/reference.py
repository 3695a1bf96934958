"""mHC as published, step by step, in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_plugin.kernels import exact
from dsv4_plugin.kernels.packed import Both
from dsv4_plugin.kernels.packed.reference import round_rows
from dsv4_plugin.kernels.streams import Mixer, Spread


def streams(
    out: Tensor | None, h: Tensor, by: Spread | None, mixer: Mixer
) -> tuple[Tensor, Tensor | Both, Spread | None]:
    if out is not None and by is not None:
        h = spread(out, h, by)
    x, by = collapse(h, mixer)
    return h, Both(x, round_rows(x)) if mixer.rounds else x, by


def spread(out: Tensor, h: Tensor, by: Spread) -> Tensor:
    joined = by.mixing @ h.float() + by.post[..., None] * out.float()[:, None]
    return joined.to(out.dtype)


def collapse(h: Tensor, mixer: Mixer) -> tuple[Tensor, Spread | None]:
    """h [T, R, D] in the model's dtype -> the next sublayer's normed input [T, D], and how its
    output will return (None for the head)."""
    t, r, _ = h.shape
    x = h.float().flatten(1)
    rms = torch.rsqrt(x.square().mean(-1, keepdim=True) + mixer.norm_eps)
    m = x @ mixer.fn.t() * rms * mixer.scale + mixer.base
    pre = m[:, :r].sigmoid() + mixer.eps
    y = (pre[..., None] * h.float()).sum(1).to(h.dtype)
    if mixer.weight is not None:
        y = exact.rms_norm(y, mixer.weight, mixer.norm_eps)
    if len(mixer.fn) == r:
        return y, None
    mixing = sinkhorn(m[:, 2 * r :].view(t, r, r), mixer.iters, mixer.eps)
    return y, Spread(2 * m[:, r : 2 * r].sigmoid(), mixing.transpose(1, 2).contiguous())


def sinkhorn(logits: Tensor, iters: int, eps: float) -> Tensor:
    """logits float32 [T, R, R] -> nearly doubly stochastic [T, R, R], step by step as published."""
    c = logits.softmax(-1) + eps
    c = c / (c.sum(-2, keepdim=True) + eps)
    for _ in range(iters - 1):
        c = c / (c.sum(-1, keepdim=True) + eps)
        c = c / (c.sum(-2, keepdim=True) + eps)
    return c
