"""What the network needs from an engine: layers that may be split over ranks.

The local implementation is a single process in plain torch; adapters provide the engine's own.
Weights are loaded tensor by tensor under the checkpoint's names, see `loading`. Afterwards
`Network.finalize_weights` lets every module put its weights into the form it computes with, a
module before those inside it; a second time nothing is left to do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import gcd
from typing import Protocol

import torch
from torch import Tensor, nn

from dsv4_plugin.cache.layer import LayerCache
from dsv4_plugin.cache.step import Step
from dsv4_plugin.config import ModelConfig
from dsv4_plugin.kernels.dispatch import use_triton
from dsv4_plugin.kernels.experts import experts, joined
from dsv4_plugin.kernels.linear import (
    Product,
    multiplied,
    on_tensor_cores,
    pack,
    pack_rows,
    reference,
)
from dsv4_plugin.kernels.packed import Both
from dsv4_plugin.model.loading import give, give_below, shard


@dataclass(frozen=True)
class OutputGroups:
    """How the heads of wo_a's groups fall to ranks, any number of ranks that divides the heads.

    Heads are cut into parts of `unit` heads, each of one rank and one group. A rank computes its
    parts' share of z = wo_a o; wo_b is linear, so its columns are repeated for the parts of a group
    and the sum over ranks completes z.
    """

    heads: int
    groups: int
    rank: int
    size: int

    @property
    def unit(self) -> int:
        return gcd(self.heads // self.size, self.heads // self.groups)

    @property
    def parts(self) -> int:
        """Of this rank."""
        return self.heads // self.size // self.unit

    @property
    def parts_of_group(self) -> int:
        return self.heads // self.groups // self.unit

    def wo_a(self, tensor: Tensor) -> Tensor:
        """[G * out, in] -> this rank's [parts * out, unit * d]."""
        split = tensor.unflatten(0, (self.groups, -1)).unflatten(2, (self.parts_of_group, -1))
        mine = range(self.rank * self.parts, (self.rank + 1) * self.parts)
        n = self.parts_of_group
        return torch.cat([split[part // n, :, part % n] for part in mine])

    def wo_b(self, tensor: Tensor) -> Tensor:
        """[out, G * in] -> all ranks' [out, size * parts * in]."""
        if self.parts_of_group == 1:
            return tensor
        columns = tensor.unflatten(1, (self.groups, -1))
        out: Tensor = columns.repeat_interleave(self.parts_of_group, 1).flatten(1)
        return out


Attend = Callable[[Tensor | Both, Step, LayerCache], Tensor]
"""x [T, D], normed -> [T, D]."""


MakeExperts = Callable[[ModelConfig, int, int], nn.Module]
"""(config, rank, size) -> the config's experts, each split over `size` ranks by width: a module
that maps x [T, D], expert ids int64 [T, k], weights float32 [T, k] and, if there is any, what else
[T, D] is added, to this rank's sum [T, D]."""


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

    def experts(self, prefix: str, make: MakeExperts | None = None) -> nn.Module:
        """The experts of a layer, by width or by number; make builds other than plain ones."""

    def all_reduce(self, x: Tensor) -> Tensor: ...

    def breaking(self, attention: Attend) -> Attend:
        """A layer's attention, perhaps outside of the graphs that an engine captures around it:
        whatever differs from step to step, other than in values, stays in there."""


class Linear(nn.Module):
    """y = x W^T, with a rank's part of W along dim `split` (None: all of it)."""

    def __init__(
        self,
        n_in: int,
        n_out: int,
        dtype: torch.dtype,
        split: int | None = None,
        rank: int = 0,
    ) -> None:
        super().__init__()
        self.split, self.rank = split, rank
        self.weight = nn.Parameter(torch.empty(n_out, n_in, dtype=dtype), requires_grad=False)
        self.product: Product | None = None

    def take(self, name: str, tensor: Tensor) -> bool:
        """The full weight [out, in]."""
        if self.split is not None:
            tensor = shard(tensor, self.split, self.rank, self.weight.shape[self.split])
        return give_below(self, name, tensor)

    def finalize_weights(self) -> None:
        """After loading: pack, and let go of the plain weight."""
        if self.product is None:
            self.product = pack(self.weight.data)
            self.weight = nn.Parameter(self.weight.new_empty(0), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return reference(x, self.weight) if self.product is None else self.product(x)


class Float32Linear(Linear):
    """A float32 product of x in the model's dtype, whole on every rank."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out, torch.float32)
        self.wide = True

    def finalize_weights(self) -> None:
        """After loading: into parts for tensor cores, or as any weight."""
        if self.product is not None:
            return
        self.product = on_tensor_cores(self.weight.data)
        if self.product is None:
            super().finalize_weights()
        else:
            self.wide = False
            self.weight = nn.Parameter(self.weight.new_empty(0), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float() if self.wide else x)


class Head(Linear):
    """This rank's logits, float32 whatever the model's dtype: x [T, in] -> [T, out]. Until it is
    packed the weight stays in the checkpoint's dtype."""

    def __init__(self, n_in: int, n_out: int, rank: int = 0) -> None:
        super().__init__(n_in, n_out, torch.float32, rank=rank)

    def take(self, name: str, tensor: Tensor) -> bool:
        """The full weight [vocab, in]."""
        self.weight.data = shard(tensor, 0, self.rank, len(self.weight)).clone()
        return True

    def finalize_weights(self) -> None:
        if self.product is None:
            self.product = pack_rows(self.weight.data)
            self.weight = nn.Parameter(self.weight.new_empty(0), requires_grad=False)


class GroupedLinear(nn.Module):
    """wo_a: every output group has a product of its own. [T, G, in] -> [T, G * out].

    part: of the checkpoint's weight [G * out, in] a rank's, see `OutputGroups`.
    """

    def __init__(
        self,
        groups: int,
        n_in: int,
        n_out: int,
        dtype: torch.dtype,
        part: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        super().__init__()
        self.groups, self.part = groups, part
        shape = (groups * n_out, n_in)
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)

    def take(self, name: str, tensor: Tensor) -> bool:
        return give_below(self, name, self.part(tensor))

    def finalize_weights(self) -> None:
        """After loading: [G, in, out], as the batched product reads it."""
        if self.weight.dim() == 3:
            return
        weight = self.weight.data.unflatten(0, (self.groups, -1)).transpose(1, 2)
        weight = weight.to(multiplied(weight.dtype, weight.device)).contiguous()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.bmm(x.transpose(0, 1).to(self.weight.dtype), self.weight)
        return out.transpose(0, 1).flatten(1).to(x.dtype)


class Embedding(nn.Module):
    """Ids in equal parts over ranks; all_reduce: sums what they find."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        rank: int = 0,
        size: int = 1,
        all_reduce: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        super().__init__()
        weight = torch.empty(config.vocab_size // size, config.hidden_size, dtype=dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.rank, self.split, self.all_reduce = rank, size > 1, all_reduce

    def take(self, name: str, tensor: Tensor) -> bool:
        """The full weight [vocab, D]."""
        return give_below(self, name, shard(tensor, 0, self.rank, len(self.weight)))

    def forward(self, ids: Tensor) -> Tensor:
        if not self.split:
            return nn.functional.embedding(ids, self.weight)
        n = len(self.weight)
        place = ids - self.rank * n
        mine = (place >= 0) & (place < n)
        rows = nn.functional.embedding(place.clamp(0, n - 1), self.weight)
        return self.all_reduce(rows * mine[:, None])


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

    def forward(self, x: Tensor, ids: Tensor, weight: Tensor, also: Tensor | None = None) -> Tensor:
        return experts(x, ids, weight, self.w13, self.w2, self.limit, also)

    def take(self, name: str, tensor: Tensor) -> bool:
        """name: `17.w1.weight`; a full matrix [out, in]."""
        number, matrix, _ = name.split(".")
        expert, width = int(number), self.w2.shape[1]
        target = {
            "w1": self.w13[expert, :, :width],
            "w3": self.w13[expert, :, width:],
            "w2": self.w2[expert],
        }[matrix]
        split = 1 if matrix == "w2" else 0
        target.copy_(shard(tensor, split, self.rank, width).t())
        return True


class OwnExperts(nn.Module):
    """Expert parallelism: this rank holds some of the experts, whole (`experts_of_rank`).

    Args:
        make: builds the module of that many experts from a config.

    Raises:
        ValueError: there are fewer experts than ranks.
    """

    def __init__(
        self,
        config: ModelConfig,
        rank: int,
        size: int,
        make: Callable[[ModelConfig], nn.Module],
    ) -> None:
        super().__init__()
        config.require_expert_parallel(size)
        mine = config.experts_of_rank(rank, size)
        self.first, self.count = mine.start, len(mine)
        self.experts = make(replace(config, n_routed_experts=self.count))

    def forward(self, x: Tensor, ids: Tensor, weight: Tensor, also: Tensor | None = None) -> Tensor:
        """Only the (token, expert) pairs of this rank's experts are computed."""
        mine = (ids >= self.first) & (ids < self.first + self.count)
        if use_triton(x.device):  # the kernels pass over the others themselves
            out: Tensor = self.experts(x, (ids - self.first).where(mine, -1), weight, also)
            return out
        token, place = mine.nonzero(as_tuple=True)
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        if len(token):
            local = ids[token, place, None] - self.first
            part = self.experts(x[token], local, weight[token, place, None])
            total.index_add_(0, token, part.float())
        return joined(total.to(x.dtype), also)

    def take(self, name: str, tensor: Tensor) -> bool:
        """Where the expert is one of this rank's."""
        number, _, rest = name.partition(".")
        own = int(number) - self.first
        return 0 <= own < self.count and give(self.experts, f"{own}.{rest}", tensor)


class LocalParallel:
    """One process, plain torch."""

    rank: int = 0
    size: int = 1

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        self.config = config
        self.dtype = dtype

    def column(self, n_in: int, n_out: int, prefix: str) -> nn.Module:
        return Linear(n_in, n_out, self.dtype)

    def row(self, n_in: int, n_out: int, prefix: str, reduce: bool = True) -> nn.Module:
        return Linear(n_in, n_out, self.dtype)

    def replicated(self, n_in: int, n_out: int, prefix: str) -> nn.Module:
        return Linear(n_in, n_out, self.dtype)

    def embedding(self, prefix: str) -> nn.Module:
        return Embedding(self.config, self.dtype)

    def head(self, prefix: str) -> nn.Module:
        return Head(self.config.hidden_size, self.config.vocab_size)

    def experts(self, prefix: str, make: MakeExperts | None = None) -> nn.Module:
        return (make or self.plain_experts)(self.config, self.rank, self.size)

    def plain_experts(self, config: ModelConfig, rank: int, size: int) -> nn.Module:
        return SplitExperts(config, self.dtype, rank, size)

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def breaking(self, attention: Attend) -> Attend:
        return attention


class RankParallel(LocalParallel):
    """One of `size` processes: plain torch layers, split, and somebody's sum over ranks.

    expert_parallel splits experts by number instead of by width. The head gives this rank's part
    of the logits.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        rank: int,
        size: int,
        all_reduce: Callable[[Tensor], Tensor],
        expert_parallel: bool = False,
    ) -> None:
        super().__init__(config, dtype)
        self.rank, self.size, self._all_reduce = rank, size, all_reduce
        self.expert_parallel = expert_parallel

    def column(self, n_in: int, n_out: int, prefix: str) -> nn.Module:
        return Linear(n_in, n_out // self.size, self.dtype, 0, self.rank)

    def row(self, n_in: int, n_out: int, prefix: str, reduce: bool = True) -> nn.Module:
        layer = Linear(n_in // self.size, n_out, self.dtype, 1, self.rank)
        if reduce:
            layer.register_forward_hook(lambda module, inputs, out: self.all_reduce(out))
        return layer

    def embedding(self, prefix: str) -> nn.Module:
        return Embedding(self.config, self.dtype, self.rank, self.size, self.all_reduce)

    def head(self, prefix: str) -> nn.Module:
        return Head(self.config.hidden_size, self.config.vocab_size // self.size, self.rank)

    def experts(self, prefix: str, make: MakeExperts | None = None) -> nn.Module:
        make = make or self.plain_experts
        if not self.expert_parallel:
            return make(self.config, self.rank, self.size)
        return OwnExperts(self.config, self.rank, self.size, lambda part: make(part, 0, 1))

    def all_reduce(self, x: Tensor) -> Tensor:
        return self._all_reduce(x) if self.size > 1 else x
