"""The definitions, a token and an expert at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_plugin.kernels.experts import joined
from dsv4_plugin.kernels.packed import Matrix
from dsv4_plugin.kernels.packed.reference import product, round_inputs
from dsv4_plugin.kernels.swiglu.reference import swiglu


def experts(
    x: Tensor,
    ids: Tensor,
    weight: Tensor,
    w13: Tensor,
    w2: Tensor,
    limit: float,
    also: Tensor | None = None,
) -> Tensor:
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for t in range(len(x)):
        for e, w in zip(ids[t].tolist(), weight[t], strict=True):
            if e < 0:
                continue
            gate, up = (x[t] @ w13[e]).chunk(2)
            out[t] += ((swiglu(gate, up, limit, torch.float32) * w).to(x.dtype) @ w2[e]).float()
    return joined(out.to(x.dtype), also)


def packed_experts(
    x: Tensor,
    ids: Tensor,
    weight: Tensor,
    w1: Matrix,
    w3: Matrix,
    w2: Matrix,
    limit: float,
    rounding: bool,
    also: Tensor | None = None,
) -> Tensor:
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    rounded = round_inputs(x) if rounding else x
    for t in range(len(x)):
        for e, share in zip(ids[t].tolist(), weight[t], strict=True):
            if e < 0:
                continue
            gate, up = (product(rounded[t : t + 1], w.of(e)) for w in (w1, w3))
            h = (swiglu(gate, up, limit, torch.float32) * share).to(x.dtype)
            out[t] += product(round_inputs(h) if rounding else h, w2.of(e))[0].float()
    return joined(out.to(x.dtype), also)
