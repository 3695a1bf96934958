"""Query norm and RoPE, and the window row: norm, RoPE, quantise, write.

Shapes: T rows, H heads of this rank, d head_dim.
"""

from __future__ import annotations

from torch import Tensor

from dsv4_plugin.kernels import exact
from dsv4_plugin.kernels.dispatch import use_triton
from dsv4_plugin.kernels.formats import Pool, write_rows


def qkv(
    q: Tensor, kv: Tensor, weight: Tensor, eps: float, cis: Tensor, address: Tensor, window: Pool
) -> Tensor:
    """As `reference`."""
    if not use_triton(q.device):
        return reference(q, kv, weight, eps, cis, address, window)
    from dsv4_plugin.kernels.qkv import kernel

    return kernel.qkv(q, kv, weight, eps, cis, address, window)


def reference(
    q: Tensor, kv: Tensor, weight: Tensor, eps: float, cis: Tensor, address: Tensor, window: Pool
) -> Tensor:
    """Norm and rotate q per head, and write the normed, rotated kv rows to the window pool.

    q [T, H, d] and kv [T, d] in the model's dtype; weight float32 [d], of kv's norm; cis float32
    [T, rope_dim]; address int64 [T], -1 for rows that are not written. Returns q's shape and dtype.
    """
    rms = exact.inverse_rms(q.float(), eps)
    write_rows(window, address, exact.rotate(exact.rms_norm(kv, weight, eps), cis))
    return exact.rotate(q.float() * rms, cis).to(q.dtype)
