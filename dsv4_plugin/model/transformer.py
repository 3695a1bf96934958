"""The whole network: embedding, blocks over R streams, mHC head, norm, output head.

Source: `Transformer` of the authors' inference/model.py. With pipeline parallelism a process holds
some of the blocks; the R streams travel between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsv4_plugin.cache.layer import LayerCache
from dsv4_plugin.cache.step import Step
from dsv4_plugin.config import ModelConfig
from dsv4_plugin.kernels.packed import plain
from dsv4_plugin.kernels.streams import spread, streams
from dsv4_plugin.model.block import Block, Streams
from dsv4_plugin.model.hyper_connection import HyperHead
from dsv4_plugin.model.norm import RMSNorm
from dsv4_plugin.model.parallel import Parallel
from dsv4_plugin.model.quantised import quantised


@dataclass(frozen=True)
class WeightBytes:
    """Of loaded weights, by whether they stay packed (codes of 8 or 4 bits and byte scales)."""

    packed: int = 0
    plain: int = 0

    def __str__(self) -> str:
        gib = (self.packed + self.plain) / 2**30
        return f"{gib:.2f} GiB of weights, {self.packed / 2**30:.2f} GiB of them packed"


class Network(nn.Module):
    """What is loaded from a checkpoint, tensor by tensor. ratios: of its layers."""

    config: ModelConfig
    ratios: list[int]
    weight_bytes = WeightBytes()

    def finalize_weights(self) -> None:
        """After loading: let every module put its weights into the form it computes with."""
        for module in self.modules():
            finalize = getattr(module, "finalize_weights", None)
            if module is not self and callable(finalize):
                finalize()


class Transformer(Network):
    """Parameters carry the checkpoint's names (see `checkpoint.names`)."""

    def __init__(
        self, config: ModelConfig, parallel: Parallel, layers: range | None = None
    ) -> None:
        super().__init__()
        config.require_tensor_parallel(parallel.size)
        parallel = quantised(config, parallel)
        self.config = config
        n = config.num_hidden_layers
        layers = range(n) if layers is None else layers
        self.ratios = [config.compress_ratios[i] for i in layers]
        self.first, self.last = layers.start == 0, layers.stop == n
        if self.first:
            self.embed = parallel.embedding("embed")
        self.layers = nn.ModuleDict(
            {str(i): Block(config, parallel, i, f"layers.{i}") for i in layers}
        )
        if self.last:
            self.hc_head = HyperHead(config)
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            self.head = parallel.head("head")

    def forward(self, input_ids: Tensor, step: Step, caches: Sequence[LayerCache]) -> Tensor:
        """input_ids int [T], padding included -> hidden states [T, D], normed, ready for `head`."""
        return self._collapse(self._blocks(self.spread(input_ids), input_ids, step, caches))

    def spread(self, input_ids: Tensor) -> Tensor:
        """Embeddings as the first streams: [T, R, D]. First stage only."""
        h: Tensor = self.embed(input_ids)
        return h[:, None].repeat(1, self.config.hc_mult, 1)

    def run(self, h: Tensor, input_ids: Tensor, step: Step, caches: Sequence[LayerCache]) -> Tensor:
        """This stage's blocks: streams [T, R, D] -> [T, R, D]."""
        return spread(*self._blocks(h, input_ids, step, caches))

    def run_read(
        self,
        h: Tensor,
        input_ids: Tensor,
        step: Step,
        caches: Sequence[LayerCache],
        layers: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        """`run`, and the means over the streams behind some of its layers, side by side: streams
        [T, R, D], means [T, layers * D]."""
        means: dict[int, Tensor | None] = dict.fromkeys(layers)
        h = spread(*self._blocks(h, input_ids, step, caches, means))
        return h, torch.cat([mean for mean in means.values() if mean is not None], -1)

    def collapse(self, h: Tensor) -> Tensor:
        """The last streams [T, R, D] -> hidden states [T, D]. Last stage only."""
        return self._collapse((None, h, None))

    def _blocks(
        self,
        h: Tensor,
        input_ids: Tensor,
        step: Step,
        caches: Sequence[LayerCache],
        means: dict[int, Tensor | None] | None = None,
    ) -> Streams:
        now: Streams = None, h, None
        for (layer, block), cache in zip(self.layers.items(), caches, strict=True):
            now = block(now, input_ids, step, cache)
            if means and int(layer) in means:
                means[int(layer)] = spread(*now).float().mean(1).to(h.dtype)
        return now

    def _collapse(self, last: Streams) -> Tensor:
        return plain(streams(*last, self.hc_head.mixer(self.norm))[1])
