"""With fewer passes over memory. Streams stay float32, though of values of the model's dtype."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from dsv4_plugin.kernels.norm.cpu import inverse_rms, rms_norm
from dsv4_plugin.kernels.packed import Both
from dsv4_plugin.kernels.packed.cpu import round_rows
from dsv4_plugin.kernels.streams import Mixer, Spread


def streams(
    out: Tensor | None, h: Tensor, by: Spread | None, mixer: Mixer
) -> tuple[Tensor, Tensor | Both, Spread | None]:
    dtype = h.dtype if out is None else out.dtype
    h32 = h.float() if out is None or by is None else spread(out, h, by).float()
    r = h.shape[1]
    flat = h32.flatten(1)
    m = torch.nn.functional.linear(flat, mixer.fn).mul_(inverse_rms(flat, mixer.norm_eps))
    m = torch.addcmul(mixer.base, m, mixer.scale)
    gates = m[:, : 2 * r].sigmoid()
    x = _weighted_sum(gates[:, :r, None] + mixer.eps, h32).to(dtype)
    if mixer.weight is not None:
        x = rms_norm(x, mixer.weight, mixer.norm_eps)
    if len(mixer.fn) == r:
        return h32, x, None
    mixing = sinkhorn(m[:, 2 * r :].unflatten(-1, (r, r)), mixer.iters, mixer.eps)
    given = Both(x, round_rows(x)) if mixer.rounds else x
    return h32, given, Spread(gates[:, r:] * 2, mixing)


def spread(out: Tensor, h: Tensor, by: Spread) -> Tensor:
    joined = torch.baddbmm(by.post[..., None] * out[:, None], by.mixing, h.float())
    return joined.to(out.dtype)


def _weighted_sum(weight: Tensor, h: Tensor) -> Tensor:
    """sum_i weight_i h_i: [T, R, 1], [T, R, D] -> [T, D]."""
    out = weight[:, 0] * h[:, 0]
    for i in range(1, h.shape[1]):
        out.addcmul_(weight[:, i], h[:, i])
    return out


def sinkhorn(logits: Tensor, iters: int, eps: float) -> Tensor:
    """The definition's, transposed ([T, target, source], contiguous).

    Row and column sums, already spread to every element, are products with a constant matrix:
    two operations where summing, adding eps and dividing would take three.
    """
    n, r, _ = logits.shape
    rows, columns = _sum_matrices(r, logits.device)
    c = logits.softmax(-1).add_(eps).view(n, r * r)
    bias, total = c.new_full((1,), eps), torch.empty_like(c)
    c.div_(torch.addmm(bias, c, columns, out=total))
    for _ in range(iters - 1):
        c.div_(torch.addmm(bias, c, rows, out=total))
        c.div_(torch.addmm(bias, c, columns, out=total))
    return c.view(n, r, r).transpose(1, 2).contiguous()


@lru_cache
def _sum_matrices(r: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """[R*R, R*R] matrices that put the sum of an element's row, or column, in its place."""
    row, column = torch.arange(r * r, device=device) // r, torch.arange(r * r, device=device) % r
    return (row[:, None] == row).float(), (column[:, None] == column).float()
