"""The indexer's choice: scores of compressed entries and an exact, deterministic top-k.

Shapes: n queries, I indexer heads, c index_head_dim, N entries, k index_topk.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reference(q: Tensor, weight: Tensor, keys: Tensor, visible: Tensor, k: int) -> Tensor:
    """The k best visible entries of each query, lower index first among equals, -1 where fewer.

    q float32 [n, I, c]; weight float32 [n, I]; keys float32 [n, N, c]; visible int64 [n].
    Returns int64 [n, k], ascending with -1 last.
    """
    score = torch.einsum("nic,nmc->nim", q, keys).relu()
    score = torch.einsum("nim,ni->nm", score, weight)
    out = torch.full((len(q), k), -1)
    for i, count in enumerate(visible.tolist()):
        row = score[i].tolist()
        best = sorted(sorted(range(count), key=lambda m: (-row[m], m))[:k])
        out[i, : len(best)] = torch.tensor(best, dtype=torch.int64)
    return out


def scores(q: Tensor, weight: Tensor, keys: Tensor) -> Tensor:
    """sum_h weight_h * relu(q_h . key): float32 [n, N]. keys [N, c] (shared) or [n, N, c]."""
    n, heads, c = q.shape
    if keys.dim() == 3:
        s = torch.bmm(q, keys.transpose(1, 2))
    else:
        s = (q.reshape(n * heads, c) @ keys.t()).view(n, heads, -1)
    return torch.bmm(weight[:, None], s.relu_())[:, 0]


def stable_topk(score: Tensor, k: int) -> Tensor:
    """Indices int64 [n, k] of the k largest of float32 [n, N], in no order; lower index wins ties.

    Each score becomes an integer of the same order with the reversed index below it: all keys
    differ, so any top-k of them is this one, whatever the batch or backend.
    """
    bits = (score + 0.0).view(torch.int32)  # + 0.0: -0.0 and 0.0 are equal scores
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    rank = torch.arange(score.shape[-1] - 1, -1, -1, device=score.device)
    return ((ordered.long() << 32) | rank).topk(k, -1, sorted=False).indices


def select(score: Tensor, visible: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each query's first `visible` entries; needs k <= N.

    Returns indices int64 [n, k] in no order, and a mask [n, k] of places left over where fewer
    than k are visible (their index is any in 0 .. N-1).
    """
    entry = torch.arange(score.shape[1], device=score.device)
    index = stable_topk(score.masked_fill(entry >= visible[:, None], float("-inf")), k)
    return index, index >= visible[:, None]
