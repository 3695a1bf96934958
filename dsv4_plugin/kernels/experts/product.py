"""Triton: the experts' products, with weights as they are stored, decoded in registers.

e2m1, e4m3 and int4 codes are the leading or last bits of bfloat16 numbers: nothing is looked up and
no fp8 type is used. A word of 4 bytes holds EACH codes, 8 or 4, and there are two ways to multiply
a tile of words.

Turned (few rows): [W outputs, M rows], the weight as the left operand. Codes are decoded two at a
time, by instructions that take pairs: code j of a word with code j + EACH / 2, as they lie in its
halves. Inputs are stored, by whoever made them, in the order in which a thread then has the values
(`position`), within blocks of 128: pair j of all words, then the next. On Hopper, where a thread
takes every fourth pair, words that lie a quarter of a block apart come first, so that a thread's
own are neighbours, which share a scale. Nothing is moved between registers, and nothing goes
through shared memory but what is loaded.

Straight (many rows): [M rows, W outputs]. A word's codes are joined, in their order, into a tile
that all warps read from shared memory.

Sums are float32. Turned, they run over pieces of PIECE inputs, which are added up in order: where
there are very few rows each piece is a program's, and the last to arrive adds them; else a program
goes through all of them. The bits are the same.

Shapes: T rows, K inputs, N outputs, E experts; tiles of M rows and W outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import cuda_capability_geq, is_cuda

from dsv4_plugin.config import FP8_BLOCK
from dsv4_plugin.kernels.arrival import in_order, is_last
from dsv4_plugin.kernels.bits import (
    E4M3_UNIT,
    e2m1_pairs,
    e4m3_block,
    e4m3_decode,
    e4m3_pairs,
    halves,
    int4_pairs,
    scaled_pairs,
    twice,
)
from dsv4_plugin.kernels.packed import FP4Matrix, FP8Matrix, Int4Matrix, Matrix, NVFP4Matrix
from dsv4_plugin.kernels.pin import pin
from dsv4_plugin.kernels.programmatic import follow, kernel

PLAIN = tl.constexpr(0)
FP8 = tl.constexpr(1)
MXFP4 = tl.constexpr(2)
NVFP4 = tl.constexpr(3)
INT4 = tl.constexpr(32)
"""How a weight is stored. PLAIN is [in, out], the others are [out, in]. From INT4 on: int4 with so
many inputs to a scale."""

BLOCK = tl.constexpr(128)
"""Inputs that are rounded together, and in which a turned product orders them; FP8's scales are of
blocks of as many, and as many outputs."""
TWO_UNITS = tl.constexpr(0x7B807B80)
"""Two bfloat16 values of 2^120, by which e4m3's are divided."""
FP4_UNIT = tl.constexpr(2.0**64)
"""What e2m1 values and their factors together leave out."""


@dataclass(frozen=True)
class Operand:
    """A weight of all experts as the kernels take it.

    data: PLAIN values, else int32 words of codes; row, each, scale_each: elements from one row to
    the next and from one expert to the next.
    """

    kind: int
    data: Tensor
    scale: Tensor
    top: Tensor
    outputs: int
    inputs: int
    row: int
    each: int
    scale_each: int

    @property
    def codes(self) -> int:
        """Of a word; 1: plain."""
        return {PLAIN.value: 1, FP8.value: 4}.get(self.kind, 8)


def plain(data: Tensor) -> Operand:
    """data [E, in, out], perhaps a part of wider rows."""
    _, inputs, outputs = data.shape
    each, row, _ = data.stride()
    return Operand(PLAIN.value, data, data, data, outputs, inputs, row, each, 0)


def operand(matrix: Matrix) -> Operand:
    """matrix: of all experts, the expert first. Raises ValueError where rows are no whole words."""
    assert isinstance(matrix, FP8Matrix | FP4Matrix | NVFP4Matrix | Int4Matrix)
    codes = matrix.codes if isinstance(matrix, FP8Matrix) else matrix.data
    if codes.shape[-1] % 4:
        raise ValueError(f"a packed weight's rows have {codes.shape[-1]} bytes; the kernels take 4")
    kind = matrix.block if isinstance(matrix, Int4Matrix) else _KINDS[type(matrix)]
    words, scale = codes.view(torch.int32), matrix.scale
    top = matrix.top if isinstance(matrix, NVFP4Matrix) else scale
    outputs, inputs = matrix.shape
    return Operand(
        kind, words, scale, top, outputs, inputs, words.stride(1), words.stride(0), scale.stride(0)
    )


