"""In float32 and in place."""

from __future__ import annotations

from torch import Tensor

from dsv4_plugin.cache.rows import RowPool
from dsv4_plugin.kernels.norm.cpu import inverse_rms, rms_norm
from dsv4_plugin.kernels.rope import rotate_


def qkv(
    q: Tensor,
    kv: Tensor,
    weight: Tensor,
    eps: float,
    cis: Tensor,
    address: Tensor,
    window: RowPool,
) -> Tensor:
    window.write_real(address, rotate_(rms_norm(kv, weight, eps), cis))
    q = q.float()
    return rotate_(q.mul_(inverse_rms(q, eps)), cis)
