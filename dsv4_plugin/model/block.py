"""One layer: attention, then MoE, each between mHC's pre and post."""

from __future__ import annotations

from torch import Tensor, nn

from dsv4_plugin.cache.layer import LayerCache
from dsv4_plugin.cache.step import Step
from dsv4_plugin.config import ModelConfig
from dsv4_plugin.model.attention import Attention
from dsv4_plugin.model.hyper_connection import HyperConnection
from dsv4_plugin.model.moe import MoE
from dsv4_plugin.model.norm import RMSNorm
from dsv4_plugin.model.parallel import Parallel


class Block(nn.Module):
    def __init__(self, config: ModelConfig, parallel: Parallel, layer: int, prefix: str) -> None:
        super().__init__()
        d, eps = config.hidden_size, config.rms_norm_eps
        self.hc_attn, self.hc_ffn = HyperConnection(config), HyperConnection(config)
        self.attn_norm, self.ffn_norm = RMSNorm(d, eps), RMSNorm(d, eps)
        self.attn = Attention(config, parallel, layer, f"{prefix}.attn")
        self.ffn = MoE(config, parallel, layer, f"{prefix}.ffn")

    def forward(self, h: Tensor, input_ids: Tensor, step: Step, cache: LayerCache) -> Tensor:
        """h [T, R, D] -> [T, R, D], in the model's dtype."""
        dtype, h32 = h.dtype, h.float()
        x, post, mixing = self.hc_attn.pre(h32)
        out = self.attn(self.attn_norm(x.to(dtype)), step, cache)
        h32 = self.hc_attn.post(out, h32, post, mixing).to(dtype).float()
        x, post, mixing = self.hc_ffn.pre(h32)
        out = self.ffn(self.ffn_norm(x.to(dtype)), input_ids)
        return self.hc_ffn.post(out, h32, post, mixing).to(dtype)
