"""Attention over the window and compressed rows of the cache, read where they lie.

Softmax over window rows and compressed rows together, with a per-head sink in the denominator;
keys are values. RoPE is undone on the output. One row of the batch is one query. Source:
`sparse_attn` of the authors' inference/kernel.py; the rows' formats are in `cache.rows`.

Shapes: T rows, H heads of this rank, d head_dim, k chosen entries.
"""

from __future__ import annotations

from torch import Tensor

from dsv4_plugin.cache.paged import Paged
from dsv4_plugin.cache.step import Step
from dsv4_plugin.kernels.dispatch import implementation


def attention(
    q: Tensor,
    sink: Tensor,
    cis: Tensor,
    step: Step,
    window: Paged,
    sliding_window: int,
    entries: Paged | None = None,
    ratio: int = 0,
    chosen: Tensor | None = None,
) -> Tensor:
    """q [T, H, d], rotated but not scaled -> [T, H, d] in q's dtype; zero for rows of padding.

    Args:
        sink: float32 [H].
        cis: float32 [T, rope_dim], (cos, sin) pairs.
        sliding_window: positions a query sees of its window, `step.sees` the last of them.
        entries: compressed rows, of which a query at position p may see (p + 1) // ratio.
        chosen: int32 [T, k], the entries each query attends to, -1 for none; all where None.
    """
    out: Tensor = implementation(__name__, q.device).attention(
        q, sink, cis, step, window, sliding_window, entries, ratio, chosen
    )
    return out
