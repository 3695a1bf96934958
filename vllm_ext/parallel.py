"""The core's layers split over vLLM's groups, by vLLM's collectives."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from vllm.distributed import (
    get_dp_group,
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)
from vllm.distributed.utils import get_pp_indices
from vllm.forward_context import get_forward_context, is_forward_context_available

from dsv4_plugin.config import ModelConfig
from dsv4_plugin.kernels.experts import joined
from dsv4_plugin.model.loading import give
from dsv4_plugin.model.parallel import MakeExperts, OwnExperts, RankParallel
from vllm_ext.graphs import Running


class VllmParallel(RankParallel):
    """This process's place in vLLM's groups, and its layers.

    stage: pipeline rank; stages: the layers of every stage; running: the step that runs.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, expert_parallel: bool) -> None:
        super().__init__(
            config, dtype,
            get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size(),
            tensor_model_parallel_all_reduce, expert_parallel,
        )  # fmt: skip
        pipeline = get_pp_group()
        self.stage = pipeline.rank_in_group
        n, size = config.num_hidden_layers, pipeline.world_size
        self.stages = [range(*get_pp_indices(n, i, size)) for i in range(size)]
        self.running = Running()
        self.breaking = self.running.breaking

    def experts(self, prefix: str, make: MakeExperts | None = None) -> nn.Module:
        dp = get_dp_group()
        if not self.expert_parallel or dp.world_size == 1:
            return super().experts(prefix, make)
        rank, size = dp.rank_in_group * self.size + self.rank, dp.world_size * self.size
        whole = make or self.plain_experts
        return GatheredExperts(OwnExperts(self.config, rank, size, lambda part: whole(part, 0, 1)))

    def gather_logits(self, part: Tensor) -> Tensor:
        """This rank's logits [T, V / ranks] -> everyone's [T, V]."""
        return tensor_model_parallel_all_gather(part) if self.size > 1 else part


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

    def forward(self, x: Tensor, ids: Tensor, weight: Tensor, also: Tensor | None = None) -> Tensor:
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
        return joined(out[first : first + n], also)

    def take(self, name: str, tensor: Tensor) -> bool:
        return give(self.experts, name, tensor)
