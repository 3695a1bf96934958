"""The definition."""

from __future__ import annotations

from torch import Tensor

from dsv4_plugin.cache.rows import RowPool
from dsv4_plugin.kernels import exact


def qkv(
    q: Tensor,
    kv: Tensor,
    weight: Tensor,
    eps: float,
    cis: Tensor,
    address: Tensor,
    window: RowPool,
) -> Tensor:
    window.write_real(address, exact.rotate(exact.rms_norm(kv, weight, eps), cis))
    rms = exact.inverse_rms(q.float(), eps)
    return exact.rotate(q.float() * rms, cis).to(q.dtype)
