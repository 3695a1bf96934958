"""The definition: a choice, and its three parts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsv4_plugin.cache.paged import Paged
from dsv4_plugin.cache.rows import RowFormat
from dsv4_plugin.cache.step import Step
from dsv4_plugin.kernels import exact
from dsv4_plugin.quant.e2m1 import round_mxfp4


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
    q, weight = queries(q, weight, cis, keys.pool.codec.format)
    n = max(1, step.longest // ratio)
    score = scores(q, weight, keys, step.position, step.request, ratio, n)
    return topk(reduce(score), step.position, ratio, k)


def queries(q: Tensor, weight: Tensor, cis: Tensor, keys: RowFormat) -> tuple[Tensor, Tensor]:
    """Rotate index queries, and bring each head into float16's range by a power of two.

    Args:
        q: [T, I, c] in the model's dtype.
        weight: [T, I] in any float dtype.
        cis: float32 [T, rope_dim], (cos, sin) pairs.
        keys: their format. Those of fp8 and fp4 were rounded under a Hadamard transform, which
            the query then gets too; for fp4 keys it is rounded as they are.

    Returns:
        float16 [T, I, c] with every head's largest value in [0.5, 1), and float32 [T, I]: the
        weights times what was divided out. (The score is linear in both.)
    """
    x = exact.rotate(q, cis).float()
    if keys in (RowFormat.FP8, RowFormat.FP4):
        x = exact.hadamard(x)
    if keys == RowFormat.FP4:
        x = round_mxfp4(x)
    _, exponent = torch.frexp(x.abs().amax(-1))
    x = torch.ldexp(x, -exponent[..., None]).half()
    return x, torch.ldexp(weight.float(), exponent)


def scores(
    q: Tensor,
    weight: Tensor,
    keys: Paged,
    position: Tensor,
    request: Tensor,
    ratio: int,
    n: int,
) -> Tensor:
    """sum_h weight_h * relu(q_h . key): float32 [T, n], defined for the entries a row sees.

    q, weight: of `queries`. position, request: int32 [T]; a row at position p sees
    (p + 1) // ratio entries, and none where p is -1.
    """
    out = torch.full((len(q), n), float("nan"), device=q.device)
    for t, p in enumerate(position.tolist()):
        index = torch.arange((p + 1) // ratio, device=q.device)
        rows, _ = keys.read(request[t].expand(len(index)), index)
        out[t, : len(index)] = weight[t] @ (q[t].float() @ rows.T).relu()
    return out


def topk(score: Tensor, position: Tensor, ratio: int, k: int) -> Tensor:
    """The k best of the entries each row sees, lower entry first among equals.

    score float32 [T, N]; position int32 [T]. Returns int32 [T, k], ascending, -1 last.
    """
    out = torch.full((len(score), k), -1, dtype=torch.int32, device=score.device)
    for t, p in enumerate(position.tolist()):
        seen = (p + 1) // ratio
        best = score[t, :seen].sort(descending=True, stable=True).indices[:k]
        out[t, : len(best)] = best.sort().values
    return out
