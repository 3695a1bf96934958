"""Routed experts whose weights stay packed: each expert that a step uses is dequantised once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4_plugin.kernels.custom_op import custom_op
from dsv4_plugin.kernels.dispatch import use_triton
from dsv4_plugin.kernels.experts import swiglu
from dsv4_plugin.kernels.packed import ROUNDED, Matrix, matrix_of, tensors_of, tiled_product
from dsv4_plugin.quant.e4m3 import round_e4m3


def packed_experts(
    x: Tensor,
    ids: Tensor,
    weight: Tensor,
    w1: Matrix,
    w3: Matrix,
    w2: Matrix,
    limit: float,
    rounding: bool,
) -> Tensor:
    """x [T, D]; ids int64 [T, k], negative where this rank has no part; weight float32 [T, k];
    w1, w3, w2 of all experts -> [T, D]. Sums over a token's experts are float32.

    rounding: of the inputs of every product, by `round_inputs`.
    """
    if torch.compiler.is_compiling():
        first, third, second = tensors_of(w1), tensors_of(w3), tensors_of(w2)
        return _experts(x, ids, weight, first, third, second, limit, rounding)
    if use_triton(x.device):
        from dsv4_plugin.kernels.experts import kernel

        return kernel.packed_experts(x, ids, weight, w1, w3, w2, limit, rounding)
    return reference(x, ids, weight, w1, w3, w2, limit, rounding)


Tensors = Sequence[Tensor]


@custom_op(
    "packed_experts(Tensor x, Tensor ids, Tensor weight, Tensor[] w1, Tensor[] w3, Tensor[] w2,"
    " float limit, bool rounding) -> Tensor",
    lambda x, *_: torch.empty_like(x),
)
def _experts(
    x: Tensor, ids: Tensor, weight: Tensor, w1: Tensors, w3: Tensors, w2: Tensors,
    limit: float, rounding: bool,
) -> Tensor:  # fmt: skip
    w = [matrix_of(tensors) for tensors in (w1, w3, w2)]
    return packed_experts(x, ids, weight, w[0], w[1], w[2], limit, rounding)


def reference(
    x: Tensor,
    ids: Tensor,
    weight: Tensor,
    w1: Matrix,
    w3: Matrix,
    w2: Matrix,
    limit: float,
    rounding: bool,
) -> Tensor:
    """In plain torch; sums over a token's experts in the order of the experts."""
    k = ids.shape[1]
    flat = ids.reshape(-1)
    order = flat.argsort(stable=True)
    used, counts = torch.unique_consecutive(flat[order], return_counts=True)
    rounded = round_e4m3(x, ROUNDED) if rounding else x
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    start = 0
    for expert, count in zip(used.tolist(), counts.tolist(), strict=True):
        pairs = order[start : start + count]
        start += count
        if expert < 0:
            continue
        token = pairs // k
        mine = rounded[token]
        gate, up = (tiled_product(mine, w.of(expert)) for w in (w1, w3))
        h = swiglu(gate, up, limit)
        h *= weight.reshape(-1, 1)[pairs]
        h = h.to(x.dtype)
        y = tiled_product(round_e4m3(h, ROUNDED) if rounding else h, w2.of(expert))
        out.index_add_(0, token, y.float())
    return out.to(x.dtype)
