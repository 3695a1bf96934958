"""A top-k of keys that all differ, where the definition sorts."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_plugin.kernels.topk import stable_topk


def gate(
    logits: Tensor,
    k: int,
    scale: float,
    bias: Tensor | None,
    table: Tensor | None,
    input_ids: Tensor,
    position: Tensor,
) -> tuple[Tensor, Tensor]:
    scores = torch.nn.functional.softplus(logits).sqrt_()
    if table is not None:
        ids = table[input_ids].long()
    else:
        assert bias is not None
        ids = stable_topk(scores + bias, k)
    weight = scores.gather(1, ids)
    return ids, weight / weight.sum(-1, keepdim=True) * scale
