"""Routed experts whose weights stay packed: each expert that a step uses is dequantised once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsv4_plugin.kernels.experts import swiglu
from dsv4_plugin.kernels.packed import Matrix, product

Weights = Callable[[int], tuple[Matrix, Matrix, Matrix]]
"""Expert number -> (w1, w3, w2)."""
Round = Callable[[Tensor], Tensor]
"""What activations are rounded to before a product."""


def packed_experts(
    x: Tensor, ids: Tensor, weight: Tensor, weights: Weights, limit: float, rounding: Round
) -> Tensor:
    """x [T, D]; ids int64 [T, k], negative where this rank has no part; weight float32 [T, k]
    -> [T, D]. Sums over a token's experts are float32, in the order of the experts."""
    k = ids.shape[1]
    flat = ids.reshape(-1)
    order = flat.argsort(stable=True)
    used, counts = torch.unique_consecutive(flat[order], return_counts=True)
    rounded = rounding(x)
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    start = 0
    for expert, count in zip(used.tolist(), counts.tolist(), strict=True):
        pairs = order[start : start + count]
        start += count
        if expert < 0:
            continue
        token = pairs // k
        w1, w3, w2 = weights(expert)
        mine = rounded[token]
        h = swiglu(product(mine, w1), product(mine, w3), limit)
        h *= weight.reshape(-1, 1)[pairs]
        y = product(rounding(h.to(x.dtype)), w2)
        out.index_add_(0, token, y.float())
    return out.to(x.dtype)
