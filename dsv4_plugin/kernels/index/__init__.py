"""The indexer's choice: queries, scores of compressed entries, an exact top-k. Source: `Indexer` of
the authors' inference/model.py.

Shapes: T rows, I indexer heads, c index_head_dim, N entries, k index_topk.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from dsv4_plugin.cache.paged import Paged
from dsv4_plugin.cache.step import Step
from dsv4_plugin.kernels.dispatch import implementation


def choose(
    q: Tensor,
    weight: Tensor,
    cis: Tensor,
    keys: Paged,
    step: Step,
    ratio: int,
    k: int,
    reduce: Callable[[Tensor], Tensor],
) -> Tensor:
    """The k best of the entries each row sees, lower entry first among equals: int32 [T, k], -1 in
    the places that are left over.

    Args:
        q: [T, I, c] in the model's dtype, before RoPE; may be overwritten.
        weight: of the heads, [T, I] in any float dtype. A positive factor of all scores is left
            out: it changes no choice.
        cis: float32 [T, rope_dim], (cos, sin) pairs.
        keys: a row at position p sees the first (p + 1) // ratio of its request.
        reduce: sums scores [T, n] over ranks, where each has some of the heads.
    """
    work = implementation(__name__, q.device)
    found: Tensor = work.choose(q, weight, cis, keys, step, ratio, k, reduce)
    return found
