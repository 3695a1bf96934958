"""y = x W^T with W kept in 8 or 4 bits: e4m3 in blocks of 128 x 128, e2m1 in blocks of 32 under
UE8M0 scales (OCP MX) or of 16 under e4m3 ones (NVFP4). Source: `fp8_gemm`, `fp4_gemm` and
`act_quant` of the authors' inference/kernel.py.

Dequantising in torch: elementwise integer arithmetic and a table of whole 16-bit words are what it
does fastest: 5 and 4.5 billion values a second on 2 cores, ten times its own casts.

Shapes: T tokens, G groups, E experts, rows are the weight's output dim.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Protocol, Self

import torch
from torch import Tensor

from dsv4_plugin.config import FP8_BLOCK
from dsv4_plugin.kernels.dispatch import implementation
from dsv4_plugin.quant.e2m1 import LOOKED_UP, NV_BLOCK, look_up, look_up_mxfp4
from dsv4_plugin.quant.e4m3 import decode_e4m3
from dsv4_plugin.quant.int4 import int4_quads

ROUNDED = 128
"""Block of the inputs' e4m3 rounding, see `round_inputs`."""
FP8_SHIFT = 20
"""e4m3's exponent and mantissa sit this far above those of a float32 ..."""
FP8_MASK = -0x78100000
FP8_UNIT = 2.0**120
"""... and mean 2^120 times less there; subnormals are float32 subnormals, so nothing is lost."""


class Matrix(Protocol):
    """A packed weight [out, in]; or those of all experts, [E, ...] the tensors, to choose from."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def of(self, expert: int) -> Self: ...

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows start .. stop-1, dequantised: [stop - start, in], valid until the next call."""


