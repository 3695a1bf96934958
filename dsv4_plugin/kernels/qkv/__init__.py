"""Query norm and RoPE, and the window row: norm, RoPE, quantise, write. Source: `Attention` of the
authors' inference/model.py.

Shapes: T rows, H heads of this rank, d head_dim.
"""

from __future__ import annotations

from torch import Tensor

from dsv4_plugin.cache.rows import RowPool
from dsv4_plugin.kernels.dispatch import implementation


def qkv(
    q: Tensor,
    kv: Tensor,
    weight: Tensor,
    eps: float,
    cis: Tensor,
    address: Tensor,
    window: RowPool,
) -> Tensor:
    """Norm and rotate q per head, and write the normed, rotated kv rows to the window pool.

    q [T, H, d] and kv [T, d] in the model's dtype; weight float32 [d], of kv's norm; cis float32
    [T, rope_dim]; address int64 [T], -1 for rows that are not written. Returns q's shape, in its
    dtype; torch's fast way, which attends in float32, returns that. q may be overwritten.
    """
    out: Tensor = implementation(__name__, q.device).qkv(q, kv, weight, eps, cis, address, window)
    return out
