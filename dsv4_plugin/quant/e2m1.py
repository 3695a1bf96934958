"""FP4 e2m1 values, two to a byte, and the two ways of scaling them.

MXFP4: a UE8M0 scale per 32 values. NVFP4: an e4m3 scale per 16 values, under one float32 scale per
tensor. The low nibble is the even index.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from dsv4_plugin.quant.e4m3 import (
    E4M3_MAX,
    UE8M0_BIAS,
    decode_ue8m0,
    e4m3_values,
    encode_e4m3,
    round_to_bits,
)

E2M1_MAX = 6.0
MIN_AMAX = 6.0 * 2.0**-126
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MX_BLOCK, NV_BLOCK = 32, 16
LOOKED_UP = 62
"""Values come out of the table divided by 2^62: adding a scale's exponent to their bits then turns
a zero into 2^-64 times the block's smallest step, nothing beside any float32 sum."""


def encode_e2m1(x: Tensor) -> Tensor:
    """Codes 0 .. 15 (uint8) of the nearest e2m1 values, ties to even, beyond +-6 saturated.

    NaN, which e2m1 lacks, becomes 0.
    """
    a = x.abs()
    code = (a > 0.25).to(torch.uint8)
    for middle, tie_up in ((0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True)):
        code += a >= middle if tie_up else a > middle
    code += a > 5.0
    return code | (torch.signbit(x) & ~x.isnan()).to(torch.uint8) << 3


def decode_e2m1(codes: Tensor) -> Tensor:
    """The float32 values of codes 0 .. 15."""
    values = torch.tensor(MAGNITUDES, device=codes.device)
    return torch.cat([values, -values])[codes.long()]


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes [..., D], D even -> bytes uint8 [..., D / 2]."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack_nibbles(data: Tensor) -> Tensor:
    """Bytes uint8 [..., D / 2] -> codes [..., D]."""
    return torch.stack([data & 15, data >> 4], -1).flatten(-2)


def quantise_mxfp4(x: Tensor, block: int = MX_BLOCK) -> tuple[Tensor, Tensor]:
    """Quantise blocks of the last dim; scale = 2^ceil(log2(max(amax, 6 * 2^-126) / 6)).

    Args:
        x: float [..., D], D a multiple of `block`.

    Returns:
        Bytes uint8 [..., D / 2] and UE8M0 bytes uint8 [..., D / block].
    """
    blocks = x.float().unflatten(-1, (-1, block))
    mantissa, exponent = torch.frexp(blocks.abs().amax(-1).clamp(min=MIN_AMAX) / E2M1_MAX)
    exponent = exponent - (mantissa == 0.5).int()
    codes = encode_e2m1(torch.ldexp(blocks, -exponent[..., None]).flatten(-2))
    return pack_nibbles(codes), (exponent + UE8M0_BIAS).to(torch.uint8)


def decode_mxfp4(data: Tensor, scales: Tensor, block: int = MX_BLOCK) -> Tensor:
    """Bytes uint8 [..., D / 2], UE8M0 bytes [..., D / block] -> float32 [..., D]."""
    values = decode_e2m1(unpack_nibbles(data)).unflatten(-1, (-1, block))
    out: Tensor = (values * decode_ue8m0(scales)[..., None]).flatten(-2)
    return out


def nvfp4_global_scale(x: Tensor) -> Tensor:
    """The float32 scale of a whole tensor: block scales then use all of e4m3's range."""
    return x.abs().amax().float() / (E2M1_MAX * E4M3_MAX)


def quantise_nvfp4(x: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise blocks of 16 of the last dim under a float32 scale of the whole tensor.

    Returns bytes uint8 [..., D / 2] and e4m3 scale codes uint8 [..., D / 16].
    """
    blocks = x.float().unflatten(-1, (-1, NV_BLOCK)) / global_scale.clamp(min=1e-38)
    scales = encode_e4m3(blocks.abs().amax(-1) / E2M1_MAX)
    divisor = e4m3_values(scales).clamp(min=2.0**-9)  # the smallest e4m3; below it all codes are 0
    return pack_nibbles(encode_e2m1((blocks / divisor[..., None]).flatten(-2))), scales


def decode_nvfp4(data: Tensor, scales: Tensor, global_scale: Tensor) -> Tensor:
    """Bytes uint8 [..., D / 2], e4m3 codes [..., D / 16], float32 scale -> float32 [..., D]."""
    values = decode_e2m1(unpack_nibbles(data)).unflatten(-1, (-1, NV_BLOCK))
    out: Tensor = (values * e4m3_values(scales)[..., None]).flatten(-2)
    return out * global_scale


def look_up(
    data: Tensor,
    words: Tensor | None = None,
    quads: Tensor | None = None,
    table: Tensor | None = None,
) -> Tensor:
    """bfloat16 values / 2^62 of bytes uint8 [..., D / 2], D a multiple of 4 -> [..., D].

    One table access per 16 bits: 5 billion values a second on 2 cores.

    Args:
        table: of other values, int64 [65536] as `_quads` has them.
        words, quads: int32 and int64 scratch, an element per two bytes; the result is in quads.
    """
    pairs = data.view(torch.uint16).reshape(-1)
    words = pairs.to(torch.int32) if words is None else words.copy_(pairs)
    if quads is None:
        quads = torch.empty_like(words, dtype=torch.int64)
    table = _quads(data.device) if table is None else table
    torch.index_select(table, 0, words, out=quads)
    return quads.view(torch.bfloat16).view(*data.shape[:-1], -1)


def look_up_mxfp4(
    data: Tensor, scales: Tensor, words: Tensor | None = None, quads: Tensor | None = None
) -> Tensor:
    """`decode_mxfp4` for products: exact bfloat16 but for zeros (see LOOKED_UP), and for scales
    below 2^-62, which count as 2^-62."""
    exponent = scales.to(torch.int16).sub_(UE8M0_BIAS - LOOKED_UP).clamp_(0, 186)
    bits = look_up(data, words, quads).view(torch.int16).unflatten(-1, (-1, MX_BLOCK))
    bits.add_(exponent.bitwise_left_shift_(7)[..., None])
    out: Tensor = bits.flatten(-2).view(torch.bfloat16)
    return out


@lru_cache
def _quads(device: torch.device) -> Tensor:
    """The four bfloat16 values / 2^62 of every 16-bit word, as one int64: [65536]."""
    word = torch.arange(1 << 16, device=device)
    codes = torch.stack([word >> shift & 15 for shift in (0, 4, 8, 12)], -1)
    values = decode_e2m1(codes) * 2.0**-LOOKED_UP
    return values.to(torch.bfloat16).view(torch.int64).view(-1)


def round_mxfp4(x: Tensor) -> Tensor:
    """The float32 values that `quantise_mxfp4` of float [..., D] stands for."""
    blocks = x.float().unflatten(-1, (-1, MX_BLOCK))
    ratio = blocks.abs().amax(-1, keepdim=True).clamp(min=MIN_AMAX) / E2M1_MAX
    exponent = (ratio.view(torch.int32) + 0x7FFFFF) >> 23  # biased, rounded up
    scaled = blocks * (254 - exponent << 23).view(torch.float32)
    out: Tensor = round_to_bits(scaled, 1, 0).mul_((exponent << 23).view(torch.float32)).flatten(-2)
    return out
