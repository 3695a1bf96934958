"""Number formats by integer operations, for Triton kernels: the same bits on every architecture.

No fp8 types: sm80 and sm86 have none, and where they exist their conversions differ (some round
twice). All functions are exact; e4m3 NaN codes, which are never written, decode to +-480.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dsv4_plugin.kernels.pin import takes_ptx


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
def e4m3_pairs(words, KIND: tl.constexpr):
    """The four e4m3 codes of int32 words as two words of two values of KIND that have the same
    bits, divided by 2^8 in float16, by 2^120 in bfloat16: of codes 0 and 2, of codes 1 and 3."""
    FIRST: tl.constexpr = 7 if KIND == tl.float16 else 4  # noqa: SIM300
    even = ((words & 0x00800080) << 8) | ((words & 0x007F007F) << FIRST)
    odd = (words & -0x7FFF8000) | ((words >> (8 - FIRST)) & (0x007F007F << FIRST))
    return even, odd


@triton.jit
def e4m3_codes(words, KIND: tl.constexpr):
    """The same as four values of KIND, in order."""
    even, odd = e4m3_pairs(words, KIND)
    k0, k2 = halves(even, KIND)
    k1, k3 = halves(odd, KIND)
    return k0, k1, k2, k3


@triton.jit
def e2m1_pairs(words, KIND: tl.constexpr):
    """The eight e2m1 codes of int32 words as four words of two values of KIND that have their bits,
    divided by 2^14 in float16, by 2^126 in bfloat16: codes 0 and 4, 1 and 5, 2 and 6, 3 and 7."""
    return (
        _e2m1_pair(words << 12, KIND), _e2m1_pair(words << 8, KIND),
        _e2m1_pair(words << 4, KIND), _e2m1_pair(words, KIND),
    )  # fmt: skip


@triton.jit
def _e2m1_pair(words, KIND: tl.constexpr):
    """Of the codes at bits 12 and 28."""
    DOWN: tl.constexpr = 3 if KIND == tl.float16 else 6  # noqa: SIM300
    return (words & -0x7FFF8000) | ((words >> DOWN) & (0x70007000 >> DOWN))


@triton.jit
def int4_pairs(words):
    """The eight codes of int32 words, 0 .. 15, as four words of two bfloat16 values -8 .. 7, paired
    as e2m1's: they are the last bits of 128 .. 143, whose spacing is 1."""
    return (
        _int4_pair(words), _int4_pair(words >> 4), _int4_pair(words >> 8), _int4_pair(words >> 12)
    )  # fmt: skip


@triton.jit
def _int4_pair(words):
    return fma_pairs((words & 0x000F000F) | 0x43004300, 0x3F803F80, -0x3CF73CF8)  # * 1 - 136


@triton.jit
def fma_pairs(a, b, c):
    """a * b + c of words of two bfloat16 values, whose results are bfloat16 or are rounded. NVIDIA
    has an instruction for both; of the two alone Triton makes two, and moves between them."""
    if takes_ptx():
        found = tl.inline_asm_elementwise(
            "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], tl.int32, True, 1
        )
    else:
        zeros = tl.zeros(a.shape, tl.int32)
        a0, a1 = halves(a, tl.bfloat16)
        b0, b1 = halves(zeros + b, tl.bfloat16)
        c0, c1 = halves(zeros + c, tl.bfloat16)
        low = a0.to(tl.float32) * b0.to(tl.float32) + c0.to(tl.float32)
        high = a1.to(tl.float32) * b1.to(tl.float32) + c1.to(tl.float32)
        low = low.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        found = low | (high.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) << 16)
    return found


@triton.jit
def scaled_pairs(pairs, factors):
    """Products of words of two bfloat16 values."""
    return fma_pairs(pairs, factors, -0x7FFF8000)  # both -0.0, which leaves zeros their sign


@triton.jit
def twice(x):
    """Words whose halves are both bfloat16 x."""
    bits = x.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return bits | (bits << 16)


@triton.jit
def side_by_side(pairs):
    """Words [N, W] of two bfloat16 values -> these [N, 2 W], as they lie in registers."""
    low, high = halves(pairs, tl.bfloat16)
    return tl.reshape(tl.join(low, high), (pairs.shape[0], 2 * pairs.shape[1]))
