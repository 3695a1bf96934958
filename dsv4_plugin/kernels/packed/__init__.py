"""y = x W^T with W kept in 8 or 4 bits: a tile of rows at a time is dequantised and multiplied.

A tile stays in the CPU's cache, so the packed bytes are all that is read from memory. Elementwise
integer arithmetic and a table of whole 16-bit words are what torch does fastest: 5 and 4.5 billion
values a second on 2 cores, ten times torch's own casts.

Shapes: T tokens, rows are the weight's output dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from dsv4_plugin.config import FP4_BLOCKS, FP8_BLOCK
from dsv4_plugin.quant.e2m1 import decode_e2m1
from dsv4_plugin.quant.e4m3 import decode_e4m3

TILE = 1 << 20
"""Values of a dequantised tile (2 MiB in bfloat16), rounded to whole blocks of rows."""

FP8_SHIFT = 20
"""e4m3's exponent and mantissa sit this far above those of a float32 ..."""
FP8_MASK = -0x78100000
FP8_UNIT = 2.0**120
"""... and mean 2^120 times less there; subnormals are float32 subnormals, so nothing is lost."""

FP4_UNIT = 62
"""FP4 values are looked up divided by 2^62, and the scale's exponent is then added to their bits.
A zero becomes 2^-64 times the block's smallest step: nothing beside any float32 sum."""


class Matrix(Protocol):
    """A packed weight [out, in]."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows start .. stop-1, dequantised: [stop - start, in]."""


@dataclass(frozen=True)
class FP8Matrix:
    """codes uint8 e4m3 [out, in]; scale float32 [ceil(out / 128), ceil(in / 128)]."""

    codes: Tensor
    scale: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        n_in = self.shape[1]
        bits = self.codes[start:stop].view(torch.int8).to(torch.int32)
        bits.bitwise_left_shift_(FP8_SHIFT).bitwise_and_(FP8_MASK)
        tile = bits.view(torch.float32)
        if start % FP8_BLOCK == 0 and (stop - start) % FP8_BLOCK == 0 and n_in % FP8_BLOCK == 0:
            scale = self.scale[start // FP8_BLOCK : stop // FP8_BLOCK] * FP8_UNIT
            blocks = tile.view(len(scale), FP8_BLOCK, -1, FP8_BLOCK)
            blocks.mul_(scale[:, None, :, None])
        else:
            row = torch.arange(start, stop, device=tile.device) // FP8_BLOCK
            wide = (self.scale * FP8_UNIT).repeat_interleave(FP8_BLOCK, 1)[:, :n_in]
            tile.mul_(wide[row])
        return tile.to(dtype)


@dataclass(frozen=True)
class FP4Matrix:
    """data uint8 [out, in / 2], low nibble first; scale uint8 UE8M0 [out, in / 32]."""

    data: Tensor
    scale: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.data.shape[0], 2 * self.data.shape[1]

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        exponent = self.scale[start:stop].to(torch.int16).sub_(127 - FP4_UNIT).clamp_(0, 186)
        bits = _values(self.data[start:stop]).unflatten(-1, (-1, FP4_BLOCKS["fp4"]))
        bits.add_(exponent.bitwise_left_shift_(7)[..., None])
        return bits.flatten(-2).view(torch.bfloat16).to(dtype)


@dataclass(frozen=True)
class NVFP4Matrix:
    """data uint8 [out, in / 2]; scale uint8 e4m3 [out, in / 16]; top float32 [], of all values."""

    data: Tensor
    scale: Tensor
    top: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.data.shape[0], 2 * self.data.shape[1]

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        top = (self.top * 2.0**FP4_UNIT).expand(stop - start, 1)
        scale = decode_e4m3(self.scale[start:stop], top, self.scale.shape[1])
        tile = _values(self.data[start:stop]).view(torch.bfloat16).float()
        tile.unflatten(-1, (-1, FP4_BLOCKS["nvfp4"])).mul_(scale[..., None])
        return tile.to(dtype)


def _values(data: Tensor) -> Tensor:
    """Bits int16 of bfloat16 e2m1 values / 2^62: bytes uint8 [n, in / 2] -> [n, in]."""
    words = data.view(torch.uint16).to(torch.int32)
    quads = _quads(data.device).index_select(0, words.view(-1))
    return quads.view(torch.int16).view(len(data), -1)


@lru_cache
def _quads(device: torch.device) -> Tensor:
    """The four bfloat16 values of every 16-bit word, as one int64: [65536]."""
    word = torch.arange(1 << 16, device=device)
    codes = torch.stack([word >> shift & 15 for shift in (0, 4, 8, 12)], -1)
    values = decode_e2m1(codes) * 2.0**-FP4_UNIT
    return values.to(torch.bfloat16).view(torch.int64).view(-1)


def reference(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, in] times the dequantised float32 weight [out, in] -> float32 [T, out]."""
    return x.float() @ weight.t()


def product(x: Tensor, weight: Matrix) -> Tensor:
    """x [T, in] -> [T, out] in x's dtype, with float32 sums."""
    n_out, n_in = weight.shape
    step = max(1, TILE // (n_in * FP8_BLOCK)) * FP8_BLOCK
    if n_out <= step:
        return torch.nn.functional.linear(x, weight.rows(0, n_out, x.dtype))
    out = x.new_empty(len(x), n_out)
    for start in range(0, n_out, step):
        stop = min(start + step, n_out)
        tile = weight.rows(start, stop, x.dtype)
        out[:, start:stop] = torch.nn.functional.linear(x, tile)
    return out
