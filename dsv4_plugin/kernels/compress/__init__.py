"""The Compressor's work on a step: pool, finish and write entries, keep the open window's state.

A state is (max, sum, weighted sum) per channel: the softmax-weighted mean of any set of tokens.
For CSA, half 0 of a window's channels is what the next window pools too, half 1 is its own entry.

Source: `Compressor` of the authors' inference/model.py, whose open windows are sums here.

A request may start from a cached page that another one fills in the same step: segments that read
a carry come after all others, none of which depends on them.

Shapes: T rows, S segments (a window's tokens in this step), h halves, C channels of a half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_plugin.cache.layer import LayerCache
from dsv4_plugin.cache.rows import RowFormat, RowPool
from dsv4_plugin.cache.step import Step
from dsv4_plugin.kernels.dispatch import implementation


@dataclass(frozen=True)
class Target:
    """One compressor: where its entries go, and how they are finished.

    offset: words from a page's start to the first of its rows. weight: float32, of the norm, as
    wide as its channels. rotate: Hadamard-transform entries, for quantised indexer keys.
    """

    pool: RowPool
    offset: int
    weight: Tensor
    rotate: bool = False


@dataclass(frozen=True)
class State:
    """What lasts between steps: rings of `rows` states [h, 3, C], the one after position p in row
    p % rows, and, for CSA, the pages' carries [2, C]."""

    ring: RowPool
    rows: int
    carry: RowPool | None
    carry_offset: int


def of_cache(cache: LayerCache, weights: Sequence[Tensor]) -> tuple[list[Target], State]:
    """A layer's compressors and what they keep; weights: of the norms of entries and of keys."""
    assert cache.kv is not None
    assert cache.sums is not None
    parts = cache.layout.page[cache.ratio].parts
    targets, carry = [Target(cache.kv, parts["kv"].offset, weights[0])], 0
    if cache.key is not None:
        # Under a Hadamard transform, which decides how quantised keys round.
        quantised = cache.key.codec.format in (RowFormat.FP8, RowFormat.FP4)
        targets.append(Target(cache.key, parts["key"].offset, weights[1], quantised))
        carry = parts["carry"].offset
    return targets, State(cache.sums, cache.layout.ring_rows, cache.carry, carry)


def compress(
    y: Tensor,
    ape: Tensor,
    eps: float,
    step: Step,
    ratio: int,
    targets: list[Target],
    state: State,
    dtype: torch.dtype,
) -> None:
    """Pool y [T, 2, h, C] (kv and gate products), with the gate's position bias ape [ratio, h, C].

    targets: one or two compressors, whose channels lie side by side in C. dtype: the model's, to
    which entries are rounded when pooled, normed and rotated. Writes the entries of
    windows that this step completes, carries of pages it fills, and the ring: the state after a
    request's last token, and after each where it brings no more tokens than a ring has rows.
    """
    work = implementation(__name__, y.device)
    work.compress(y, ape, eps, step, ratio, targets, state, dtype)
