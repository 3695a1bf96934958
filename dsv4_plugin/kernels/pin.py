"""A fence for Triton's layouts, where the compiler would repeat work in every warp."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import is_cuda


@triton.constexpr_function
def takes_ptx() -> bool:
    """Is the kernel compiled for a chip of NVIDIA's, so that it may hold instructions of theirs?"""
    return bool(is_cuda()) and not triton.knobs.runtime.interpret


@triton.jit
def pin(x):
    """x, of 2 or 4 bytes, computed once, in the layout in which it was made.

    What becomes an operand of `tl.dot` Triton computes from its inputs on in the operand's layout,
    in which each of 4 warps holds all of it: four times the work, where a product is narrow. It
    does not move an instruction that is not pure. Elsewhere than on NVIDIA's chips: x as it is.
    """
    if takes_ptx():
        IN_A_REGISTER: tl.constexpr = 32 // x.dtype.primitive_bitwidth
        x = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=IN_A_REGISTER
        )
    return x
