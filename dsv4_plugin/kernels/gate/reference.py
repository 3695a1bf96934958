"""The definition, with experts in the order of their scores."""

from __future__ import annotations

import torch
from torch import Tensor


def gate(
    logits: Tensor,
    k: int,
    scale: float,
    bias: Tensor | None,
    table: Tensor | None,
    input_ids: Tensor,
    position: Tensor,
) -> tuple[Tensor, Tensor]:
    scores = torch.nn.functional.softplus(logits).sqrt()
    if table is not None:
        ids = table[input_ids].long()
    else:
        assert bias is not None
        ranked = scores + bias
        ids = ranked.argsort(dim=-1, descending=True, stable=True)[:, :k].contiguous()
    weight = scores.gather(1, ids)
    ids = ids.masked_fill(position[:, None] < 0, -1)
    return ids, weight / weight.sum(-1, keepdim=True) * scale
