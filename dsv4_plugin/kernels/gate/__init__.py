"""The router: sqrt-softplus scores, the experts of each token, and their weights. Source: `Gate` of
the authors' inference/model.py.

Shapes: T tokens, E experts, k experts per token.
"""

from __future__ import annotations

from torch import Tensor

from dsv4_plugin.kernels.dispatch import implementation


def gate(
    logits: Tensor,
    k: int,
    scale: float,
    bias: Tensor | None,
    table: Tensor | None,
    input_ids: Tensor,
    position: Tensor,
) -> tuple[Tensor, Tensor]:
    """logits float32 [T, E] -> expert ids int64 [T, k], weights float32 [T, k], in any order.

    Either bias float32 [E]: the k best of score + bias, lower index first among equals. Or table
    int [vocab, k]: the experts of each token id, input_ids int [T]. Rows of padding, whose position
    int [T] is -1, choose no experts (-1), so that none is read for them; torch's fast way, which
    meets no padding worth the trouble, lets them choose.
    """
    found: tuple[Tensor, Tensor] = implementation(__name__, logits.device).gate(
        logits, k, scale, bias, table, input_ids, position
    )
    return found
