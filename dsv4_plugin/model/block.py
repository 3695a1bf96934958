"""One layer: attention, then MoE, each between mHC's collapse and spread.

Source: `Block` of the authors' inference/model.py, whose hc_pre and hc_post are one operation here.
"""

from __future__ import annotations

from torch import Tensor, nn

from dsv4_plugin.cache.layer import LayerCache
from dsv4_plugin.cache.step import Step
from dsv4_plugin.config import ModelConfig
from dsv4_plugin.kernels.streams import Spread, streams
from dsv4_plugin.model.attention import Attention
from dsv4_plugin.model.hyper_connection import HyperConnection
from dsv4_plugin.model.moe import MoE
from dsv4_plugin.model.norm import RMSNorm
from dsv4_plugin.model.parallel import Parallel

Streams = tuple[Tensor | None, Tensor, Spread | None]
"""The residual streams between two sublayers: the last one's output [T, D], the streams [T, R, D]
without it, and how it joins them. (None, h, None: it has.) Joining and the next collapse are one
pass over them."""


class Block(nn.Module):
    """attend: the attention, or what an engine puts around it where its captured graphs break.
    It is bound when the block is made: hooks on `attn` are not called."""

    def __init__(self, config: ModelConfig, parallel: Parallel, layer: int, prefix: str) -> None:
        super().__init__()
        d, eps = config.hidden_size, config.rms_norm_eps
        self.hc_attn, self.hc_ffn = HyperConnection(config), HyperConnection(config)
        self.attn = Attention(config, parallel, layer, f"{prefix}.attn")
        self.ffn = MoE(config, parallel, layer, f"{prefix}.ffn")
        self.attn_norm = RMSNorm(d, eps, self.attn.takes_rounded)
        self.ffn_norm = RMSNorm(d, eps, self.ffn.takes_rounded)
        self.attend = parallel.breaking(self.attn.forward)

    def forward(self, before: Streams, input_ids: Tensor, step: Step, cache: LayerCache) -> Streams:
        """input_ids int [T]."""
        h, x, by = streams(*before, self.hc_attn.mixer(self.attn_norm))
        out = self.attend(x, step, cache)
        h, x, by = streams(out, h, by, self.hc_ffn.mixer(self.ffn_norm))
        return self.ffn(x, input_ids, step), h, by
