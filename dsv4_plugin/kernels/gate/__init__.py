"""The router: sqrt-softplus scores, the experts of each token, and their weights.

Shapes: T tokens, E experts, k experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_plugin.kernels.custom_op import custom_op
from dsv4_plugin.kernels.dispatch import use_triton


@custom_op(
    "gate(Tensor logits, int k, float scale, Tensor? bias, Tensor? table, Tensor input_ids)"
    " -> (Tensor, Tensor)",
    lambda logits, k, *_: (
        logits.new_empty(len(logits), k, dtype=torch.int64),
        logits.new_empty(len(logits), k),
    ),
)
def gate(
    logits: Tensor,
    k: int,
    scale: float,
    bias: Tensor | None,
    table: Tensor | None,
    input_ids: Tensor,
) -> tuple[Tensor, Tensor]:
    """As `reference`."""
    if not use_triton(logits.device):
        return reference(logits, k, scale, bias, table, input_ids)
    from dsv4_plugin.kernels.gate import kernel

    return kernel.gate(logits, k, scale, bias, table, input_ids)


def reference(
    logits: Tensor,
    k: int,
    scale: float,
    bias: Tensor | None,
    table: Tensor | None,
    input_ids: Tensor,
) -> tuple[Tensor, Tensor]:
    """logits float32 [T, E] -> expert ids int64 [T, k], weights float32 [T, k].

    Either bias float32 [E]: the k best of score + bias, lower index first among equals, in order of
    score. Or table int [vocab, k]: the experts of each token id, input_ids int [T].
    """
    scores = torch.nn.functional.softplus(logits).sqrt()
    if table is not None:
        ids = table[input_ids].long()
    else:
        assert bias is not None
        ranked = scores + bias
        ids = ranked.argsort(dim=-1, descending=True, stable=True)[:, :k].contiguous()
    weight = scores.gather(1, ids)
    return ids, weight / weight.sum(-1, keepdim=True) * scale