_KINDS: dict[type, int] = {
    FP8Matrix: FP8.value,
    FP4Matrix: MXFP4.value,
    NVFP4Matrix: NVFP4.value,
}
assert BLOCK.value == FP8_BLOCK


@triton.constexpr_function
def _neighbours(words: int) -> int:
    """Of a block's words, how many neighbours a thread is to have: a quarter where it takes every
    fourth pair, for wgmma. For others it takes four in a row; 1: words stay where they are."""
    wgmma = is_cuda() and cuda_capability_geq(9) and not cuda_capability_geq(10)
    return words // 4 if wgmma and not triton.knobs.runtime.interpret else 1


@triton.jit
def position(i, EACH: tl.constexpr):
    """Where input i of a block is stored for a turned product; EACH 1: for a straight one."""
    HALF: tl.constexpr = (EACH + 1) // 2
    j, word = i % EACH, i // EACH
    if EACH > 1:
        NEXT: tl.constexpr = _neighbours(BLOCK // EACH)
        word = word % NEXT * (BLOCK // EACH // NEXT) + word // NEXT
    return j % HALF * (BLOCK // HALF) + word * (EACH // HALF) + j // HALF


@triton.jit
def rounded(value, AXIS: tl.constexpr):
    """float32, a block along AXIS, rounded to e4m3 under a power of two."""
    code, unit = e4m3_block(value, AXIS)
    return e4m3_decode(code) * E4M3_UNIT * unit


@triton.jit
def _pairs(words, KIND: tl.constexpr):
    """Of codes j and j + EACH / 2 of int32 words, words of two bfloat16 values: e4m3's divided by
    2^120, e2m1's by 2^126."""
    if KIND == FP8:
        pairs: tl.tuple = e4m3_pairs(words, tl.bfloat16)
    elif KIND >= INT4:
        pairs = int4_pairs(words)
    else:
        pairs = e2m1_pairs(words, tl.bfloat16)
    return pairs


@triton.jit
def _both(pairs, factors, DTYPE: tl.constexpr):
    """Lower and upper values of words of two times their factors, in DTYPE: bfloat16 ones are
    multiplied as pairs, by factors that are such words."""
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        low, high = halves(scaled_pairs(pairs, factors), tl.bfloat16)
    else:
        low, high = halves(pairs, tl.bfloat16)
        low = low.to(DTYPE) * factors
        high = high.to(DTYPE) * factors
    return low, high


@triton.jit
def _joined(pairs, factors, DTYPE: tl.constexpr):
    """The codes of words [W, COUNT], in order, times their factors: [W, EACH * COUNT]."""
    W: tl.constexpr = pairs[0].shape[0]
    COUNT: tl.constexpr = pairs[0].shape[1]
    if len(pairs) == 2:
        even = tl.join(*_both(pairs[0], factors, DTYPE))
        odd = tl.join(*_both(pairs[1], factors, DTYPE))
    else:
        k0, k4 = _both(pairs[0], factors, DTYPE)
        k1, k5 = _both(pairs[1], factors, DTYPE)
        k2, k6 = _both(pairs[2], factors, DTYPE)
        k3, k7 = _both(pairs[3], factors, DTYPE)
        even = tl.join(tl.join(k0, k4), tl.join(k2, k6))
        odd = tl.join(tl.join(k1, k5), tl.join(k3, k7))
    return tl.reshape(tl.join(even, odd), (W, 2 * len(pairs) * COUNT))


@triton.jit
def _scales(scale, n, first, used, COUNT: tl.constexpr, BLOCKS: tl.constexpr, WHOLE: tl.constexpr):
    """Of blocks first .. first + BLOCKS - 1 of rows n, of COUNT a row: [W, BLOCKS]. `first` is a
    multiple of BLOCKS, and scale at the beginning of a word (4 bytes)."""
    block = first + tl.arange(0, BLOCKS)
    at = scale + n[:, None] * COUNT + block[None, :]
    BITS: tl.constexpr = scale.dtype.element_ty.primitive_bitwidth
    EACH: tl.constexpr = 32 // BITS
    if WHOLE & (BITS < 32) & (BLOCKS <= EACH) & (COUNT % EACH == 0):
        # Of the word that holds them: nothing shorter is loaded ahead of time by a thread.
        from_words = scale.to(tl.pointer_type(tl.int32)) + n * (COUNT // EACH)
        words = tl.load(from_words + first // EACH)
        part = first % EACH + tl.arange(0, BLOCKS)
        parts = words[:, None] >> (BITS * part)[None, :]
        if BITS == 8:
            scales = parts & 0xFF
        else:
            scales = parts.to(tl.int16).to(scale.dtype.element_ty, bitcast=True)
    elif WHOLE:
        scales = tl.load(at)
    else:
        scales = tl.load(at, mask=used[:, None] & (block < COUNT)[None, :], other=0)
    return scales


@triton.jit
def _factors(
    scale, n, k, used, K: tl.constexpr, DEPTH: tl.constexpr, KIND: tl.constexpr,
    COUNT: tl.constexpr, DTYPE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Of the COUNT words of inputs k .. k + DEPTH - 1 and outputs n, as `_both` takes them: 2^120
    of FP8; int4's scales; e2m1's times 2^62, where powers beyond 2^65 count as that."""
    if KIND == FP8:
        if DTYPE == tl.bfloat16:  # noqa: SIM300
            factors = tl.full((n.shape[0], COUNT), TWO_UNITS, tl.int32)
        else:
            factors = tl.full((n.shape[0], COUNT), E4M3_UNIT, DTYPE)
    else:
        if KIND >= INT4:
            factor = _scales(scale, n, k // KIND, used, K // KIND, DEPTH // KIND, WHOLE)
        elif KIND == MXFP4:
            code = _scales(scale, n, k // 32, used, K // 32, DEPTH // 32, WHOLE).to(tl.int32)
            bits = tl.minimum(code + 62, 254) << 7
            factor = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
        else:
            code = _scales(scale, n, k // 16, used, K // 16, DEPTH // 16, WHOLE)
            factor = e4m3_decode(code) * (2.0**120) * (2.0**62)
        BLOCKS: tl.constexpr = factor.shape[1]
        factors = factor.to(DTYPE)
        if DTYPE == tl.bfloat16:  # noqa: SIM300
            factors = twice(factors)
        wide = tl.broadcast_to(factors[:, :, None], (n.shape[0], BLOCKS, COUNT // BLOCKS))
        factors = tl.reshape(wide, (n.shape[0], COUNT))
    return factors


@triton.jit
def _words(
    w, n, k, used,
    K: tl.constexpr, ROW: tl.constexpr, COUNT: tl.constexpr, EACH: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """The words of inputs from k on and outputs n: int32 [W, COUNT]."""
    word = k // EACH + tl.arange(0, COUNT)
    at = w + n[:, None] * ROW + word[None, :]
    if WHOLE:
        words = tl.load(at)
    else:
        words = tl.load(at, mask=used[:, None] & (word < K // EACH)[None, :], other=0)
    return words


@triton.jit
def _apart(pairs, factors, DTYPE: tl.constexpr):
    """The codes of words [W, COUNT] times their factors, in the order of `position`."""
    W: tl.constexpr = pairs[0].shape[0]
    PAIRS: tl.constexpr = len(pairs)
    WORDS: tl.constexpr = BLOCK // (2 * PAIRS)
    NEXT: tl.constexpr = _neighbours(WORDS)
    BLOCKS: tl.constexpr = pairs[0].shape[1] // WORDS
    first = tl.join(*_both(pairs[0], factors, DTYPE))
    second = tl.join(*_both(pairs[1], factors, DTYPE))
    if PAIRS == 4:
        first = tl.join(first, tl.join(*_both(pairs[2], factors, DTYPE)))
        second = tl.join(second, tl.join(*_both(pairs[3], factors, DTYPE)))
    values = tl.reshape(tl.join(first, second), (W, BLOCKS, WORDS // NEXT, NEXT, 2, PAIRS))
    return tl.reshape(tl.permute(values, (0, 1, 5, 3, 2, 4)), (W, BLOCKS * BLOCK))


@triton.jit
def _turned(
    total, x, w, scale, n, k, used,
    K: tl.constexpr, ROW: tl.constexpr, KIND: tl.constexpr, EACH: tl.constexpr,
    DEPTH: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """total [W, M] plus the weight's inputs from k on and outputs n times x [DEPTH, M]."""
    COUNT: tl.constexpr = DEPTH // EACH
    if KIND == FP8:
        unit = tl.load(scale + k // BLOCK)
    pairs = _pairs(_words(w, n, k, used, K, ROW, COUNT, EACH, WHOLE), KIND)
    factors = _factors(scale, n, k, used, K, DEPTH, KIND, COUNT, x.dtype, WHOLE)
    weights = _apart(pairs, factors, x.dtype)
    if KIND == FP8:
        total += tl.dot(weights, x, input_precision="ieee") * unit
    else:
        # Waited for here: a product that is still at work in the next step, whose left operand is
        # made in registers meanwhile, ptxas would serialise, and with it all others.
        total = pin(tl.dot(weights, x, total, input_precision="ieee"))
    return total


@triton.jit
def straight(
    total, x, w, scale, n, k, used,
    K: tl.constexpr, ROW: tl.constexpr, KIND: tl.constexpr, DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """total [M, W] plus x [M, DEPTH] times the weight's inputs from k on and outputs n."""
    if KIND == PLAIN:
        at = k + tl.arange(0, DEPTH)
        inside = used[None, :] & (at < K)[:, None]
        tile = tl.load(w + at[:, None] * ROW + n[None, :], mask=inside, other=0.0)
        total = tl.dot(x, tile, total, input_precision="ieee")
    else:
        EACH: tl.constexpr = 4 if KIND == FP8 else 8
        COUNT: tl.constexpr = DEPTH // EACH
        if KIND == FP8:
            unit = tl.load(scale + k // BLOCK)
        pairs = _pairs(_words(w, n, k, used, K, ROW, COUNT, EACH, WHOLE), KIND)
        factors = _factors(scale, n, k, used, K, DEPTH, KIND, COUNT, x.dtype, WHOLE)
        tile = _joined(pairs, factors, x.dtype)
        if KIND == FP8:
            total += tl.dot(x, tl.trans(tile), input_precision="ieee") * unit
        else:
            total = tl.dot(x, tl.trans(tile), total, input_precision="ieee")
    return total


@triton.jit
def _inputs(x, real, k, K: tl.constexpr, DEPTH: tl.constexpr, TURNED: tl.constexpr):
    """Inputs k .. k + DEPTH - 1 of the rows at the pointers x [M]: [M, DEPTH]; if TURNED [DEPTH,
    M], of rows that are not real too."""
    at = k + tl.arange(0, DEPTH)
    if TURNED:
        parts = tl.load(x[None, :] + at[:, None])
    else:
        used = real[:, None] & (at < K)[None, :]
        parts = tl.load(x[:, None] + at[None, :], mask=used, other=0.0)
    return parts


@triton.jit
def _opened(fresh, total, part):
    """Where a piece begins, the one before it joins the total. (A choice of 0 fails to compile for
    sm_100.)"""
    return tl.where(fresh, total + part, total), part * tl.where(fresh, 0.0, 1.0)


@kernel(do_not_specialize=["pairs", "limit"])
def multiply_experts(
    x, w1, scale1, top1, w3, scale3, top3, weight, expert_of, row_of, used, out, partial, counter,
    pairs, limit,
    N: tl.constexpr, K: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, ROW: tl.constexpr,
    EACH: tl.constexpr, SCALE_EACH: tl.constexpr, KIND: tl.constexpr, CODES: tl.constexpr,
    PAIRS: tl.constexpr, GATED: tl.constexpr, ROUND: tl.constexpr, ORDER: tl.constexpr,
    M: tl.constexpr, W: tl.constexpr, DEPTH: tl.constexpr, PIECE: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """Program (block, output tile, piece): out [pair, OUT] = x [pair / PAIRS, IN] times its
    expert's w1 or, if GATED, the clamped SwiGLU of that and of w3's, times the pair's weight.
    CODES > 1: turned. ROUND: each block of outputs is rounded; ORDER: they are stored for a next
    product of so many codes a word, zeros behind the last. If SPLIT, partial float32 [pieces,
    1 + GATED, pairs, N] and a counter for each block and tile."""
    follow()
    block = tl.program_id(0)
    # Asked for at once, before it is known whether there is such a block: no load passes a barrier,
    # while the compiler would put these behind the return.
    blocks = tl.load(used)
    e = tl.load(expert_of + block).to(tl.int64)
    pair = tl.load(row_of + block * M + tl.arange(0, M))
    tl.debug_barrier()
    if block >= blocks:
        return
    real = pair >= 0
    pair = tl.where(real, pair, 0).to(tl.int64)
    if GATED:
        share = tl.load(weight + pair, mask=real, other=0.0)
    if KIND == NVFP4:
        unit1 = tl.load(top1 + e)
        unit3 = tl.load(top3 + e)
    start = x + pair // PAIRS * IN
    n = tl.program_id(1) * W + tl.arange(0, W)
    inside = n < N
    w1 += e * EACH
    w3 += e * EACH
    scale1 += e * SCALE_EACH
    scale3 += e * SCALE_EACH
    if KIND == FP8:  # a tile's outputs are of one block: W divides it
        row = tl.program_id(1) * W // BLOCK * ((K + BLOCK - 1) // BLOCK)
        scale1 += row
        scale3 += row
    WHOLE: tl.constexpr = (N % W == 0) & (K % DEPTH == 0)
    STEPS: tl.constexpr = PIECE // DEPTH
    PIECES: tl.constexpr = (K + PIECE - 1) // PIECE
    first = 0
    end = (K + DEPTH - 1) // DEPTH
    if SPLIT:
        first = tl.program_id(2) * STEPS
        end = tl.minimum(first + STEPS, end)
    gate = tl.zeros((W, M) if CODES > 1 else (M, W), tl.float32)
    up = gate
    gate_before = gate
    up_before = gate
    for i in tl.range(first, end):
        k = i * DEPTH
        if (PIECES > 1) & (not SPLIT):
            gate_before, gate = _opened(i % STEPS == 0, gate_before, gate)
            if GATED:
                up_before, up = _opened(i % STEPS == 0, up_before, up)
        part = _inputs(start, real, k, K, DEPTH, CODES > 1)
        if CODES > 1:
            gate = _turned(gate, part, w1, scale1, n, k, inside, K, ROW, KIND, CODES, DEPTH, WHOLE)
            if GATED:
                up = _turned(up, part, w3, scale3, n, k, inside, K, ROW, KIND, CODES, DEPTH, WHOLE)
        else:
            gate = straight(gate, part, w1, scale1, n, k, inside, K, ROW, KIND, DEPTH, WHOLE)
            if GATED:
                up = straight(up, part, w3, scale3, n, k, inside, K, ROW, KIND, DEPTH, WHOLE)
    if (PIECES > 1) & (not SPLIT):
        gate += gate_before
        up += up_before
    if SPLIT:
        gate = tl.trans(gate)
        up = tl.trans(up)
        mask = real[:, None] & inside[None, :]
        at = partial + pair[:, None] * N + n[None, :]
        size = pairs.to(tl.int64) * N
        step = 2 * size if GATED else size
        tl.store(at + tl.program_id(2) * step, gate, mask=mask)
        if GATED:
            tl.store(at + tl.program_id(2) * step + size, up, mask=mask)
        if not is_last(counter + tl.program_id(1) * tl.num_programs(0) + block, PIECES):
            return
        gate = in_order(at, step, PIECES, mask)
        if GATED:
            up = in_order(at + size, step, PIECES, mask)
    if (KIND == MXFP4) | (KIND == NVFP4):
        gate *= FP4_UNIT
        up *= FP4_UNIT
    if KIND == NVFP4:
        gate *= unit1
        up *= unit3
    gate = gate.to(x.dtype.element_ty)  # as a product of torch is
    up = up.to(x.dtype.element_ty)
    if (CODES > 1) & (not SPLIT):
        gate = tl.trans(gate)
        up = tl.trans(up)
    if GATED:
        gate = tl.minimum(gate.to(tl.float32), limit)
        up = up.to(tl.float32)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        gate = gate / (1.0 + tl.exp(-gate)) * up * share[:, None]
    if ROUND:  # W is a block
        gate = rounded(gate.to(x.dtype.element_ty).to(tl.float32), 1)
    if ORDER > 1:
        n = n // BLOCK * BLOCK + position(n % BLOCK, ORDER)
    tl.store(out + pair[:, None] * OUT + n[None, :], gate, mask=real[:, None] & (n < OUT)[None, :])
