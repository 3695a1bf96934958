"""What kernels need to know of a cache part: how a row is stored, and where the words lie."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

FORMATS = {"float32": 0, "bfloat16": 1, "fp8": 2, "fp4": 3}
"""A codec's kind to the constants of `device`."""


class RowCodec(Protocol):
    """Turns [N, width] values into [N, words] int32 rows and back."""

    @property
    def kind(self) -> str: ...

    @property
    def width(self) -> int: ...

    @property
    def words(self) -> int: ...

    def encode(self, x: Tensor) -> Tensor: ...

    def decode(self, rows: Tensor, dtype: torch.dtype) -> Tensor: ...


class Pool(Protocol):
    """Rows of a codec in int32 `storage`, at int64 addresses that count words."""

    codec: RowCodec
    storage: Tensor

    def write(self, address: Tensor, x: Tensor) -> None: ...

    def read(self, address: Tensor, dtype: torch.dtype) -> Tensor: ...


def write_rows(pool: Pool, address: Tensor, x: Tensor) -> None:
    """Store rows x [N, width] whose address [N] is not -1."""
    real = address >= 0
    if real.any():
        pool.write(address[real], x[real])
