"""y = x W^T with the weight put once into the form that is multiplied fastest: on CPUs oneDNN's
blocks, or float16 where that loses nothing; on GPUs bfloat16 parts of float32 weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from dsv4_plugin.kernels.dispatch import use_triton

Product = Callable[[Tensor], Tensor]
"""[T, in] -> [T, out], in the weight's dtype."""

FP16_MAX = 65504.0
HEAD_ROWS = 16384
FP16_STEP = 2.0**-25
"""Largest rounding error of a value below float16's normal range."""


def reference(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, in], weight [out, in] -> [T, out]."""
    return torch.nn.functional.linear(x, weight)


def multiplied(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What values of `dtype` are multiplied as: float32 where a CPU has no bfloat16 products. (On
    those from before AVX-512 torch's own are up to 50 times slower than float32's.)"""
    slow = device.type == "cpu" and dtype == torch.bfloat16 and not _multiplies_bfloat16()
    return torch.float32 if slow else dtype


@cache
def _multiplies_bfloat16() -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack(weight: Tensor) -> Product:
    """A product with a fixed weight [out, in], which may be let go of afterwards.

    float32 weights that came from bfloat16 are kept as float16 where that loses nothing (sums stay
    float32): half the bytes to read, so small batches take half the time. Others are reordered
    for oneDNN, 2 to 4 times faster than torch's own product. Where the CPU has no products of
    bfloat16, such weights become float16 likewise.
    """
    if multiplied(weight.dtype, weight.device) != weight.dtype:
        wide, dtype = pack(weight.float()), weight.dtype
        return lambda x: wide(x.float()).to(dtype)
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and _fits_fp16(weight):
        half = torch.ops.quantized.linear_prepack_fp16(weight, None)
        return lambda x: torch.ops.quantized.linear_dynamic_fp16(x, half)
    if weight.device.type == "cpu" and torch.backends.mkldnn.is_available():
        reordered = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, reordered, None, "none", [], "")
    return lambda x: reference(x, weight)


def on_tensor_cores(weight: Tensor) -> Product | None:
    """A float32 product of values of the model's dtype with a float32 weight [out, in], which may
    be let go of; None where Triton's kernels do not run, or leave it to torch."""
    if not use_triton(weight.device):
        return None
    from dsv4_plugin.kernels.launch import pick
    from dsv4_plugin.kernels.linear import kernel

    if not pick(kernel.LAUNCHES).taken:
        return None
    parts = kernel.parts(weight)
    return lambda x: kernel.product(x, parts)


def pack_rows(weight: Tensor) -> Product:
    """The head's product: x of any float dtype -> float32, with float32 sums.

    On CPUs the weight [out, in] is packed as float32, HEAD_ROWS rows at a time: 129,280 would
    otherwise take six times their bytes while they are packed. On GPUs bfloat16 stays: it is half
    the bytes, and its products are exact in float32.
    """
    if weight.device.type == "cuda":
        return lambda x: _float32_sums(x, weight)
    parts = [pack(rows.float()) for rows in weight.split(HEAD_ROWS)]
    return lambda x: torch.cat([part(x.float()) for part in parts], -1)


def _float32_sums(x: Tensor, weight: Tensor) -> Tensor:
    if x.dtype == weight.dtype == torch.bfloat16:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return reference(x.float(), weight.float())


def _fits_fp16(weight: Tensor) -> bool:
    """Is every value a float16, to within half of float16's smallest step?"""
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return False
    if not bool(weight.abs().amax() < FP16_MAX):
        return False
    return bool((weight.half().float() - weight).abs().amax() <= FP16_STEP)
