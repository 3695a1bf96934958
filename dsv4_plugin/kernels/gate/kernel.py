"""One launch, a program per token; the k best one after another, by keys that all differ.

The experts' first launch is another: where it places the pairs it needs every token's choice, with
data-parallel ranks those of others too, and so would have to wait for all of these programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_plugin.kernels.launch import require
from dsv4_plugin.kernels.programmatic import follow, kernel


@triton.jit
def _score(logit):
    """sqrt(softplus(logit)), softplus in the form that keeps large and tiny ones."""
    e = tl.exp(-tl.abs(logit))
    # log(1 + e) loses e below float32's spacing at 1: divide by what was rounded away.
    near = 1.0 + e
    lost = near == 1.0
    log1p = tl.where(lost, e, tl.log(near) * (e / tl.where(lost, 1.0, near - 1.0)))
    return tl.sqrt(tl.maximum(logit, 0.0) + log1p)


@kernel()
def route(
    logits,
    bias,
    table,
    input_ids,
    position,
    ids_out,
    weight_out,
    stride,
    scale,
    E: tl.constexpr,
    K: tl.constexpr,
    EXPERTS: tl.constexpr,
    PLACES: tl.constexpr,
    HASH: tl.constexpr,
):
    follow()
    t = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, PLACES)
    real = tl.load(position + t) >= 0
    if HASH:
        token = tl.load(input_ids + t).to(tl.int64)
        ids = tl.load(table + token * K + place, mask=place < K, other=0).to(tl.int64)
        logit = tl.load(logits + t * stride + ids, mask=place < K, other=0.0).to(tl.float32)
        weight = tl.where(place < K, _score(logit), 0.0)
    else:
        e = tl.arange(0, EXPERTS)
        correction = tl.load(bias + e, mask=e < E, other=0.0)
        logit = tl.load(logits + t * stride + e, mask=e < E, other=0.0).to(tl.float32)
        score = _score(logit)
        # Zero, so that no sum is -0.0; by the position, which else is asked for after a wait.
        ranked = score + correction + tl.where(real, 0.0, -0.0)
        bits = ranked.to(tl.int32, bitcast=True)
        ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
        lowest = -9223372036854775808
        key = tl.where(e < E, (ordered << 32) | (EXPERTS - 1 - e), lowest)
        ids = tl.zeros((PLACES,), tl.int64)
        weight = tl.zeros((PLACES,), tl.float32)
        for i in tl.static_range(K):
            best = tl.max(key, 0)
            chosen = key == best
            ids = tl.where(place == i, EXPERTS - 1 - (best & 0xFFFFFFFF), ids)
            weight = tl.where(place == i, tl.sum(tl.where(chosen, score, 0.0), 0), weight)
            key = tl.where(chosen, lowest, key)
    weight = weight / tl.sum(weight, 0) * scale
    ids = tl.where(real, ids, -1)  # Padding chooses none.
    tl.store(ids_out + t * K + place, ids, mask=place < K)
    tl.store(weight_out + t * K + place, weight, mask=place < K)


def gate(
    logits: Tensor,
    k: int,
    scale: float,
    bias: Tensor | None,
    table: Tensor | None,
    input_ids: Tensor,
    position: Tensor,
) -> tuple[Tensor, Tensor]:
    tokens, experts = logits.shape
    require(bias, table, input_ids, position)
    assert logits.stride(1) == 1
    ids = torch.empty((tokens, k), dtype=torch.int64, device=logits.device)
    weight = torch.empty((tokens, k), dtype=torch.float32, device=logits.device)
    route[(tokens,)](
        logits, logits if bias is None else bias, ids if table is None else table, input_ids,
        position, ids, weight, logits.stride(0), scale,
        E=experts, K=k, EXPERTS=triton.next_power_of_2(experts),
        PLACES=triton.next_power_of_2(k), HASH=table is not None, num_warps=1,
    )  # fmt: skip
    return ids, weight
