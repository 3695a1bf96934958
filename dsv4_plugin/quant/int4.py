"""Symmetric int4 under a scale per block of the input dim, compressed-tensors' `pack-quantized`.

Codes 0 .. 15 mean -8 .. 7; eight lie in an int32 word, the lowest nibble first. GPTQ's layout is
the same, transposed.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from dsv4_plugin.quant.e2m1 import pack_nibbles, unpack_nibbles

ZERO = 8
"""The code of 0."""
LARGEST = 7.5
"""Half of what the codes span: the largest value of a block is this many steps."""


def quantise_int4(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Round blocks of the last dim to the nearest of 16 values, as compressed-tensors does.

    Returns bytes uint8 [..., D / 2] and bfloat16 scales [..., D / block].
    """
    blocks = x.float().unflatten(-1, (-1, block))
    scales = (blocks.abs().amax(-1) / LARGEST).to(torch.bfloat16)
    step = scales.float().clamp(min=torch.finfo(torch.bfloat16).tiny)[..., None]
    codes = (blocks / step).round().clamp(-8, 7).add(ZERO).to(torch.uint8)
    return pack_nibbles(codes.flatten(-2)), scales


def decode_int4(data: Tensor, scales: Tensor) -> Tensor:
    """Bytes uint8 [..., D / 2], scales [..., blocks] -> float32 [..., D]."""
    values = unpack_nibbles(data).float().sub_(ZERO).unflatten(-1, (scales.shape[-1], -1))
    out: Tensor = (values * scales.float()[..., None]).flatten(-2)
    return out


def from_gptq(qweight: Tensor) -> Tensor:
    """int32 [D / 8, out] of GPTQ -> bytes uint8 [out, D / 2]."""
    return qweight.t().contiguous().view(torch.uint8)


def to_gptq(data: Tensor) -> Tensor:
    """Bytes uint8 [out, D / 2] -> int32 [D / 8, out] of GPTQ."""
    return data.view(torch.int32).t().contiguous()


GPTQ_ZEROS = (0x77777777, -0x77777778)
"""Words of GPTQ's `qzeros` that mean ZERO: its first form has one less in each of eight nibbles,
the second the zero itself."""


@lru_cache
def int4_quads(device: torch.device) -> Tensor:
    """The four bfloat16 values of every 16-bit word, as one int64: [65536]."""
    word = torch.arange(1 << 16, device=device)
    codes = torch.stack([word >> shift & 15 for shift in (0, 4, 8, 12)], -1)
    return (codes - ZERO).to(torch.bfloat16).view(torch.int64).view(-1)
