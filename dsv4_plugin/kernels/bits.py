"""Number formats by integer operations, for Triton kernels: the same bits on every architecture.

No fp8 types: sm80 and sm86 have none, and where they exist their conversions differ (some round
twice). All functions are exact; e4m3 NaN codes, which are never written, decode to +-480.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def e4m3_encode(x):
    """float32 to e4m3 codes (uint8): to nearest even, saturating at 448."""
    bits = x.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    rounded = size + 0x7FFFF + ((size >> 20) & 1)
    normal = tl.where(rounded >= 0x43F00000, 0x7E, (rounded >> 20) - (120 << 3))
    # Below 2^-6 codes count steps of 2^-9: adding 1.5 * 2^23 leaves that count in the low bits.
    steps = size.to(tl.float32, bitcast=True) * 512.0 + 12582912.0
    small = steps.to(tl.uint32, bitcast=True) & 0xF
    code = tl.where(size < 0x3C800000, small, normal)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def e4m3_decode(code):
    """e4m3 codes (uint8) to float32 values divided by 2^120: fold that into the scale."""
    wide = code.to(tl.uint32)
    return (((wide & 0x80) << 24) | ((wide & 0x7F) << 20)).to(tl.float32, bitcast=True)


E4M3_UNIT = tl.constexpr(2.0**120)
"""What `e4m3_decode` leaves out."""


@triton.jit
def e4m3_scale(largest):
    """The UE8M0 byte (uint32) and the inverse (float32) of 2^ceil(log2(max(largest, 1e-4) / 448)).

    448 is 1.75 * 2^8, so a mantissa above 1.75 takes the next power.
    """
    bits = tl.maximum(largest, 1e-4).to(tl.uint32, bitcast=True)
    byte = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.uint32)
    return byte, ((254 - byte) << 23).to(tl.float32, bitcast=True)


@triton.jit
def e4m3_block(x, AXIS: tl.constexpr):
    """float32 whose blocks lie along AXIS -> their codes (uint8); their scales, float32 powers of
    two, with 1 along AXIS."""
    byte, inverse = e4m3_scale(tl.max(tl.abs(x), AXIS, keep_dims=True))
    return e4m3_encode(x * inverse), ue8m0_decode(byte)


@triton.jit
def ue8m0_decode(byte):
    """UE8M0 bytes 1 .. 254 to float32 powers of two."""
    return (byte.to(tl.uint32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def halves(words, KIND: tl.constexpr):
    """int32 whose halves are bits of KIND, float16 or bfloat16: the lower ones and the upper."""
    low = words.to(tl.int16).to(KIND, bitcast=True)
    return low, (words >> 16).to(tl.int16).to(KIND, bitcast=True)


@triton.jit
def e4m3_codes(words, KIND: tl.constexpr):
    """The four e4m3 codes of int32 words, in order, as the values of KIND that have the same bits:
    divided by 2^8 in float16, by 2^120 in bfloat16."""
    if KIND == tl.float16:  # noqa: SIM300
        even = ((words & 0x00800080) << 8) | ((words & 0x007F007F) << 7)
        odd = (words & -0x7FFF8000) | ((words >> 1) & 0x3F803F80)
    else:
        even = ((words & 0x00800080) << 8) | ((words & 0x007F007F) << 4)
        odd = (words & -0x7FFF8000) | ((words >> 4) & 0x07F007F0)
    k0, k2 = halves(even, KIND)
    k1, k3 = halves(odd, KIND)
    return k0, k1, k2, k3


@triton.jit
def e2m1_codes(words, KIND: tl.constexpr):
    """The e2m1 codes at bits 0 and 16 of int32 words, as the values of KIND that have their bits:
    divided by 2^14 in float16, by 2^126 in bfloat16."""
    SHIFT: tl.constexpr = 9 if KIND == tl.float16 else 6  # noqa: SIM300
    return halves(((words & 0x00070007) << SHIFT) | ((words & 0x00080008) << 12), KIND)


@triton.jit
def int4_codes(words):
    """The codes at bits 0 and 16 of int32 words, 0 .. 15, as bfloat16 -8 .. 7: they are the last
    bits of 128 .. 143, whose spacing is 1."""
    low, high = halves((words & 0x000F000F) | 0x43004300, tl.bfloat16)
    return low - 136.0, high - 136.0
