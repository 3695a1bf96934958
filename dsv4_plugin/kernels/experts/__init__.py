"""Routed experts: clamped SwiGLU, routing weight applied before the down projection. Source: `MoE`
of the authors' inference/model.py.

Shapes: T tokens, k experts per token, E experts, D hidden size, F expert width.
"""

from __future__ import annotations

from torch import Tensor

from dsv4_plugin.kernels.dispatch import implementation
from dsv4_plugin.kernels.packed import Matrix


def experts(
    x: Tensor,
    ids: Tensor,
    weight: Tensor,
    w13: Tensor,
    w2: Tensor,
    limit: float,
    also: Tensor | None = None,
) -> Tensor:
    """x [T, D]; ids int64 [T, k]; weight float32 [T, k]; w13 [E, D, 2F]; w2 [E, F, D] -> [T, D].

    For the definition and Triton's kernels ids may be of no expert here (-1), which adds nothing.
    also [T, D]: what is added to the sum, when that is of x's dtype.
    """
    out: Tensor = implementation(__name__, x.device).experts(x, ids, weight, w13, w2, limit, also)
    return out


def joined(out: Tensor, also: Tensor | None) -> Tensor:
    """The sum and, if there is any, what is added to it."""
    return out if also is None else out + also


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
    """The same with weights that stay packed, each of all experts; ids may be -1 everywhere. Sums
    over a token's experts are float32.

    rounding: of the inputs of every product, by `round_inputs`.
    """
    out: Tensor = implementation(__name__, x.device).packed_experts(
        x, ids, weight, w1, w3, w2, limit, rounding, also
    )
    return out
