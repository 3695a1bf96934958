"""The core's layers split over SGLang's tensor-parallel group, by SGLang's collectives."""

from __future__ import annotations

import torch
from sglang.srt.distributed import tensor_model_parallel_all_reduce
from sglang.srt.runtime_context import get_parallel
from torch import Tensor, nn

from dsv4_plugin.config import ModelConfig
from dsv4_plugin.model.loading import give_below, shard
from dsv4_plugin.model.parallel import Head, RankParallel


class SglangParallel(RankParallel):
    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        rank, size = get_parallel().tp_rank, get_parallel().tp_size
        own = get_parallel().moe_ep_size > 1
        super().__init__(config, dtype, rank, size, tensor_model_parallel_all_reduce, own)
        assert config.vocab_size % self.size == 0

    def embedding(self, prefix: str) -> nn.Module:
        if self.size == 1:
            return super().embedding(prefix)
        return SplitEmbedding(self.config, self.dtype, self.rank, self.size)

    def head(self, prefix: str) -> nn.Module:
        head = Head(self.config.hidden_size, self.config.vocab_size // self.size, self.rank)
        head.quant_method = _OwnProduct()
        return head


class SplitEmbedding(nn.Module):
    """Ids in equal parts over ranks. (SGLang's own compiles its mask: on a CPU at the first step,
    and with a C++ compiler.)"""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, rank: int, size: int) -> None:
        super().__init__()
        weight = torch.empty(config.vocab_size // size, config.hidden_size, dtype=dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.rank, self.first = rank, rank * len(weight)

    def take(self, name: str, tensor: Tensor) -> bool:
        return give_below(self, name, shard(tensor, 0, self.rank, len(self.weight)))

    def forward(self, ids: Tensor) -> Tensor:
        place = ids - self.first
        mine = (place >= 0) & (place < len(self.weight))
        rows = nn.functional.embedding(place.clamp(0, len(self.weight) - 1), self.weight)
        return tensor_model_parallel_all_reduce(rows * mine[:, None])


class _OwnProduct:
    """SGLang's logits processor runs the head through `quant_method`."""

    def apply(self, layer: Head, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return layer(x.float())

    def process_weights_after_loading(self, layer: Head) -> None:
        """Nothing: the core has put the weight into its form."""
