"""mHC between sublayers: spread an output over the R streams, collapse them to the next input.
Source: `hc_post`, `hc_pre` and `hc_split_sinkhorn` of the authors' inference files.

Shapes: T tokens, R streams, D hidden size, N outputs of the mixing product: (2 + R) * R, or R for
the head.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dsv4_plugin.kernels.dispatch import implementation
from dsv4_plugin.kernels.packed import Both


@dataclass(frozen=True)
class Mixer:
    """The weights of one collapse: fn [N, R * D], base [N], scale [N], float32, and the norm of
    the sublayer behind it, weight float32 [D]; None: what is collapsed stays as it is. rounds: the
    sublayer has FP8 products, which take its input rounded."""

    fn: Tensor
    base: Tensor
    scale: Tensor
    weight: Tensor | None
    iters: int
    eps: float
    norm_eps: float
    rounds: bool = False


@dataclass(frozen=True)
class Spread:
    """How a sublayer's output returns to the streams, float32: post [T, R] weighs the output,
    mixing [T, R, R] the streams, [target, source]."""

    post: Tensor
    mixing: Tensor


def streams(
    out: Tensor | None, h: Tensor, by: Spread | None, mixer: Mixer
) -> tuple[Tensor, Tensor | Both, Spread | None]:
    """Let a sublayer's output join the streams, and collapse them to the next sublayer's input.

    out [T, D], the last output, which joins by `by` (both None: h is as it should be); h [T, R, D]
    in the model's dtype. Returns h' [T, R, D], from torch's fast way in float32 though of the
    same values; the normed input x [T, D], also rounded if the mixer rounds; how the output of that
    will join (None for the head).
    """
    found: tuple[Tensor, Tensor | Both, Spread | None] = implementation(__name__, h.device).streams(
        out, h, by, mixer
    )
    return found


def spread(out: Tensor | None, h: Tensor, by: Spread | None) -> Tensor:
    """h'[k] = post[k] * out + sum_j mixing[k, j] h[j], summed in float32: out [T, D], h [T, R, D]
    -> h's shape, out's dtype. The join alone, of the values that `streams` returns."""
    if out is None or by is None:
        return h
    joined: Tensor = implementation(__name__, h.device).spread(out, h, by)
    return joined
