"""Launches of experts and packed linears as they are in production, with meta tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dsv4_plugin.kernels.experts.kernel import experts, packed_experts
from dsv4_plugin.kernels.norm.kernel import rounded_norm
from dsv4_plugin.kernels.packed import FP4Matrix, FP8Matrix, Matrix, NVFP4Matrix
from dsv4_plugin.kernels.packed.fp8 import (
    arranged,
    gated_product,
    grouped_product,
    product,
    round_rows,
)

BF16, BYTE = torch.bfloat16, torch.uint8
CHOSEN = 6


@dataclass(frozen=True)
class Model:
    """hidden and expert width, number of experts; inputs and outputs of two of its linears."""

    d: int
    f: int
    experts: int


FLASH, PRO = Model(4096, 2048, 256), Model(7168, 3072, 384)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def stack(kind: str, e: int, n_out: int, n_in: int) -> Matrix:
    if kind == "fp8":
        return FP8Matrix(
            meta(e, n_out, n_in, dtype=BYTE), meta(e, -(-n_out // 128), -(-n_in // 128))
        )
    data = meta(e, n_out, n_in // 2, dtype=BYTE)
    if kind == "fp4":
        return FP4Matrix(data, meta(e, n_out, n_in // 32, dtype=BYTE))
    return NVFP4Matrix(data, meta(e, n_out, n_in // 16, dtype=BYTE), meta(e))


def _experts(model: Model, kind: str, rows: int, ranks: int = 1) -> None:
    x = meta(rows, model.d, dtype=BF16)
    ids, weight = meta(rows, CHOSEN, dtype=torch.int64), meta(rows, CHOSEN)
    e, d, f = model.experts, model.d, model.f // ranks
    if kind == "plain":
        experts(x, ids, weight, meta(e, d, 2 * f, dtype=BF16), meta(e, f, d, dtype=BF16), 10.0)
        return
    w1, w3, w2 = (stack(kind, e, *shape) for shape in ((f, d), (f, d), (d, f)))
    packed_experts(x, ids, weight, w1, w3, w2, 10.0, kind != "nvfp4")


def _linear(rows: int, n_in: int, n_out: int, rounded: bool = True) -> None:
    matrix = FP8Matrix(meta(n_out, n_in, dtype=BYTE), meta(n_out // 128, n_in // 128))
    x = meta(rows, n_in, dtype=BF16)
    product(round_rows(x) if rounded else x, arranged(matrix, rounded))


def _gated(rows: int, n_in: int, width: int) -> None:
    matrix = FP8Matrix(meta(2 * width, n_in, dtype=BYTE), meta(width // 64, n_in // 128))
    gated_product(round_rows(meta(rows, n_in, dtype=BF16)), arranged(matrix, True), 10.0, True)


def _grouped(rows: int, groups: int, n_in: int, n_out: int) -> None:
    matrix = FP8Matrix(meta(groups * n_out, n_in, dtype=BYTE), meta(groups * n_out, n_in // 128), 1)
    grouped_product(meta(rows, groups, n_in, dtype=BF16), arranged(matrix, False), True)


def _normed(rows: int) -> None:
    rounded_norm(meta(rows, 1536, dtype=BF16), meta(1536), 1e-6)


CASES: dict[str, Callable[[], None]] = {
    "experts, Flash, bfloat16, decode": partial(_experts, FLASH, "plain", 1),
    "experts, Flash, bfloat16, prefill": partial(_experts, FLASH, "plain", 8192),
    "experts, Flash, MXFP4, decode": partial(_experts, FLASH, "fp4", 1),
    "experts, Flash, MXFP4, prefill": partial(_experts, FLASH, "fp4", 8192),
    "experts, Flash, NVFP4, decode": partial(_experts, FLASH, "nvfp4", 1),
    "experts, Flash, NVFP4, prefill": partial(_experts, FLASH, "nvfp4", 8192),
    "experts, Flash, FP8, decode": partial(_experts, FLASH, "fp8", 1),
    "experts, Flash, FP8, prefill": partial(_experts, FLASH, "fp8", 8192),
    "experts, Pro, MXFP4, decode on 8 ranks": partial(_experts, PRO, "fp4", 64, 8),
    "experts, Pro, MXFP4, decode of 1,024 on 8 ranks": partial(_experts, PRO, "fp4", 1024, 8),
    "FP8 linear, decode": partial(_linear, 1, 4096, 1536),
    "FP8 linear, decode of 64": partial(_linear, 64, 8192, 4096),
    "FP8 linear, prefill": partial(_linear, 8192, 1024, 32_768),
    "FP8 linear of inputs as they are, decode": partial(_linear, 1, 4096, 1536, False),
    "FP8 linear of inputs as they are, prefill": partial(_linear, 8192, 1024, 32_768, False),
    "latent norm, rounded": partial(_normed, 8192),
    "FP8 SwiGLU, decode": partial(_gated, 1, 4096, 2048),
    "FP8 SwiGLU, decode of 64": partial(_gated, 64, 4096, 2048),
    "FP8 SwiGLU, prefill": partial(_gated, 8192, 4096, 2048),
    "FP8 grouped linear, decode": partial(_grouped, 1, 8, 4096, 1024),
    "FP8 grouped linear, decode of 64": partial(_grouped, 64, 8, 4096, 1024),
    "FP8 grouped linear, prefill": partial(_grouped, 8192, 8, 4096, 1024),
}
