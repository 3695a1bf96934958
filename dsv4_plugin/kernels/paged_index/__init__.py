"""The indexer's choice on pages: queries, scores of compressed entries, an exact top-k.

Shapes: T rows, I indexer heads, c index_head_dim, N entries, k index_topk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsv4_plugin.kernels.dispatch import use_triton
from dsv4_plugin.kernels.paged import Paged
from dsv4_plugin.quant.e2m1 import round_mxfp4

SCORE_VALUES = 1 << 26
"""Most scores kept at a time (256 MiB): more rows take their turn."""


def choose(
    q: Tensor,
    weight: Tensor,
    cis: Tensor,
    keys: Paged,
    position: Tensor,
    request: Tensor,
    ratio: int,
    longest: int,
    k: int,
    tiles: bool = False,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The entries every row attends to: int32 [T, k] as `reference_topk`.

    Args:
        q, weight, cis: see `reference_queries`.
        keys, position, request, ratio: see `reference_scores`.
        longest: no request has more tokens.
        tiles: rows are neighbouring tokens of few requests.
        reduce: sums scores [T, n] over ranks, where each has some of the heads.
    """
    queries, scores, topk = _implementation(q.device)
    q, weight = queries(q, weight, cis, keys.pool.codec.kind)
    n = max(1, longest // ratio)
    size = max(1, SCORE_VALUES // n)
    found = []
    for first in range(0, max(1, len(q)), size):
        rows = slice(first, first + size)
        at = position[rows]
        score = scores(q[rows], weight[rows], keys, at, request[rows], ratio, n, tiles)
        found.append(topk(score if reduce is None else reduce(score), at, ratio, k))
    return found[0] if len(found) == 1 else torch.cat(found)


def _implementation(device: torch.device) -> tuple[Callable[..., Any], ...]:
    if not use_triton(device):
        return reference_queries, reference_scores, reference_topk
    from dsv4_plugin.kernels.paged_index import kernel

    return kernel.queries, kernel.scores, kernel.topk


def reference_queries(q: Tensor, weight: Tensor, cis: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Rotate index queries, and bring each head into float16's range by a power of two.

    Args:
        q: [T, I, c] in the model's dtype.
        weight: [T, I] in any float dtype.
        cis: float32 [T, rope_dim], (cos, sin) pairs.
        kind: the keys' format. Those of fp8 and fp4 were rounded under a Hadamard transform, which
            the query then gets too; for fp4 keys it is rounded as they are.

    Returns:
        float16 [T, I, c] with every head's largest value in [0.5, 1), and float32 [T, I]: the
        weights times what was divided out. (The score is linear in both.)
    """
    width, dim = cis.shape[1], q.shape[-1]
    pairs = torch.view_as_complex(q[..., -width:].float().unflatten(-1, (-1, 2)).contiguous())
    turned = pairs * torch.view_as_complex(cis.unflatten(-1, (-1, 2)).contiguous())[:, None]
    tail = torch.view_as_real(turned).flatten(-2)
    x = torch.cat([q[..., :-width].float(), tail.to(q.dtype).float()], -1)
    if kind != "bfloat16":
        for _ in range(dim.bit_length() - 1):
            a, b = x[..., 0::2], x[..., 1::2]
            x = torch.cat([a + b, a - b], -1)
        x = x * dim**-0.5
    if kind == "fp4":
        x = round_mxfp4(x)
    _, exponent = torch.frexp(x.abs().amax(-1))
    x = torch.ldexp(x, -exponent[..., None]).half()
    return x, torch.ldexp(weight.float(), exponent)


def reference_scores(
    q: Tensor,
    weight: Tensor,
    keys: Paged,
    position: Tensor,
    request: Tensor,
    ratio: int,
    n: int,
    tiles: bool = False,
) -> Tensor:
    """sum_h weight_h * relu(q_h . key): float32 [T, n], defined for the entries a row sees.

    q, weight: of `reference_queries`. position, request: int32 [T]; a row at position p sees
    (p + 1) // ratio entries, and none where p is -1.
    """
    out = torch.full((len(q), n), float("nan"), device=q.device)
    for t, p in enumerate(position.tolist()):
        index = torch.arange((p + 1) // ratio, device=q.device)
        rows, _ = keys.read(request[t].expand(len(index)), index)
        out[t, : len(index)] = weight[t] @ (q[t].float() @ rows.T).relu()
    return out


def reference_topk(score: Tensor, position: Tensor, ratio: int, k: int) -> Tensor:
    """The k best of the entries each row sees, lower entry first among equals.

    score float32 [T, N]; position int32 [T]. Returns int32 [T, k], ascending, -1 last.
    """
    out = torch.full((len(score), k), -1, dtype=torch.int32, device=score.device)
    for t, p in enumerate(position.tolist()):
        seen = (p + 1) // ratio
        best = score[t, :seen].sort(descending=True, stable=True).indices[:k]
        out[t, : len(best)] = best.sort().values
    return out
