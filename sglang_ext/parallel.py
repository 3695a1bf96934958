"""The core's layers split over SGLang's tensor-parallel group, by SGLang's collectives."""

from __future__ import annotations

import torch
from sglang.srt.distributed import tensor_model_parallel_all_reduce
from sglang.srt.runtime_context import get_parallel
from torch import Tensor, nn

from dsv4_plugin.config import ModelConfig
from dsv4_plugin.model.parallel import Head, RankParallel


class SglangParallel(RankParallel):
    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        group = get_parallel()
        super().__init__(
            config, dtype, group.tp_rank, group.tp_size, tensor_model_parallel_all_reduce,
            expert_parallel=group.moe_ep_size > 1,
        )  # fmt: skip

    def head(self, prefix: str) -> nn.Module:
        head = super().head(prefix)
        head.quant_method = _OwnProduct()
        return head


class _OwnProduct:
    """SGLang's logits processor runs the head through `quant_method`."""

    def apply(self, layer: Head, x: Tensor, bias: Tensor | None = None) -> Tensor:
        out: Tensor = layer(x)
        return out

    def process_weights_after_loading(self, layer: Head) -> None:
        """Nothing: the core has put the weight into its form."""
