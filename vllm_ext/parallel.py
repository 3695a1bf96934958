"""vLLM's parallel layers as the core's `Parallel`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from vllm.distributed import (
    get_dp_group,
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.distributed.utils import get_pp_indices
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.platforms import current_platform

from dsv4_plugin.config import ModelConfig
from dsv4_plugin.kernels.linear import Product, pack, pack_rows
from dsv4_plugin.model.loading import give
from dsv4_plugin.model.parallel import MakeExperts, OwnExperts, SplitExperts
from vllm_ext.graphs import Running


class _Packed:
    """On CPUs: a layer's product is the core's packed one, made when its weight is loaded."""

    pack: Callable[[Tensor], Product]

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.product = type(self).pack(layer.weight.data)
        layer.weight = nn.Parameter(layer.weight.new_empty(0), requires_grad=False)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return layer.product(x)


class PackedLinear(_Packed, UnquantizedLinearMethod):
    """vLLM's own has no fast product of bfloat16 on CPUs without AVX-512, and reads twice the
    bytes of float32 weights."""

    pack = staticmethod(pack)


class PackedHead(_Packed, UnquantizedEmbeddingMethod):
    """vLLM's own way to float32 logits casts the whole weight in every step (29 ms instead of 2
    for 129,280 x 256)."""

    pack = staticmethod(pack_rows)


class VllmParallel:
    """This process's place in vLLM's groups, and its layers.

    stage: pipeline rank; stages: the layers of every stage; running: the step that runs.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, expert_parallel: bool) -> None:
        self.config, self.dtype, self.expert_parallel = config, dtype, expert_parallel
        self.rank = get_tensor_model_parallel_rank()
        self.size = get_tensor_model_parallel_world_size()
        pipeline = get_pp_group()
        self.stage = pipeline.rank_in_group
        n, size = config.num_hidden_layers, pipeline.world_size
        self.stages = [range(*get_pp_indices(n, i, size)) for i in range(size)]
        self.running = Running()
        self.breaking = self.running.breaking

    def column(self, n_in: int, n_out: int, prefix: str) -> nn.Module:
        return _packed(
            ColumnParallelLinear(n_in, n_out, bias=False, prefix=prefix, return_bias=False)
        )

    def row(self, n_in: int, n_out: int, prefix: str, reduce: bool = True) -> nn.Module:
        return _packed(
            RowParallelLinear(
                n_in, n_out, bias=False, prefix=prefix, return_bias=False, reduce_results=reduce
            )
        )

    def replicated(self, n_in: int, n_out: int, prefix: str) -> nn.Module:
        return _packed(ReplicatedLinear(n_in, n_out, bias=False, prefix=prefix, return_bias=False))

    def embedding(self, prefix: str) -> nn.Module:
        return VocabParallelEmbedding(
            self.config.vocab_size, self.config.hidden_size, prefix=prefix
        )

    def head(self, prefix: str) -> nn.Module:
        """Logits are float32 (the configuration hook sets vLLM's head_dtype)."""
        head = ParallelLMHead(self.config.vocab_size, self.config.hidden_size, prefix=prefix)
        if current_platform.is_cpu():
            head.quant_method = PackedHead()
        return head

    def experts(self, prefix: str, make: MakeExperts | None = None) -> nn.Module:
        make = make or self._plain_experts
        if not self.expert_parallel:
            return make(self.config, self.rank, self.size)
        dp = get_dp_group()
        rank, size = dp.rank_in_group * self.size + self.rank, dp.world_size * self.size
        own = OwnExperts(self.config, rank, size, lambda part: make(part, 0, 1))
        return GatheredExperts(own) if dp.world_size > 1 else own

    def _plain_experts(self, config: ModelConfig, rank: int, size: int) -> nn.Module:
        return SplitExperts(config, self.dtype, rank, size)

    def all_reduce(self, x: Tensor) -> Tensor:
        return tensor_model_parallel_all_reduce(x) if self.size > 1 else x


def _packed(layer: nn.Module) -> nn.Module:
    if current_platform.is_cpu():
        layer.quant_method = PackedLinear()
    return layer


class GatheredExperts(nn.Module):
    """Experts spread over data-parallel ranks: all ranks' tokens come together, every rank computes
    its experts' share, the shares are summed. vLLM keeps the ranks in step, by dummy batches where
    one has nothing to do.

    In a captured graph, whole or between breaks, all ranks have the same number of rows: vLLM pads
    them to one graph's, or captures none. Outside of vLLM's steps (a warm-up) they do too.
    """

    def __init__(self, experts: OwnExperts) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
        group, n = get_dp_group(), len(x)
        most = n
        if is_forward_context_available():
            metadata = get_forward_context().dp_metadata
            assert metadata is not None
            most = int(metadata.num_tokens_across_dp_cpu.max())
        padding = (0, 0, 0, most - n)
        everyone = [
            group.all_gather(nn.functional.pad(part, padding, value=fill), 0)
            for part, fill in ((x, 0.0), (ids, -1), (weight, 0.0))
        ]
        out = group.all_reduce(self.experts(*everyone))
        first = group.rank_in_group * most
        return out[first : first + n]

    def take(self, name: str, tensor: Tensor) -> bool:
        return give(self.experts, name, tensor)