@dataclass(frozen=True)
class FP8Matrix:
    """codes uint8 e4m3 [out, in]; scale float32 [ceil(out / height), ceil(in / 128)].

    inputs: not 0 if arranged for a kernel, see `arranged`: their number, which codes may exceed to
    make blocks whole; bits: within each block of 128, byte 4 w + 2 r + h is the code of input
    64 h + 2 w + r.
    """

    codes: Tensor
    scale: Tensor
    height: int = FP8_BLOCK
    inputs: int = 0
    bits: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[-2], self.inputs or self.codes.shape[-1]

    def of(self, expert: int) -> FP8Matrix:
        return FP8Matrix(self.codes[expert], self.scale[expert], self.height)

    def part(self, start: int, stop: int) -> FP8Matrix:
        """Rows start .. stop-1, which begin with a block."""
        scale = self.scale[start // self.height : -(-stop // self.height)]
        return replace(self, codes=self.codes[start:stop], scale=scale)

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        n_in = self.shape[1]
        codes = self.codes[start:stop].view(torch.int8)
        if self.bits:
            codes = codes.unflatten(1, (-1, 32, 2, 2)).permute(0, 1, 4, 2, 3).flatten(1)
        codes = codes[:, :n_in]
        bits = _scratch(codes.shape, torch.int32, codes.device).copy_(codes)
        bits.bitwise_left_shift_(FP8_SHIFT).bitwise_and_(FP8_MASK)
        tile = bits.view(torch.float32)
        height = self.height
        if start % height == 0 and (stop - start) % height == 0 and n_in % FP8_BLOCK == 0:
            scale = self.scale[start // height : stop // height] * FP8_UNIT
            blocks = tile.view(len(scale), height, -1, FP8_BLOCK)
            blocks.mul_(scale[:, None, :, None])
        else:
            row = torch.arange(start, stop, device=tile.device) // height
            wide = (self.scale * FP8_UNIT).repeat_interleave(FP8_BLOCK, 1)[:, :n_in]
            tile.mul_(wide[row])
        return _cast(tile, dtype)


@dataclass(frozen=True)
class Rounded:
    """Rows whose blocks of ROUNDED values are rounded to e4m3 under powers of two, as products of
    FP8 and MXFP4 weights take them: values [T, in] of `dtype`; or, where `scale` float32 [T,
    ceil(in / 128)] is given, their codes uint8. dtype: the model's, of a product's results."""

    data: Tensor
    scale: Tensor | None
    dtype: torch.dtype

    def __len__(self) -> int:
        return len(self.data)

    @property
    def device(self) -> torch.device:
        return self.data.device

    def values(self) -> Tensor:
        if self.scale is None:
            return self.data
        return decode_e4m3(self.data, self.scale, ROUNDED).to(self.dtype)


@dataclass(frozen=True)
class Both:
    """The same rows as they are, [T, in], and rounded: the input of a sublayer, whose FP8 products
    take the latter."""

    plain: Tensor
    rounded: Rounded

    @property
    def dtype(self) -> torch.dtype:
        return self.plain.dtype

    @property
    def device(self) -> torch.device:
        return self.plain.device

    def tensors(self) -> tuple[Tensor, ...]:
        """What it consists of."""
        given = self.plain, self.rounded.data
        return given if self.rounded.scale is None else (*given, self.rounded.scale)

    @classmethod
    def of(cls, plain: Tensor, data: Tensor, scale: Tensor | None = None) -> Both:
        """Of its tensors."""
        return cls(plain, Rounded(data, scale, plain.dtype))


def plain(x: Tensor | Both) -> Tensor:
    return x.plain if isinstance(x, Both) else x


@dataclass(frozen=True)
class FP4Matrix:
    """data uint8 [out, in / 2], low nibble first; scale uint8 UE8M0 [out, in / 32]."""

    data: Tensor
    scale: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.data.shape[-2], 2 * self.data.shape[-1]

    def of(self, expert: int) -> FP4Matrix:
        return FP4Matrix(self.data[expert], self.scale[expert])

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        data = self.data[start:stop]
        tile = look_up_mxfp4(data, self.scale[start:stop], *_buffers(data))
        return _cast(tile, dtype)


@dataclass(frozen=True)
class NVFP4Matrix:
    """data uint8 [out, in / 2]; scale uint8 e4m3 [out, in / 16]; top float32 [], of all values."""

    data: Tensor
    scale: Tensor
    top: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.data.shape[-2], 2 * self.data.shape[-1]

    def of(self, expert: int) -> NVFP4Matrix:
        return NVFP4Matrix(self.data[expert], self.scale[expert], self.top[expert])

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        top = (self.top * 2.0**LOOKED_UP).expand(stop - start, 1)
        scale = decode_e4m3(self.scale[start:stop], top, self.scale.shape[1])
        data = self.data[start:stop]
        tile = _cast(look_up(data, *_buffers(data)), torch.float32)
        tile.unflatten(-1, (-1, NV_BLOCK)).mul_(scale[..., None])
        return _cast(tile, dtype)


@dataclass(frozen=True)
class Int4Matrix:
    """data uint8 [out, in / 2], low nibble first; scale bfloat16 [out, in / block]. Values are
    rounded to bfloat16 where products are of bfloat16."""

    data: Tensor
    scale: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.data.shape[-2], 2 * self.data.shape[-1]

    @property
    def block(self) -> int:
        return self.shape[1] // self.scale.shape[-1]

    def of(self, expert: int) -> Int4Matrix:
        return Int4Matrix(self.data[expert], self.scale[expert])

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        data = self.data[start:stop]
        tile = _cast(look_up(data, *_buffers(data), int4_quads(data.device)), dtype)
        tile.unflatten(-1, (-1, self.block)).mul_(self.scale[start:stop, :, None])
        return tile


class _Memory(threading.local):
    """Each thread's scratch: a fresh tile costs several times its arithmetic in page faults."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[torch.dtype, torch.device], Tensor] = {}


_memory = _Memory()


def _scratch(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """This thread's buffer of that dtype, uninitialised; it grows to the largest asked for."""
    known, n, key = _memory.buffers, prod(shape), (dtype, device)
    if key not in known or known[key].numel() < n:
        with torch.inference_mode(False):
            known[key] = torch.empty(n, dtype=dtype, device=device)
    return known[key][:n].view(*shape)


def _cast(tile: Tensor, dtype: torch.dtype) -> Tensor:
    return tile if tile.dtype == dtype else _scratch(tile.shape, dtype, tile.device).copy_(tile)


def _buffers(data: Tensor) -> tuple[Tensor, Tensor]:
    """For `look_up`: words int32 and quads int64, one per two bytes."""
    shape = (data.numel() // 2,)
    return _scratch(shape, torch.int32, data.device), _scratch(shape, torch.int64, data.device)


Inputs = Tensor | Rounded
"""Of a product with FP8 weights: rows as they are, or rounded."""


def arranged(weight: FP8Matrix, rounded: bool) -> FP8Matrix:
    """An FP8 weight as this device's products take it, made once after loading; an arranged one
    stays as it is. rounded: its inputs will be, see `Rounded`."""
    out: FP8Matrix = implementation(__name__, weight.codes.device).arranged(weight, rounded)
    return out


def product(x: Inputs, weight: Matrix) -> Tensor:
    """x [T, in] -> [T, out] in x's dtype, with float32 sums."""
    out: Tensor = implementation(__name__, x.device).product(x, weight)
    return out


def products(x: Inputs, weight: FP8Matrix, outputs: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The same with two weights on top of each other, of so many outputs, the first one's in whole
    blocks: [T, outputs[0]] and [T, outputs[1]], contiguous on GPUs."""
    out: tuple[Tensor, Tensor] = implementation(__name__, x.device).products(x, weight, outputs)
    return out


def gated_product(x: Inputs, weight: FP8Matrix, limit: float, rounded: bool) -> Inputs:
    """The clamped SwiGLU of an expert, whose w1 and w3 lie on top of each other: x [T, in] ->
    [T, out / 2] in x's dtype, rounded if asked for."""
    out: Inputs = implementation(__name__, x.device).gated_product(x, weight, limit, rounded)
    return out


def grouped_product(x: Tensor, weight: FP8Matrix, rounded: bool = False) -> Inputs:
    """x [T, G, in], the weight's rows in G equal groups, a scale for each (height 1): [T, out],
    rounded if asked for."""
    out: Inputs = implementation(__name__, x.device).grouped_product(x, weight, rounded)
    return out


def round_rows(x: Tensor) -> Rounded:
    """x [T, in], in the form that this device's products take. Source: `act_quant`."""
    out: Rounded = implementation(__name__, x.device).round_rows(x)
    return out
