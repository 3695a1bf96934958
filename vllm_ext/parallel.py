"""vLLM's parallel layers as the core's `Parallel`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from dsv4_plugin.config import ModelConfig
from dsv4_plugin.model.parallel import SplitExperts


class VllmParallel:
    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        self.config, self.dtype = config, dtype
        self.rank = get_tensor_model_parallel_rank()
        self.size = get_tensor_model_parallel_world_size()

    def column(self, n_in: int, n_out: int, prefix: str) -> nn.Module:
        return ColumnParallelLinear(n_in, n_out, bias=False, prefix=prefix, return_bias=False)

    def row(self, n_in: int, n_out: int, prefix: str, reduce: bool = True) -> nn.Module:
        return RowParallelLinear(
            n_in, n_out, bias=False, prefix=prefix, return_bias=False, reduce_results=reduce
        )

    def replicated(self, n_in: int, n_out: int, prefix: str) -> nn.Module:
        return ReplicatedLinear(n_in, n_out, bias=False, prefix=prefix, return_bias=False)

    def embedding(self, prefix: str) -> nn.Module:
        return VocabParallelEmbedding(
            self.config.vocab_size, self.config.hidden_size, prefix=prefix
        )

    def head(self, prefix: str) -> nn.Module:
        """Logits are float32 products of float32 values, as in the core."""
        return ParallelLMHead(
            self.config.vocab_size,
            self.config.hidden_size,
            params_dtype=torch.float32,
            prefix=prefix,
        )

    def experts(self, prefix: str) -> nn.Module:
        return SplitExperts(self.config, self.dtype, self.rank, self.size)

    def all_reduce(self, x: Tensor) -> Tensor:
        return tensor_model_parallel_all_reduce(x) if self.size > 1 else x
