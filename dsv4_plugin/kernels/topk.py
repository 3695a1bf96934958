"""An exact top-k in torch whose result depends on nothing but the scores."""

from __future__ import annotations

import torch
from torch import Tensor


def stable_topk(score: Tensor, k: int) -> Tensor:
    """Indices int64 [n, k] of the k largest of float32 [n, N], in no order; lower index wins ties.

    Each score becomes an integer of the same order with the reversed index below it: all keys
    differ, so any top-k of them is this one, whatever the batch or backend.
    """
    bits = (score + 0.0).view(torch.int32)  # + 0.0: -0.0 and 0.0 are equal scores
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    rank = torch.arange(score.shape[-1] - 1, -1, -1, device=score.device)
    return ((ordered.long() << 32) | rank).topk(k, -1, sorted=False).indices
