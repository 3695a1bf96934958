"""MTP, multi-token prediction: one more block that drafts the token after the next.

From the streams h of position t and the token at t + 1 it predicts the token at t + 2; run on its
own streams and draft, the one after that. Embedding and output head are the main model's. Source:
`MTPBlock` of the authors' inference/model.py.

Shapes: T tokens, R streams, D hidden size.
"""

from __future__ import annotations

from torch import Tensor, nn

from dsv4_plugin.cache.layer import LayerCache
from dsv4_plugin.cache.step import Step
from dsv4_plugin.config import SWA, ModelConfig
from dsv4_plugin.kernels.packed import plain
from dsv4_plugin.kernels.streams import spread, streams
from dsv4_plugin.model.block import Block
from dsv4_plugin.model.hyper_connection import HyperHead
from dsv4_plugin.model.norm import RMSNorm
from dsv4_plugin.model.parallel import Parallel
from dsv4_plugin.model.quantised import quantised
from dsv4_plugin.model.transformer import Network


class MTPBlock(Block):
    """A block without compression, and what joins a token's embedding to the streams."""

    def __init__(self, config: ModelConfig, parallel: Parallel, prefix: str) -> None:
        super().__init__(config.with_draft_layers(), parallel, config.num_hidden_layers, prefix)
        d, eps = config.hidden_size, config.rms_norm_eps
        self.enorm, self.hnorm, self.norm = (RMSNorm(d, eps) for _ in range(3))
        self.e_proj = parallel.replicated(d, d, f"{prefix}.e_proj")
        self.h_proj = parallel.replicated(d, d, f"{prefix}.h_proj")
        self.hc_head = HyperHead(config)


class MTP(Network):
    """Parameters carry the checkpoint's names."""

    def __init__(self, config: ModelConfig, parallel: Parallel) -> None:
        super().__init__()
        self.config, self.ratios = config, [SWA]
        self.mtp = nn.ModuleList([MTPBlock(config, quantised(config, parallel), "mtp.0")])

    @property
    def block(self) -> MTPBlock:
        block = self.mtp[0]
        assert isinstance(block, MTPBlock)
        return block

    def forward(
        self, h: Tensor, embedding: Tensor, ids: Tensor, step: Step, cache: LayerCache
    ) -> Tensor:
        """Streams h [T, R, D] of the last main layer (or of the draft before), and the next token
        of each position, ids [T], embedding [T, D] -> this block's streams [T, R, D]."""
        block = self.block
        e = block.e_proj(block.enorm(embedding))
        joined = block.h_proj(block.hnorm(h.flatten(0, 1))).view_as(h)
        return spread(*block((None, e[:, None] + joined, None), ids, step, cache))

    def collapse(self, h: Tensor) -> Tensor:
        """Streams [T, R, D] -> hidden states [T, D], ready for the head."""
        block = self.block
        return plain(streams(None, h, None, block.hc_head.mixer(block.norm))[1])
