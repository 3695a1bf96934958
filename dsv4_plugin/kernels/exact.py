"""Functions whose bits do not depend on the backend: plain IEEE additions, products and quotients.

Whatever the definitions (`reference`) put into a cache is made of these, and of their twins in
`device` what Triton's kernels put there, step by step the same: so both write the same bytes. (The
fast ways in torch come close.) Sums over a row are float64, where the order of the terms is lost in
rounding to float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOG2E = 1.4426950408889634
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
EXP_LOWEST = -87.0
EXP_TERMS = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
"""exp(r) = 1 + r + r^2 * polynomial, highest power first, for |r| <= ln(2) / 2 (Cephes expf)."""
LOG_TERMS = (1 / 9, 1 / 7, 1 / 5, 1 / 3, 1.0)
"""log(m) = 2 s * polynomial(s^2), s = (m - 1) / (m + 1), for m from 1/sqrt(2) to sqrt(2)."""


def exp(x: Tensor) -> Tensor:
    """e^x for float32 x <= 0; 0 below -87."""
    low = x.clamp(min=EXP_LOWEST)
    n = (low * LOG2E + 0.5).floor()
    r = low - n * LN2_HIGH
    r = r - n * LN2_LOW
    y = torch.full_like(r, EXP_TERMS[0])
    for term in EXP_TERMS[1:]:
        y = y * r
        y = y + term
    y = y * (r * r)
    y = y + r
    y = y + 1.0
    power = ((n.to(torch.int32) + 127) << 23).view(torch.float32)
    return torch.where(x < EXP_LOWEST, 0.0, y * power)


def log(x: Tensor) -> Tensor:
    """Natural logarithm of normal positive float32 x."""
    bits = x.contiguous().view(torch.int32)
    n = (bits >> 23) - 127
    m = ((bits & 0x7FFFFF) | 0x3F800000).view(torch.float32)
    big = m > 1.41421356
    m = torch.where(big, m * 0.5, m)
    n = (n + big.int()).float()
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    y = torch.full_like(z, LOG_TERMS[0])
    for term in LOG_TERMS[1:]:
        y = y * z
        y = y + term
    y = y * (s + s)
    y = y + n * LN2_LOW
    return y + n * LN2_HIGH


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) of float32 [..., d] -> [..., 1]."""
    x64 = x.double()
    mean = (x64 * x64).sum(-1, keepdim=True) / x.shape[-1]
    # By way of float64: torch's float32 root on CPUs is off by a bit in one value of six.
    return 1.0 / (mean.float() + eps).double().sqrt().float()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., d] in any float dtype, normalised and weighted -> x's dtype."""
    x32 = x.float()
    return (x32 * inverse_rms(x32, eps) * weight).to(x.dtype)


def rotate(x: Tensor, cis: Tensor, back: bool = False) -> Tensor:
    """Rotary embedding of the last dims of x [T, ..., d], or its inverse.

    cis: float32 [T, rope_dim], (cos, sin) pairs. Returns x's dtype.
    """
    cis = cis.view(len(cis), *[1] * (x.dim() - 2), -1, 2)
    cos, sin = cis[..., 0], cis[..., 1]
    sin = -sin if back else sin
    width = 2 * cos.shape[-1]
    pairs = x[..., -width:].float().unflatten(-1, (-1, 2))
    a, b = pairs[..., 0], pairs[..., 1]
    turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    return torch.cat([x[..., :-width], turned.to(x.dtype)], -1)


def hadamard(x: Tensor) -> Tensor:
    """The orthonormal Hadamard transform of the last dim [..., d], d a power of two; float32."""
    d = x.shape[-1]
    x = x.float()
    for _ in range(d.bit_length() - 1):
        a, b = x[..., 0::2], x[..., 1::2]
        x = torch.cat([a + b, a - b], -1)
    return x.mul(d**-0.5)
