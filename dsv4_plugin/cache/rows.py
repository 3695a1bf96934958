"""How one cache row is stored, and pools of rows addressed by 32-bit words.

An address counts 32-bit words from the start of a pool's storage; a row is `words` words long.
The same address means the same bytes to torch and to a GPU kernel, whatever block structure an
engine puts around it. (Words, not bytes: torch's row gather is 10 times slower on wide byte rows.)
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from dsv4_plugin.quant.e2m1 import MX_BLOCK, look_up_mxfp4, quantise_mxfp4
from dsv4_plugin.quant.e4m3 import decode_e4m3, decode_ue8m0, quantise_e4m3

KV_BLOCK = 64
"""Dims that share one scale in an fp8 KV row."""


class RowFormat(IntEnum):
    """How a row is stored; Triton kernels compare these numbers."""

    FLOAT32 = 0
    BFLOAT16 = 1
    FP8 = 2
    FP4 = 3

    def __str__(self) -> str:
        return self.name.lower()


class RowCodec(Protocol):
    """Turns [N, width] values into [N, words] int32 rows and back."""

    format: ClassVar[RowFormat]

    @property
    def width(self) -> int: ...

    @property
    def words(self) -> int: ...

    def encode(self, x: Tensor) -> Tensor: ...

    def decode(self, rows: Tensor, dtype: torch.dtype) -> Tensor: ...


@dataclass(frozen=True)
class Float32Rows:
    """4 bytes per value: exact; states always, KV rows of a float32 model."""

    format: ClassVar[RowFormat] = RowFormat.FLOAT32
    width: int

    @property
    def words(self) -> int:
        return self.width

    def encode(self, x: Tensor) -> Tensor:
        return x.float().view(torch.int32)

    def decode(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        return rows.view(torch.float32).to(dtype)


@dataclass(frozen=True)
class BFloat16Rows:
    """2 bytes per value."""

    format: ClassVar[RowFormat] = RowFormat.BFLOAT16
    width: int

    @property
    def words(self) -> int:
        return (self.width + 1) // 2

    def encode(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.pad(x.to(torch.bfloat16), (0, 2 * self.words - self.width))
        return x.view(torch.int32)

    def decode(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        return rows.view(torch.bfloat16)[..., : self.width].to(dtype)


@dataclass(frozen=True)
class FP8KVRows:
    """The engines' `fp8_ds_mla` bytes: e4m3 non-rope dims, bf16 rope dims, UE8M0 scales, padding.

    For head_dim 512 with 64 rope dims: 448 + 128 + 7 + 1 = 584 bytes.
    """

    format: ClassVar[RowFormat] = RowFormat.FP8
    width: int
    rope: int

    @property
    def nope(self) -> int:
        return self.width - self.rope

    @property
    def blocks(self) -> int:
        return -(-self.nope // KV_BLOCK)

    @property
    def words(self) -> int:
        return -(-(self.nope + 2 * self.rope + self.blocks) // 8) * 2

    def encode(self, x: Tensor) -> Tensor:
        codes, scales = quantise_e4m3(x[:, : self.nope], KV_BLOCK)
        rope = x[:, self.nope :].to(torch.bfloat16).contiguous().view(torch.uint8)
        used = self.nope + 2 * self.rope + self.blocks
        padding = rope.new_zeros(x.shape[0], 4 * self.words - used)
        return torch.cat([codes, rope, scales, padding], -1).view(torch.int32)

    def decode(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        data = rows.view(torch.uint8)
        rope_end = self.nope + 2 * self.rope
        scales = decode_ue8m0(data[..., rope_end : rope_end + self.blocks])
        nope = decode_e4m3(data[..., : self.nope], scales, KV_BLOCK)
        rope = data[..., self.nope : rope_end].contiguous().view(torch.bfloat16)
        return torch.cat([nope.to(dtype), rope.to(dtype)], -1)


@dataclass(frozen=True)
class FP8IndexRows:
    """An indexer key: e4m3 codes and one float32 scale for the whole row (128 + 4 bytes)."""

    format: ClassVar[RowFormat] = RowFormat.FP8
    width: int

    @property
    def words(self) -> int:
        return (self.width + 3) // 4 + 1

    def encode(self, x: Tensor) -> Tensor:
        codes, scales = quantise_e4m3(x, self.width)
        codes = torch.nn.functional.pad(codes, (0, -self.width % 4))
        return torch.cat([codes.view(torch.int32), decode_ue8m0(scales).view(torch.int32)], -1)

    def decode(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        codes = rows[..., :-1].contiguous().view(torch.uint8)[..., : self.width]
        return decode_e4m3(codes, rows[..., -1:].view(torch.float32), self.width).to(dtype)


@dataclass(frozen=True)
class FP4IndexRows:
    """An indexer key: e2m1 codes, two per byte, and a UE8M0 scale per 32 (64 + 4 bytes)."""

    format: ClassVar[RowFormat] = RowFormat.FP4
    width: int

    @property
    def words(self) -> int:
        return -(-self.width // 8) + -(-self._blocks // 4)

    @property
    def _blocks(self) -> int:
        return -(-self.width // MX_BLOCK)

    def encode(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.pad(x.float(), (0, -self.width % MX_BLOCK))
        codes, scales = quantise_mxfp4(x)
        codes = codes[:, : -(-self.width // 8) * 4]
        padding = scales.new_zeros(len(x), -self._blocks % 4)
        return torch.cat([codes, scales, padding], -1).view(torch.int32)

    def decode(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        data = rows.view(torch.uint8)
        n = -(-self.width // 8) * 4
        codes = torch.nn.functional.pad(data[..., :n], (0, self._blocks * MX_BLOCK // 2 - n))
        values = look_up_mxfp4(codes.contiguous(), data[..., n : n + self._blocks])
        return values[..., : self.width].to(dtype)


class RowPool:
    """Rows of one cache part, anywhere in a 1-D int32 `storage`, addressed by word.

    Args:
        storage: int32 [words]; a view that starts at the part's own base, so that one set of
            addresses serves every layer of a kind.
        codec: how a row is stored.
    """

    def __init__(self, storage: Tensor, codec: RowCodec) -> None:
        self.codec, self.storage = codec, storage
        n = storage.numel() - codec.words + 1
        # Every word may start a row: an overlapping view, indexed only at true row starts.
        self._rows = torch.as_strided(storage, (n, codec.words), (1, 1), storage.storage_offset())

    def write(self, address: Tensor, x: Tensor) -> None:
        """Store x [N, width] at the int64 addresses [N]."""
        rows = self.codec.encode(x)
        if rows.device.type == "cpu":
            self._rows.index_put_((address,), rows)
        else:  # GPUs asked for deterministic algorithms write to a copy of overlapping views.
            word = torch.arange(self.codec.words, device=rows.device)
            self.storage.index_put_((address[:, None] + word,), rows)

    def write_real(self, address: Tensor, x: Tensor) -> None:
        """The same, but rows of address -1 are not written."""
        real = address >= 0
        if real.all():
            self.write(address, x)
        elif real.any():
            self.write(address[real], x[real])

    def read(self, address: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows at int64 addresses [...]: [..., width] in `dtype`."""
        rows = self._rows.index_select(0, address.reshape(-1))
        return self.codec.decode(rows, dtype).view(*address.shape, self.codec.width)
