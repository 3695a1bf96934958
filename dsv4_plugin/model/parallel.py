"""What the network needs from an engine: layers that may be split over ranks.

The local implementation is a single process in plain torch; adapters provide the engine's own.
Weights are loaded tensor by tensor under the checkpoint's names: a module takes its part of a full
tensor through its parameters' `weight_loader(param, tensor)`, experts through `load_expert`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from dsv4_plugin.config import ModelConfig
from dsv4_plugin.kernels.experts import experts
from dsv4_plugin.kernels.linear import Product, pack, reference


class RoutedExperts(Protocol):
    """x [T, D], expert ids int64 [T, k], weights float32 [T, k] -> this rank's sum [T, D]."""

    def __call__(self, x: Tensor, ids: Tensor, weight: Tensor) -> Tensor: ...

    def load_expert(self, expert: int, name: str, tensor: Tensor) -> None:
        """Take `w1`, `w2` or `w3` of an expert, a full tensor [out, in]."""


class Parallel(Protocol):
    """Factories of split layers; `prefix` is the module's name in the checkpoint.

    Linear modules map [T, in] to [T, out] without bias. column: out is split; row: in is split and
    the result summed over ranks unless reduce=False; replicated: every rank holds all of it.
    """

    rank: int
    size: int
    dtype: torch.dtype

    def column(self, n_in: int, n_out: int, prefix: str) -> nn.Module: ...

    def row(self, n_in: int, n_out: int, prefix: str, reduce: bool = True) -> nn.Module: ...

    def replicated(self, n_in: int, n_out: int, prefix: str) -> nn.Module: ...

    def embedding(self, prefix: str) -> nn.Module: ...

    def head(self, prefix: str) -> nn.Module: ...

    def experts(self, prefix: str) -> nn.Module: ...

    def all_reduce(self, x: Tensor) -> Tensor: ...


def take_shard(param: nn.Parameter, tensor: Tensor, rank: int, dim: int | None = None) -> None:
    """Copy a rank's part of a full tensor, split along `dim` (None: all of it)."""
    if dim is not None:
        tensor = tensor.narrow(dim, rank * param.shape[dim], param.shape[dim])
    assert param.shape == tensor.shape, (param.shape, tensor.shape)
    param.data.copy_(tensor)


class Linear(nn.Module):
    """y = x W^T."""

    def __init__(self, n_in: int, n_out: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in, dtype=dtype), requires_grad=False)
        self.product: Product | None = None

    def finalize_weights(self) -> None:
        """After loading: pack, and let go of the plain weight."""
        if self.product is None:
            self.product = pack(self.weight.data)
            self.weight = nn.Parameter(self.weight.new_empty(0), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return reference(x, self.weight) if self.product is None else self.product(x)


class GroupedLinear(nn.Module):
    """wo_a: every output group has a product of its own. [T, G, in] -> [T, G * out].

    The checkpoint's weight is [G * out, in], split over ranks by group.
    """

    def __init__(self, groups: int, n_in: int, n_out: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.groups = groups
        shape = (groups * n_out, n_in)
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
        self.weight.shard_dim = 0  # type: ignore[attr-defined]

    def finalize_weights(self) -> None:
        """After loading: [G, in, out], as the batched product reads it."""
        weight = self.weight.data.unflatten(0, (self.groups, -1)).transpose(1, 2).contiguous()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x.transpose(0, 1), self.weight).transpose(0, 1).flatten(1)


class Embedding(nn.Module):
    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        shape = (config.vocab_size, config.hidden_size)
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.embedding(ids, self.weight)


class SplitExperts(nn.Module):
    """All experts of a layer, each split over ranks by width, as [E, in, out] weights."""

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, rank: int = 0, size: int = 1
    ) -> None:
        super().__init__()
        self.rank = rank
        n, d, f = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size // size
        self.w13 = nn.Parameter(torch.empty(n, d, 2 * f, dtype=dtype), requires_grad=False)
        self.w2 = nn.Parameter(torch.empty(n, f, d, dtype=dtype), requires_grad=False)
        self.limit = config.swiglu_limit

    def forward(self, x: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
        return experts(x, ids, weight, self.w13, self.w2, self.limit)

    def load_expert(self, expert: int, name: str, tensor: Tensor) -> None:
        width = self.w2.shape[1]
        target = {
            "w1": self.w13[expert, :, :width],
            "w3": self.w13[expert, :, width:],
            "w2": self.w2[expert],
        }[name]
        split = 1 if name == "w2" else 0
        target.copy_(tensor.narrow(split, self.rank * width, width).t())


class LocalParallel:
    """One process, plain torch."""

    rank, size = 0, 1

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        self.config = config
        self.dtype = dtype

    def column(self, n_in: int, n_out: int, prefix: str) -> nn.Module:
        return Linear(n_in, n_out, self.dtype)

    def row(self, n_in: int, n_out: int, prefix: str, reduce: bool = True) -> nn.Module:
        return Linear(n_in, n_out, self.dtype)

    replicated = column

    def embedding(self, prefix: str) -> nn.Module:
        return Embedding(self.config, self.dtype)

    def head(self, prefix: str) -> nn.Module:
        """Logits are float32 products of float32 values, whatever the model's dtype."""
        return Linear(self.config.hidden_size, self.config.vocab_size, torch.float32)

    def experts(self, prefix: str) -> nn.Module:
        return SplitExperts(self.config, self.dtype)

    def all_reduce(self, x: Tensor) -> Tensor:
        return x
