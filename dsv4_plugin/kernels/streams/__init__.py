"""mHC between sublayers: spread an output over the R streams, collapse them to the next input.

Shapes: T tokens, R streams, D hidden size, N outputs of the mixing product: (2 + R) * R, or R for
the head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_plugin.kernels import exact, sinkhorn
from dsv4_plugin.kernels.custom_op import custom_op
from dsv4_plugin.kernels.dispatch import use_triton


@dataclass(frozen=True)
class Mixer:
    """The weights of one collapse: fn [N, R * D], base [N], scale [N], float32, and the norm of
    the sublayer behind it, weight float32 [D]."""

    fn: Tensor
    base: Tensor
    scale: Tensor
    weight: Tensor
    iters: int
    eps: float
    norm_eps: float


@dataclass(frozen=True)
class Spread:
    """How a sublayer's output returns to the streams, float32: post [T, R] weighs the output,
    mixing [T, R, R] the streams, [target, source]."""

    post: Tensor
    mixing: Tensor


def streams(
    out: Tensor | None, h: Tensor, by: Spread | None, mixer: Mixer
) -> tuple[Tensor, Tensor, Spread | None]:
    """As `reference`."""
    if torch.compiler.is_compiling():
        m = mixer
        spread_h, x, post, mixing = _streams(
            out, h, by.post if by else None, by.mixing if by else None,
            m.fn, m.base, m.scale, m.weight, m.iters, m.eps, m.norm_eps,
        )  # fmt: skip
        head = len(m.fn) == h.shape[1]
        return h if out is None else spread_h, x, None if head else Spread(post, mixing)
    if not use_triton(h.device):
        return reference(out, h, by, mixer)
    from dsv4_plugin.kernels.streams import kernel

    return kernel.streams(out, h, by, mixer)


def spread(out: Tensor, h: Tensor, by: Spread) -> Tensor:
    """h'[k] = post[k] * out + sum_j mixing[k, j] h[j]: out [T, D], h [T, R, D] -> h's shape."""
    mixed = by.mixing @ h.float() + by.post[..., None] * out.float()[:, None]
    return mixed.to(h.dtype)


def collapse(h: Tensor, mixer: Mixer) -> tuple[Tensor, Spread | None]:
    """h [T, R, D] in the model's dtype -> the next sublayer's normed input [T, D], and how its
    output will return (None for the head)."""
    t, r, _ = h.shape
    x = h.float().flatten(1)
    rms = torch.rsqrt(x.square().mean(-1, keepdim=True) + mixer.norm_eps)
    m = x @ mixer.fn.t() * rms * mixer.scale + mixer.base
    pre = m[:, :r].sigmoid() + mixer.eps
    y = (pre[..., None] * h.float()).sum(1).to(h.dtype)
    y = exact.rms_norm(y, mixer.weight, mixer.norm_eps)
    if len(mixer.fn) == r:
        return y, None
    mixing = sinkhorn.reference(m[:, 2 * r :].view(t, r, r), mixer.iters, mixer.eps)
    return y, Spread(2 * m[:, r : 2 * r].sigmoid(), mixing.transpose(1, 2).contiguous())


def reference(
    out: Tensor | None, h: Tensor, by: Spread | None, mixer: Mixer
) -> tuple[Tensor, Tensor, Spread | None]:
    """`spread` of out (None: h is as it should be), then `collapse`: h', x, and the next Spread."""
    if out is not None:
        assert by is not None
        h = spread(out, h, by)
    return h, *collapse(h, mixer)


def _fake(
    out: Tensor | None, h: Tensor, post: Tensor | None, mixing: Tensor | None,
    fn: Tensor, base: Tensor, scale: Tensor, weight: Tensor,
    iters: int, eps: float, norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (t, r, d), head = h.shape, len(fn) == h.shape[1]
    spread_h = h.new_empty(0) if out is None else torch.empty_like(h)
    new = [h.new_empty(0 if head else shape, dtype=torch.float32) for shape in ((t, r), (t, r, r))]
    return spread_h, h.new_empty(t, d), new[0], new[1]


@custom_op(
    "streams(Tensor? out, Tensor h, Tensor? post, Tensor? mixing, Tensor fn, Tensor base,"
    " Tensor scale, Tensor weight, int iters, float eps, float norm_eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
)
def _streams(
    out: Tensor | None, h: Tensor, post: Tensor | None, mixing: Tensor | None,
    fn: Tensor, base: Tensor, scale: Tensor, weight: Tensor,
    iters: int, eps: float, norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`streams` in a graph: h' is empty where it would be h, as is a Spread where there is none."""
    by = None if post is None or mixing is None else Spread(post, mixing)
    mixer = Mixer(fn, base, scale, weight, iters, eps, norm_eps)
    spread_h, x, spread_by = streams(out, h, by, mixer)
    none = h.new_empty(0, dtype=torch.float32)
    parts = (none, none.clone()) if spread_by is None else (spread_by.post, spread_by.mixing)
    return h.new_empty(0) if out is None else spread_h, x, *parts
