"""One launch, a program per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4_plugin.kernels.packed import ROUNDED, Rounded
from dsv4_plugin.kernels.packed.fp8 import PLAIN, room, store_rounded_row
from dsv4_plugin.kernels.programmatic import follow, kernel


@kernel()
def normalise(
    x, weight, out, out_scale, stride, eps,
    D: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    follow()
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, COLUMNS)
    by = tl.load(weight + d, mask=d < D, other=0.0)
    y = tl.load(x + t * stride + d, mask=d < D, other=0.0).to(tl.float32)
    y = y * tl.rsqrt(tl.sum(y * y, 0) / D + eps)
    y = y * by
    if FORM == PLAIN:
        tl.store(out + t * D + d, y, mask=d < D)
    else:
        y = y.to(x.dtype.element_ty).to(tl.float32)
        store_rounded_row(y, out, out_scale, t, D, COLUMNS, BLOCK, FORM)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _normalise(x, weight, eps, out, out, PLAIN.value)
    return out


def rounded_norm(x: Tensor, weight: Tensor, eps: float) -> Rounded:
    out, to, scale, form = room(x.shape[0], x.shape[1], x.dtype, x.device)
    _normalise(x, weight, eps, to, scale, form)
    return out


def _normalise(x: Tensor, weight: Tensor, eps: float, to: Tensor, scale: Tensor, form: int) -> None:
    rows, d = x.shape
    assert x.stride(1) == 1
    assert weight.shape == (d,)
    columns = triton.next_power_of_2(d)
    normalise[(rows,)](
        x, weight, to, scale, x.stride(0), eps,
        D=d, COLUMNS=columns, BLOCK=min(ROUNDED, columns), FORM=form, num_warps=4,
    )  # fmt: skip
