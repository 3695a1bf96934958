"""The whole network: embedding, blocks over R streams, mHC head, norm, output head."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from dsv4_plugin.cache.layer import LayerCache
from dsv4_plugin.cache.step import Step
from dsv4_plugin.config import ModelConfig
from dsv4_plugin.model.block import Block
from dsv4_plugin.model.hyper_connection import HyperHead
from dsv4_plugin.model.norm import RMSNorm
from dsv4_plugin.model.parallel import Parallel


class Transformer(nn.Module):
    """Parameters carry the checkpoint's names (see `checkpoint.names`)."""

    def __init__(self, config: ModelConfig, parallel: Parallel) -> None:
        super().__init__()
        config.require_tensor_parallel(parallel.size)
        self.config = config
        self.embed = parallel.embedding("embed")
        self.layers = nn.ModuleList(
            Block(config, parallel, i, f"layers.{i}") for i in range(config.num_hidden_layers)
        )
        self.hc_head = HyperHead(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = parallel.head("head")

    def forward(self, input_ids: Tensor, step: Step, caches: Sequence[LayerCache]) -> Tensor:
        """input_ids int64 [T] -> hidden states [T, D], normed, ready for `head`."""
        h = self.embed(input_ids)[:, None].repeat(1, self.config.hc_mult, 1)
        for layer, cache in zip(self.layers, caches, strict=True):
            h = layer(h, input_ids, step, cache)
        out: Tensor = self.norm(self.hc_head(h))
        return out

    def finalize_weights(self) -> None:
        """After loading: let every module put its weights into the form it computes with."""
        for module in self.modules():
            finalize = getattr(module, "finalize_weights", None)
            if module is not self and callable(finalize):
                finalize()
